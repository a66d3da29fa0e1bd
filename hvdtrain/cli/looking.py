"""The words of the commands that measure and look: status, report, compare, scaling, doctor."""

import argparse
import os
from pathlib import Path

from hvdtrain.comm.world import World
from hvdtrain.commands.arguments import Run, add_recipe, numbers_in
from hvdtrain.errors import EXIT_CRASH, EXIT_OK, ConfigError


def define_status(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="for programs")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.jobs.status import status

        print(status(words.run_dirs, words.json))
        return EXIT_OK

    return run


def define_report(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: loss.png in the first run folder")
    parser.add_argument(
        "--html", action="store_true",
        help="a page instead: curves, times by part, events, settings that differ; --out: its file (default: "
        "report.html in the first run folder)",
    )  # fmt: skip

    def run(words: argparse.Namespace, world: World) -> int:
        if words.html:
            from hvdtrain.commands.report_page import report_page

            print(report_page(words.run_dirs, words.out))
            return EXIT_OK
        from hvdtrain.commands.report import report

        print(report(words.run_dirs, words.out))
        return EXIT_OK

    return run


def define_compare(parser: argparse.ArgumentParser) -> Run:
    add_recipe(parser, "settings of all runs")
    parser.add_argument(
        "--syncs", action="append", default=[], metavar="A,B,...",
        help="ways to agree, with settings behind a colon: diloco,local_sgd:every=4,gossip:topology=ring; "
        "default: all that have a name and fit",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, required=True, metavar="N")
    parser.add_argument(
        "--bandwidth", default="1gbit", metavar="RATE|scaled|memory",
        help="of each rank's link, both ways: 1gbit (default), 100mbit; scaled: see --as-large-as; memory: no links",
    )  # fmt: skip
    parser.add_argument("--latency", default="0", metavar="TIME", help="from rank to rank: 1ms; default: 0")
    scaled = parser.add_argument_group("with --bandwidth scaled: a large model's ratio of bytes to compute")
    scaled.add_argument(
        "--as-large-as", type=float, default=0.0, metavar="PARAMETERS", help="of the large model: 1.3e9"
    )
    scaled.add_argument("--large-link", default="100gbit", metavar="RATE", help="of its ranks; default: 100gbit")
    scaled.add_argument(
        "--large-step", type=float, default=0.0, metavar="S",
        help="seconds that a step of it computes; default: as long as a step here",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="table, picture and runs (default: runs/compare-RECIPE)"
    )

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.compare import Asked, compare
        from hvdtrain.commands.compare.scaled import Large

        out = words.out or Path("runs") / f"compare-{Path(words.recipe).stem}"
        large = Large(words.as_large_as, words.large_link, words.large_step)
        of_link = words.bandwidth, words.latency, large
        return compare(Asked(words.recipe, words.overrides, words.syncs, words.ranks, *of_link, out), world)

    return run


def define_scaling(parser: argparse.ArgumentParser) -> Run:
    add_recipe(parser, "settings on top of the recipe")
    parser.add_argument("--nodes", required=True, metavar="N,N,...", help="sizes to measure, like 1,2,4,8")
    parser.add_argument(
        "--kind", required=True, choices=["strong", "weak"],
        help="strong: the recipe's batch at every size; weak: it is that of the fewest nodes and grows with them",
    )  # fmt: skip
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="M", help="default: 1")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of each run; default: 60")
    parser.add_argument(
        "--predict", default="", metavar="N,N,...", help="nodes to be told of; default: twice to 8 times the most"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="page and runs (default: runs/scaling-RECIPE-KIND)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained; train and write nothing")
    here = parser.add_argument_group("on this machine")
    here.add_argument("--here", action="store_true", help="instead of Slurm jobs: in turn, --ranks-per-node a node")
    here.add_argument(
        "--bandwidth", default="", metavar="RATE|memory", help="of each rank's link: 1gbit; default: memory: no links"
    )
    slurm = parser.add_argument_group("as Slurm jobs")
    slurm.add_argument("--site", default="", metavar="NAME", help="a file of slurm/sites, or a path")
    slurm.add_argument("--time", default="", metavar="T", help="limit of each job: minutes, H:MM:SS, D-HH:MM:SS")
    slurm.add_argument("--partition", default="", metavar="P")
    slurm.add_argument("--account", default="", metavar="A")
    slurm.add_argument("--slurm", action="append", default=[], metavar="OPTION", help="one more of sbatch")
    slurm.add_argument("--wait", action="store_true", help="until all jobs have ended, and write the page")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.scaling import Asked, scaling
        from hvdtrain.commands.scaling.points import Series
        from hvdtrain.commands.scaling.running import MEMORY, Here, OnSlurm

        of_slurm = ("site", "time", "partition", "account", "slurm", "wait")
        if words.here and (found := [name for name in of_slurm if getattr(words, name)]):
            raise ConfigError(f"--{found[0]} is of Slurm jobs, --here of this machine")
        if words.bandwidth and not words.here:
            raise ConfigError("--bandwidth goes with --here")
        names = {name: getattr(words, name) for name in ("site", "time", "partition", "account", "wait")}
        where = Here(words.bandwidth or MEMORY) if words.here else OnSlurm(world, options=tuple(words.slurm), **names)
        nodes = numbers_in(words.nodes, "--nodes")
        series = Series(words.recipe, words.overrides, words.kind, nodes, words.ranks_per_node, words.steps)
        out = words.out or Path("runs") / f"scaling-{Path(words.recipe).stem}-{words.kind}"
        predict = numbers_in(words.predict, "--predict") if words.predict else []
        return scaling(Asked(series, where, out, predict), words.dry_run, world)

    return run


