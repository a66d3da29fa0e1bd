"""The commands. No logic: each reads its words and calls the module that does the work.

A command is one function here and a line in ``_COMMANDS``. The function adds what may follow the command's name, and
returns what runs then; that imports what it calls, so that the words of others load nothing heavy.
"""

import argparse
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hvdtrain.comm.ancestors import Launcher
from hvdtrain.comm.world import World
from hvdtrain.commands.arguments import (
    Parser,
    TrainHelp,
    add_choice,
    add_data,
    add_mesh,
    add_outlook,
    add_recipe,
    add_texts,
    check_outlook,
    given,
)
from hvdtrain.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED_EARLY, ConfigError
from hvdtrain.version import __version__

Run = Callable[[argparse.Namespace, World], int]  # returns the exit code; errors: HvdtrainError


def run(argv: Sequence[str], world: World) -> int:
    """Run one command; returns the exit code, raises HvdtrainError."""
    words = _parse(argv)
    if words.command != "train":  # which saves first
        Launcher(world).end_with_it()
    return words.run(words, world)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser()
    words, rest = parser.parse_known_args(argv)
    if rest and "overrides" not in words:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Options may stand between overrides; argparse alone would then take the later overrides for strangers.
    if strangers := [word for word in rest if word.startswith("-") or "=" not in word]:
        raise ConfigError(f"unknown argument {strangers[0]!r}; settings are given as key=value")
    if rest:
        words.overrides += rest
    return words


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hvdtrain", description="Train Transformers as batch jobs on one or many ranks.")
    parser.add_argument("--version", action="version", version=__version__)
    names = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        of_command = names.add_parser(name, help=command.help, conflict_handler="resolve")  # train has its own --help
        of_command.set_defaults(run=command.define(of_command))
    return parser


def works_on_ranks(argv: Sequence[str]) -> bool:
    """Does it matter to these words whether there are other ranks? Some only look, whoever started them."""
    first = argv[0] if argv else "--help"
    only_looks = first in _COMMANDS and _COMMANDS[first].only_looks
    return "--job" in argv or not (only_looks or first.startswith("-") or {"-h", "--help"} & set(argv))


# --- the commands ----------------------------------------------------------------------------------------------------


def _train(parser: argparse.ArgumentParser) -> Run:
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


