"""The commands. No logic: each reads its words and calls the module that does the work.

A command is a function beside this (training, using, looking) and a line in ``_COMMANDS``. The function adds what may
follow the command's name, and returns what runs then; that imports what it calls, so that the words of others load
nothing heavy.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hvdtrain.cli import looking, training, using
from hvdtrain.comm.ancestors import Launcher
from hvdtrain.comm.world import World
from hvdtrain.commands.arguments import Parser, Run
from hvdtrain.errors import ConfigError
from hvdtrain.version import __version__


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


class _Command(NamedTuple):
    """``define`` adds the command's words to its parser and returns what runs it."""

    help: str
    define: Callable[[argparse.ArgumentParser], Run]
    only_looks: bool = False  # at what is there: it answers wherever it is started, by any launcher


_COMMANDS = {
    "train": _Command("train a recipe, or go on with it", training.define_train),
    "evaluate": _Command("scores of a trained run on a whole split", using.define_evaluate),
    "generate": _Command("text from a trained run", using.define_generate),
    "average": _Command("one checkpoint with the mean weights of a run's newest ones", using.define_average),
    "export": _Command("a trained run as a folder that Hugging Face's transformers loads", using.define_export),
    "plan": _Command(
        "what a recipe will need on a number of ranks: batch, steps, memory", training.define_plan, only_looks=True
    ),
    "sweep": _Command("train a recipe at several settings, in turn or as a Slurm array", training.define_sweep),
    "submit": _Command("train a recipe as a Slurm job", training.define_submit),
    "status": _Command(
        "where runs stand: state, step, loss, time left, restarts", looking.define_status, only_looks=True
    ),
    "report": _Command("table and loss.png of one or several runs", looking.define_report, only_looks=True),
    "compare": _Command("train a recipe by several ways to agree, on links of a given speed", looking.define_compare),
    "scaling": _Command(
        "measure a recipe on several numbers of nodes: table, picture, prediction", looking.define_scaling
    ),
    "doctor": _Command(
        "what is installed, and a real two-rank all-reduce; or a job's nodes", looking.define_doctor, only_looks=True
    ),
}
