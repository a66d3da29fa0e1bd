"""Does it scale? A short run of a recipe at each size, and the page that a proposal for computing time asks for.

    hvdtrain scaling gpt2-124m --nodes 1,2,4,8 --kind strong --time 15

    runs/scaling-gpt2-124m-strong/scaling.html, .md    tables and pictures, after each start of the command anew
                                  scaling.json         what was asked, and the figures
                                  nodes-1/ nodes-2/    an ordinary run folder each

Each size is a Slurm job; the same command gathers what has ended and submits what has failed. With ``--here`` this
machine is all nodes, one after another, in memory or on links of a given speed.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.comm.ranks import OneRank
from hvdtrain.comm.world import World
from hvdtrain.commands.kept import kept
from hvdtrain.commands.page import write_page
from hvdtrain.commands.ranks_here import check_launcher, interrupting
from hvdtrain.commands.scaling.picture import draw
from hvdtrain.commands.scaling.points import Point, Series, points_of, whole_run
from hvdtrain.commands.scaling.report import as_page, as_text, as_tree
from hvdtrain.commands.scaling.results import conclude, read_result
from hvdtrain.commands.scaling.running import Here, OnSlurm, is_finished
from hvdtrain.config import flatten
from hvdtrain.errors import EXIT_STOPPED_EARLY, ConfigError, OutputError, say
from hvdtrain.files import make_folder, write_json
from hvdtrain.jobs.claim import Claim
from hvdtrain.planner.estimate import Estimate
from hvdtrain.planner.measured import read_runs

_OURS = ("claim", "network")


@dataclass(frozen=True)
class Asked:
    """What the user asks for. predict: nodes to be told of; none: a few doublings beyond those that are measured."""

    series: Series
    where: Here | OnSlurm
    out: Path
    predict: Sequence[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if wrong := [nodes for nodes in self.predict if nodes < self.series.nodes[0]]:
            raise ConfigError(f"--predict {wrong[0]}: fewer nodes than the smallest run has")

    @property
    def command(self) -> str:
        """Short: what a reader would type."""
        series = self.series
        words = ["hvdtrain", "scaling", series.recipe, *series.overrides, "--kind", series.kind]
        words += ["--nodes", ",".join(map(str, series.nodes)), "--ranks-per-node", str(series.ranks_per_node)]
        words += ["--steps", str(series.steps)]
        if isinstance(self.where, Here):
            words += ["--here", "--bandwidth", self.where.bandwidth]
        return shlex.join(["python", "-m", *words])


def scaling(asked: Asked, dry_run: bool, world: World) -> int:
    """Measure what is not measured yet; write the page of what there is. One process.

    Returns 0; EXIT_STOPPED_EARLY after Ctrl-C, or while jobs wait or run; or the exit code of a run that failed here.
    Errors: ConfigError for whatever cannot be, before any run, and for runs that cannot be compared; DataError;
    LaunchError under a launcher.
    """
    check_launcher("scaling", world)
    whole = whole_run(asked.series)
    points = points_of(asked.series, whole)
    if dry_run:
        print("\n".join(_as_planned(asked.series, points)))
        return 0
    identity = _identity(asked, points)
    path = asked.out / "scaling.json"
    kept(path, identity, "measurement", (*_OURS, *(point.name for point in points)))
    with interrupting(), Claim(asked.out, OneRank()) as claim:
        claim.take()
        try:
            make_folder(asked.out)
            write_json(path, {"identity": identity})
            code = asked.where.run(asked.series, points, asked.out)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on with {asked.out}")
            return EXIT_STOPPED_EARLY
        except OSError as error:
            raise OutputError(f"cannot write {asked.out}: {error.strerror or error}") from error
        _tell(asked, whole, points, identity)
    return code


def _identity(asked: Asked, points: Sequence[Point]) -> dict[str, Any]:
    """What a measurement must share with one that goes on: all but its sizes and what they change."""
    series, config = asked.series, points[0].plan.config
    of_command = {"recipe": series.recipe, "kind": series.kind, "ranks per node": series.ranks_per_node}
    return {**of_command, **asked.where.identity(points[-1].ranks), **flatten(config.model_dump(mode="json"))}


def _as_planned(series: Series, points: Sequence[Point]) -> list[str]:
    lines = []
    for point in points:
        load = point.plan.load
        lines.append(
            f"{point.name}: {load.ranks} ranks, a batch of {load.global_tokens:,} tokens in {load.microbatches} "
            f"microbatches of {load.microbatch} rows a rank, {point.plan.memory.total / 2**20:,.0f} MiB a rank"
        )
        lines.append(f"  {shlex.join(['hvdtrain', 'train', series.recipe, *point.settings])}")
    return lines


def _tell(asked: Asked, whole: Estimate, points: Sequence[Point], identity: dict[str, Any]) -> None:
    finished = [point for point in points if is_finished(asked.out / point.name)]
    if not finished:
        return
    runs = read_runs([asked.out / point.name for point in finished])
    found = conclude(
        asked.series,
        whole,
        [read_result(point, run) for point, run in zip(finished, runs, strict=True)],
        asked.predict,
    )
    write_json(asked.out / "scaling.json", {"identity": identity, **as_tree(found)})
    files = write_page(as_page(found, asked.command, asked.where.about, draw(found)), asked.out / "scaling")
    print(as_text(found))
    print("\n".join(str(file) for file in files))