_OF_JOB = ("recipe", "run_dir", "data", "stage", "ranks_per_node", "max_clock_skew", "slow_factor", "json")


def define_doctor(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("--job", action="store_true", help="look at all nodes of this job (start it with the launcher)")
    of_job = parser.add_argument_group("with --job")
    of_job.add_argument("--run-dir", type=Path, metavar="DIR", help="can every node write there, and see the others?")
    of_job.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR", help="shards every node must see")
    of_job.add_argument("--stage", type=Path, metavar="DIR", help="on each node: is there room for the shards?")
    of_job.add_argument("--ranks-per-node", type=int, metavar="N", help="of the training; default: those started here")
    of_job.add_argument("--max-clock-skew", type=float, metavar="S", help="seconds; default: 1")
    of_job.add_argument(
        "--slow-factor", type=float, metavar="F",
        help="a node slower than the median by more is bad; default: HVDTRAIN_SLOW_FACTOR, or 2",
    )  # fmt: skip
    of_job.add_argument("--json", type=Path, metavar="FILE", help="what was found, for programs")
    of_job.add_argument(
        "recipe", nargs="*", metavar="RECIPE key=value", help="what it will train: its shards are --data"
    )

    def run(words: argparse.Namespace, world: World) -> int:
        if words.job:
            return _preflight(words, world)
        if found := [name for name in _OF_JOB if getattr(words, name)]:
            flag = "a recipe" if found[0] == "recipe" else f"--{found[0].replace('_', '-')}"
            raise ConfigError(f"{flag} goes with --job")
        from hvdtrain.jobs.doctor import doctor

        table, healthy = doctor()
        print(table)
        return EXIT_OK if healthy else EXIT_CRASH

    return run


def _preflight(words: argparse.Namespace, world: World) -> int:
    from hvdtrain.jobs.preflight import MAX_CLOCK_SKEW_S, Inspection, preflight, slow_factor_of

    data, stage = words.data, words.stage
    if words.recipe:
        from hvdtrain.config import load_config, run_folders
        from hvdtrain.data.corpora import folders_of

        recipe, *overrides = words.recipe
        options = load_config(recipe, overrides, run_folders(recipe, words.run_dir)).data
        data = data or folders_of(options)
        stage = stage or (Path(options.stage) if options.stage else None)
    inspection = Inspection(
        run_dir=words.run_dir,
        data=tuple(data),
        stage=stage,
        max_clock_skew_s=MAX_CLOCK_SKEW_S if words.max_clock_skew is None else words.max_clock_skew,
        slow_factor=slow_factor_of(os.environ) if words.slow_factor is None else words.slow_factor,
        ranks_per_node=words.ranks_per_node,
        json=words.json,
    )
    preflight(inspection, world)
    return EXIT_OK
