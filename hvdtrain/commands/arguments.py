"""What may follow a command's name, where several commands share it: a recipe, a checkpoint, how texts are answered."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError

Run = Callable[[argparse.Namespace, World], int]  # returns the exit code; errors: HvdtrainError


class Parser(argparse.ArgumentParser):
    """Wrong words become a ConfigError, so that one rank speaks instead of all."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")


_HELP_INDENT = 62  # where the meaning of a recipe's key begins


class TrainHelp(argparse.Action):
    """``train --help`` shows every option of a recipe; the recipes' room is loaded only then."""

    def __init__(self, option_strings: Sequence[str], dest: str):
        super().__init__(option_strings, dest, nargs=0, help="show this and every key of a recipe")

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        from hvdtrain.config import describe_options, recipe_names
        from hvdtrain.models.presets import PRESETS

        parser.print_help()
        print(f"\nrecipes: {', '.join(recipe_names())}\n\nkeys of a recipe (type, default, meaning):")
        for row in describe_options():
            head = f"  {row.key:<27} {row.type:<22} {row.default:<8} "
            if len(head) > _HELP_INDENT:  # a long list of values has a line of its own
                print(head.rstrip())
                head = " " * _HELP_INDENT
            print(
                textwrap.fill(
                    row.meaning, 120, initial_indent=head, subsequent_indent=" " * _HELP_INDENT, break_on_hyphens=False
                )
            )
        print("\nmodel.preset (each stands under the keys that are given):")
        for name, keys in PRESETS.items():
            words = " ".join(f"{key}={str(value).lower()}" for key, value in keys.items())
            print(textwrap.fill(words, 120, initial_indent=f"  {name:<14} ", subsequent_indent=" " * 17))
        parser.exit()


def add_recipe(parser: argparse.ArgumentParser, settings: str) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name of a built-in recipe, or path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=settings)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, action="append", default=[], metavar="DIR",
        help="shards to take instead of the run's own, or where these are now; again for each folder of a mixture",
    )  # fmt: skip


def add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="newest", metavar="newest|best|STEP",
        help="the newest whole one (default), the best (checkpoint.keep_best), or that of a step",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=["raw", "ema"],
        help="of the last step (raw) or averaged in training (ema); default: ema where the checkpoint has it",
    )  # fmt: skip


# Of SearchOptions, which torch need not be loaded for.
_SEARCH: dict[str, tuple[type, str, str]] = {
    "beam": (int, "N", "hypotheses side by side"),
    "n_best": (int, "N", "hypotheses to give (--json)"),
    "length_penalty": (float, "P", "score: log p / tokens^P"),
    "early_stopping": (str, "no|yes|never", "when beams end before --max-tokens"),
    "no_repeat_ngram": (int, "N", "no N tokens follow one another twice"),
    "min_tokens": (int, "N", "no end before"),
    "max_tokens": (int, "N", "most tokens to add"),
    "forced_first": (int, "ID", "the first token added"),
    "forced_last": (int, "ID", "the last token, at --max-tokens"),
    "temperature": (float, "T", "0: the likeliest token; else drawn"),
    "top_k": (int, "K", "draw from so many; 0: from all tokens"),
    "top_p": (float, "P", "nucleus; 1: all tokens"),
    "seed": (int, "N", "of what is drawn"),
    "batch_tokens": (int, "N", "of inputs and hypotheses at once"),
}


def add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh", default="", metavar="tensor=N,pipeline=N",
        help="ranks over which the model is spread; default: on one rank whole, on several as it was trained",
    )  # fmt: skip


def add_texts(parser: argparse.ArgumentParser) -> None:
    """How texts are read and answered."""
    parser.add_argument("--field", default="", metavar="NAME", help="of JSON lines (.jsonl): the text to answer")
    parser.add_argument(
        "--too-long", default="refuse", choices=["refuse", "truncate", "drop"],
        help="texts with more tokens than model.context; default: refuse",
    )  # fmt: skip
    parser.add_argument(
        "--invalid-utf8",
        default="refuse",
        choices=["refuse", "replace"],
        help="bytes that are no text; default: refuse",
    )
    search = parser.add_argument_group("search", "default: as the run's recipe has it under its task's search")
    for name, (kind, metavar, meaning) in _SEARCH.items():
        search.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=meaning)


def given(words: argparse.Namespace) -> dict[str, object]:
    """What of the search stands on the command line."""
    return {name: value for name in _SEARCH if (value := getattr(words, name)) is not None}


def add_outlook(parser: argparse.ArgumentParser) -> None:
    """How long a step and the run will take."""
    group = parser.add_argument_group("time")
    group.add_argument(
        "--from", dest="runs", type=Path, nargs="+", action="extend", default=[], metavar="RUN",
        help="folders of short runs on a few nodes: predict the step on --ranks from them; with --fit: a rank's speed",
    )  # fmt: skip
    group.add_argument("--cluster", default="", metavar="NAME|FILE", help="predict the step from a cluster's figures")
    group.add_argument(
        "--fit", action="store_true", help="list the meshes that fit the cluster's memory, fastest first"
    )
    group.add_argument("--simulate", action="store_true", help="the whole run, with what fails and waits in between")
    group.add_argument(
        "--link", action="append", default=[], metavar="TIME=WAIT",
        help="of --simulate: wall time of a job and its median wait, like 24h=2h; again for each to be compared",
    )  # fmt: skip


def check_outlook(words: argparse.Namespace) -> None:
    """Errors: ConfigError for words of ``add_outlook`` that do not go together."""
    if swallowed := [str(word) for word in words.runs if "=" in str(word) and not word.exists()]:
        raise ConfigError(f"--from {swallowed[0]}: no such folder; settings stand before --from")
    if words.fit and not words.cluster:
        raise ConfigError("--fit needs --cluster: how much memory a rank has, and how fast it is")
    if words.simulate and not words.cluster:
        raise ConfigError("--simulate needs --cluster: how often ranks are lost, how fast checkpoints are written")
    if words.link and not words.simulate:
        raise ConfigError("--link is of --simulate")
    for one, other in (("fit", "simulate"), ("memory", "cluster"), ("memory", "runs")):
        if getattr(words, one) and getattr(words, other):
            name = "from" if other == "runs" else other
            raise ConfigError(f"--{one} and --{name} are two questions; ask one at a time")


def numbers_in(text: str, option: str) -> list[int]:
    """``1,2,4``. Errors: ConfigError."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} {text}: expected numbers above 0, like 1,2,4")
    return [int(part) for part in parts]
