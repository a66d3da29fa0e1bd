"""Where the points run: as Slurm jobs, or in turn on this machine, where every node is a part of it."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.comm.world import World
from hvdtrain.commands.ranks_here import Place, last_words, possible, threads_of
from hvdtrain.commands.scaling.points import Point, Series
from hvdtrain.errors import EXIT_OK, EXIT_STOPPED_EARLY, ConfigError, say
from hvdtrain.jobs.slurm import ask_queue, job_ids, make_job, read_object, submit
from hvdtrain.jobs.status import status_of
from hvdtrain.machine.link import Link, parse_bandwidth

MEMORY = "memory"
_LOOK_EVERY_S = 5.0


def is_finished(run_dir: Path) -> bool:
    return read_object(run_dir / "summary.json").get("status") == "finished"


@dataclass(frozen=True)
class Here:
    """This machine. bandwidth: of each rank's link, or MEMORY."""

    bandwidth: str

    def __post_init__(self) -> None:
        if self.bandwidth != MEMORY:
            parse_bandwidth(self.bandwidth, "--bandwidth")

    @property
    def about(self) -> str:
        met = "in memory" if self.bandwidth == MEMORY else f"on links of {self.bandwidth} in network namespaces"
        return f"All nodes were parts of one machine, whose cores they shared; ranks met {met}."

    def identity(self, most_ranks: int) -> dict[str, object]:
        return {"bandwidth": self.bandwidth, "threads": threads_of(most_ranks)}

    def run(self, series: Series, points: Sequence[Point], folder: Path) -> int:
        """Train each point that is not finished; returns the first exit code of one that failed."""
        place, codes = self._place(series, points[-1], folder), []
        for point in points:
            run_dir, log = folder / point.name, folder / f"{point.name}.txt"
            if is_finished(run_dir):
                print(f"hvdtrain: {point.name} is there", flush=True)
                continue
            with suppress(FileNotFoundError):
                shutil.rmtree(run_dir)  # of a run that did not finish: times of one in two halves would be no times
            on = Place(point.ranks, place.link, place.threads, place.folder)
            print(f"hvdtrain: {point.name}: {on.about}", flush=True)
            ran = on.train([series.recipe, *point.settings, "--run-dir", str(run_dir), "--resume", "never"], log)
            if ran.exit_code != EXIT_OK:
                say(f"{point.name} ended with exit code {ran.exit_code}: {last_words(log)} (see {log})")
                codes.append(ran.exit_code)
        return next(iter(codes), EXIT_OK)

    def _place(self, series: Series, largest: Point, folder: Path) -> Place:
        link = None
        if self.bandwidth != MEMORY:
            link, notes = possible(Link(parse_bandwidth(self.bandwidth, "--bandwidth")), largest.ranks)
            if link is not None and series.ranks_per_node > 1:
                raise ConfigError("--bandwidth gives each rank a host of its own; leave --ranks-per-node out")
            for note in notes:
                say(f"note: {note}")
        return Place(largest.ranks, link, threads_of(largest.ranks), folder / "network")


@dataclass(frozen=True)
class OnSlurm:
    """Each point a job. wait: until all have ended. The rest: see ``jobs.slurm.Job``."""

    world: World
    wait: bool = False
    time: str = ""
    partition: str = ""
    account: str = ""
    site: str = ""
    options: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        return ""

    def identity(self, most_ranks: int) -> dict[str, object]:
        return {"partition": self.partition, "site": self.site, "slurm": list(self.options)}

    def run(self, series: Series, points: Sequence[Point], folder: Path) -> int:
        """Submit each point that is neither finished nor queued.

        Returns EXIT_STOPPED_EARLY where some wait, run or have failed: the same command goes on.
        """
        for point in points:
            run_dir = folder / point.name
            if is_finished(run_dir) or self._queued([run_dir]):
                continue
            if run_dir.exists():
                found = status_of(run_dir, {}, time.time())
                say(f"{point.name} {found.state}{f': {found.why}' if found.why else ''}; it begins anew")
                shutil.rmtree(run_dir)
            names = {"time": self.time, "partition": self.partition, "account": self.account, "site": self.site}
            rest = {**names, "ranks_per_node": series.ranks_per_node, "options": self.options}
            job = make_job(series.recipe, point.settings, run_dir, point.nodes, **rest)
            print(f"hvdtrain: {point.name}: job {submit(job, False, self.world).split()[1]}", flush=True)
        run_dirs = [folder / point.name for point in points]
        while self.wait and self._queued(run_dirs):
            time.sleep(_LOOK_EVERY_S)
        left = [run_dir.name for run_dir in run_dirs if not is_finished(run_dir)]
        if left:
            cure = "gathers them when they have ended" if self._queued(run_dirs) else "begins them anew"
            say(f"not finished: {', '.join(left)}; the same command {cure}")
        return EXIT_STOPPED_EARLY if left else EXIT_OK

    def _queued(self, run_dirs: Sequence[Path]) -> bool:
        ids = [job_id for run_dir in run_dirs for job_id in job_ids(run_dir)]
        if (queue := ask_queue(ids)) is None:
            raise ConfigError("squeue does not answer, so nobody can tell which jobs still run; try again later")
        return bool(queue)
