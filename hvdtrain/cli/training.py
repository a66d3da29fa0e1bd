"""The words of the commands that train, or prepare it: train, plan, sweep, submit."""

import argparse
import signal
from pathlib import Path

from hvdtrain.comm.ancestors import Launcher
from hvdtrain.comm.world import World
from hvdtrain.commands.arguments import Run, TrainHelp, add_outlook, add_recipe, check_outlook
from hvdtrain.errors import EXIT_OK, EXIT_STOPPED_EARLY


def define_train(parser: argparse.ArgumentParser) -> Run:
    add_recipe(parser, "settings on top of the recipe: optim.lr=3e-4")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run is kept (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|DIR",
        help="go on from the newest whole checkpoint in the run folder (auto, the default), "
        "refuse a folder that holds a run (never), or go on from another run (DIR)",
    )  # fmt: skip
    parser.add_argument(
        "--timeline", type=Path, metavar="FILE", help="record every all-reduce there, for chrome://tracing"
    )
    parser.add_argument(
        "--elastic", action="store_true", help="under horovodrun --host-discovery-script: go on when hosts come or go"
    )
    parser.add_argument("-h", "--help", action=TrainHelp)

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.watch.stopping import StopSignals

        if words.elastic:
            from hvdtrain.jobs import elastic, elastic_rank

            if not elastic_rank.in_round():
                return elastic.supervise(words.run_dir or Path("runs") / Path(words.recipe).stem, words.resume)
        asked = words.recipe, words.overrides, words.run_dir
        launcher = None if words.elastic else Launcher(world)  # elastic ranks end with their worker
        if launcher is not None:
            launcher.outlast()
        with StopSignals(launcher) as signals:
            from hvdtrain.train import train  # which loads torch, for seconds

            if words.elastic and (place := elastic_rank.enter(*asked, words.resume, world)) is None:
                return EXIT_OK  # one rank too many
            world = place if words.elastic else world
            result = train(*asked, words.resume, world, words.timeline, signals)
            if words.elastic and result["status"] == "stopped":
                elastic_rank.tell_stopped(result["reason"], signals.got(signal.SIGTERM))
            # The launcher ends the others as soon as the first has left; let each leave with its own exit code.
            for number in (signal.SIGTERM, signal.SIGUSR2) if world.size > 1 else ():
                signal.signal(number, signal.SIG_IGN)
        return EXIT_OK if result["status"] == "finished" else EXIT_STOPPED_EARLY

    return run


def define_plan(parser: argparse.ArgumentParser) -> Run:
    add_recipe(parser, "settings on top of the recipe")
    parser.add_argument("--ranks", type=int, required=True, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, default=0, metavar="M", help="default: all on one node")
    parser.add_argument("--vocab-size", type=int, default=0, metavar="V", help="of data that are not there yet")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="of a run that goes on (default: runs/RECIPE)")
    parser.add_argument(
        "--memory", default="", metavar="SIZE", help="of a rank, like 80GiB: propose meshes with which the model fits"
    )
    add_outlook(parser)
    parser.add_argument("--json", action="store_true", help="for programs")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.planner.estimate import plan

        check_outlook(words)
        if words.fit:
            from hvdtrain.planner.fastest import plan_fastest

            place = words.ranks, words.cluster, words.ranks_per_node, words.vocab_size
            print(plan_fastest(words.recipe, words.overrides, *place, words.json, words.run_dir, words.runs))
            return EXIT_OK
        if words.runs or words.cluster:
            from hvdtrain.planner.outlook import Asked, plan_time

            size = words.ranks, words.ranks_per_node, words.vocab_size, words.run_dir
            asked = Asked(words.recipe, words.overrides, *size, words.runs, words.cluster, words.simulate, words.link)
            print(plan_time(asked, words.json))
            return EXIT_OK
        if words.memory:
            from hvdtrain.planner.proposals import plan_meshes

            where = words.ranks, words.memory, words.ranks_per_node, words.vocab_size
            print(plan_meshes(words.recipe, words.overrides, *where, words.json, words.run_dir))
            return EXIT_OK
        ranks = words.ranks, words.ranks_per_node
        print(plan(words.recipe, words.overrides, *ranks, words.vocab_size, words.json, words.run_dir))
        return EXIT_OK

    return run


def define_sweep(parser: argparse.ArgumentParser) -> Run:
    add_recipe(parser, "settings of all runs")
    parser.add_argument(
        "--vary", action="append", required=True, metavar="KEY=V1,V2...",
        help="values that take turns; several: every combination, the first changes slowest",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a run folder in it for each combination"
    )
    parser.add_argument("--launcher", default="", metavar="WORDS", help='starts the ranks: "horovodrun -np 4"')
    parser.add_argument("--point", type=int, metavar="I", help="only the combination of this number, from 0")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.jobs.sweep import sweep

        return sweep(words.recipe, words.overrides, words.vary, words.out, words.launcher, words.point, world)

    return run


def define_submit(parser: argparse.ArgumentParser) -> Run:
    add_recipe(parser, "settings on top of the recipe")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, metavar="M", help="default: that of slurm/train.sbatch")
    parser.add_argument("--time", default="", metavar="T", help="limit: minutes, H:MM:SS, D-HH:MM:SS")
    parser.add_argument("--partition", default="", metavar="P")
    parser.add_argument("--account", default="", metavar="A")
    parser.add_argument("--site", default="", metavar="NAME", help="a file of slurm/sites, or a path")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run is kept (default: runs/RECIPE)")
    parser.add_argument("--chain", action="store_true", help="go on in new jobs, where requeueing is not wanted")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="OPTION", help="one more of sbatch: gpus-per-node=4, exclusive"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; submit and write nothing")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.jobs.slurm import make_job, submit

        names = ("ranks_per_node", "time", "partition", "account", "site", "chain")
        rest = {name: getattr(words, name) for name in names}
        job = make_job(words.recipe, words.overrides, words.run_dir, words.nodes, options=tuple(words.slurm), **rest)
        print(submit(job, words.dry_run, world))
        return EXIT_OK

    return run