def _evaluate(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    add_data(parser)
    parser.add_argument("--split", choices=["train", "val", "test"], help="default: val")
    parser.add_argument("--input", type=Path, metavar="FILE", help="instead of a split: texts to answer, one a line")
    parser.add_argument(
        "--reference", type=Path, nargs="+", default=[], metavar="FILE",
        help="with --input: what they are compared with, line by line; several files: several references, where a "
        "further one is empty there is none",
    )  # fmt: skip
    parser.add_argument(
        "--scores", default="", metavar="NAMES", help="of texts: bleu, bleu_tokenized, chrf, rouge; of files default: "
        "'bleu chrf rouge', of a split what the recipe asks",
    )  # fmt: skip
    parser.add_argument(
        "--reference-field", default="target", metavar="NAME",
        help="of JSON lines: a text, or a list of them; default: target",
    )  # fmt: skip
    add_texts(parser)
    add_choice(parser)
    add_mesh(parser)

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.evaluate import Files, TextOptions, evaluate, evaluate_files
        from hvdtrain.trained import parse_mesh

        if bool(words.input) != bool(words.reference):
            raise ConfigError("--input and --reference go together: the texts, and what they are compared with")
        if words.input and (words.split or words.data):
            raise ConfigError("--input is instead of --split and --data")
        texts = TextOptions(words.scores, given(words))
        rest = world, words.weights, words.checkpoint, texts, parse_mesh(words.mesh)
        if words.input:
            names = words.field, words.reference_field, words.too_long, words.invalid_utf8
            files = Files(words.input, words.reference, *names)
            scores = evaluate_files(words.run_dir, files, *rest)
        else:
            scores = evaluate(words.run_dir, words.data, words.split or "val", *rest)
        if world.is_main:
            print(json.dumps(scores))
        return EXIT_OK

    return run


def _generate(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--prompt", metavar="TEXT", help="one text to answer: to go on with, to translate, to label")
    parser.add_argument("--input", type=Path, metavar="FILE", help="texts to answer, one a line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="with --input: an answer a line, in its order")
    parser.add_argument(
        "--split", choices=["train", "val", "test"],
        help="instead of --input: questions with ids; --output gets {id: answer}, as SQuAD's official script reads it",
    )  # fmt: skip
    parser.add_argument(
        "--na-probs", type=Path, metavar="FILE",
        help="with --split: {id: probability that there is no answer} (SQuAD 2.0: --na-prob-thresh 0.5); --output then "
        "has the best text of each",
    )  # fmt: skip
    add_data(parser)
    parser.add_argument(
        "--json", action="store_true", help='a JSON object a line: {"answers": [{"text": ..., "score": ...}, ...]}'
    )
    add_texts(parser)
    add_choice(parser)
    add_mesh(parser)

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.generate import Lines, generate, generate_file
        from hvdtrain.trained import parse_mesh

        if words.split:
            return _predict(words, world)
        if (words.prompt is None) == (words.input is None) or bool(words.input) != bool(words.output):
            raise ConfigError(
                "generate takes --prompt TEXT, or --input FILE and --output FILE, or --split and --output"
            )
        if words.na_probs or words.data:
            raise ConfigError("--na-probs and --data go with --split")
        choice, mesh = (given(words), world, words.weights, words.checkpoint), parse_mesh(words.mesh)
        if words.input:
            how = words.field, words.json, words.too_long, words.invalid_utf8
            generate_file(words.run_dir, Lines(words.input, words.output, *how), *choice, mesh)
            return EXIT_OK
        if words.too_long == "drop":
            raise ConfigError("--too-long drop is for lines of a file; a prompt is truncated or refused")
        line = generate(words.run_dir, words.prompt, *choice, words.json, words.too_long, mesh)
        if world.is_main:
            print(line)
        return EXIT_OK

    return run


def _predict(words: argparse.Namespace, world: World) -> int:
    from hvdtrain.commands.predictions import Split, predict_split
    from hvdtrain.trained import parse_mesh

    if not words.output or words.input or words.prompt is not None:
        raise ConfigError("--split and --output FILE go together, without --input and --prompt")
    if words.json or given(words):
        raise ConfigError("--split gives the best answer to each question: --json and a search are for --input")
    split = Split(words.split, words.output, words.na_probs, words.data)
    predict_split(words.run_dir, split, world, words.weights, words.checkpoint, parse_mesh(words.mesh))
    return EXIT_OK


def _average(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--last", type=int, required=True, metavar="K", help="how many whole checkpoints")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new run folder (default: RUN_DIR/average-K)")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.average import average

        print(average(words.run_dir, words.last, words.out, world))
        return EXIT_OK

    return run


def _export(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or an empty one")
    parser.add_argument(
        "--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the tensors; default: fp32"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="of a run with model.lora: its adapters alone, as peft loads them"
    )
    add_choice(parser)

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.export import export

        print(export(words.run_dir, words.out, world, words.weights, words.checkpoint, words.dtype, words.adapter))
        return EXIT_OK

    return run


def _plan(parser: argparse.ArgumentParser) -> Run:
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
            print(plan_fastest(words.recipe, words.overrides, *place, words.json, words.run_dir))
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


def _sweep(parser: argparse.ArgumentParser) -> Run:
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


def _submit(parser: argparse.ArgumentParser) -> Run:
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


def _status(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="for programs")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.jobs.status import status

        print(status(words.run_dirs, words.json))
        return EXIT_OK

    return run


def _report(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: loss.png in the first run folder")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.report import report

        print(report(words.run_dirs, words.out))
        return EXIT_OK

    return run


def _compare(parser: argparse.ArgumentParser) -> Run:
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


_OF_JOB = ("recipe", "run_dir", "data", "stage", "ranks_per_node", "max_clock_skew", "slow_factor", "json")


def _doctor(parser: argparse.ArgumentParser) -> Run:
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


class _Command(NamedTuple):
    """``define`` adds the command's words to its parser and returns what runs it."""

    help: str
    define: Callable[[argparse.ArgumentParser], Run]
    only_looks: bool = False  # at what is there: it answers wherever it is started, by any launcher


_COMMANDS = {
    "train": _Command("train a recipe, or go on with it", _train),
    "evaluate": _Command("scores of a trained run on a whole split", _evaluate),
    "generate": _Command("text from a trained run", _generate),
    "average": _Command("one checkpoint with the mean weights of a run's newest ones", _average),
    "export": _Command("a trained run as a folder that Hugging Face's transformers loads", _export),
    "plan": _Command("what a recipe will need on a number of ranks: batch, steps, memory", _plan, only_looks=True),
    "sweep": _Command("train a recipe at several settings, in turn or as a Slurm array", _sweep),
    "submit": _Command("train a recipe as a Slurm job", _submit),
    "status": _Command("where runs stand: state, step, loss, time left, restarts", _status, only_looks=True),
    "report": _Command("table and loss.png of one or several runs", _report, only_looks=True),
    "compare": _Command("train a recipe by several ways to agree, on links of a given speed", _compare),
    "doctor": _Command("what is installed, and a real two-rank all-reduce; or a job's nodes", _doctor, only_looks=True),
}
