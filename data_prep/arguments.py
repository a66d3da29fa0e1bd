"""The command line of data preparation."""

import argparse
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from data_prep.formats import describe
from hvdtrain.errors import ConfigError

KINDS = ("bpe", "unigram", "char", "byte", "wordpiece")
ROLES = ("pad", "bos", "unk", "mask", "sep", "cls")
ALL_ROLES = ("eos", *ROLES)

_WHAT_ROLES_ARE = {
    "eos": "ends a document",
    "pad": "fills up",
    "bos": "begins a target; and a text with a label, where there is no cls",
    "unk": "stands for what the vocabulary lacks",
    "mask": "hides a token",
    "sep": "ends a text with a label",
    "cls": "begins a text with a label",
}


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="data_prep",
        description="Turn text into token shards. Under `mpirun -np N` the work is shared; the shards are the same.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    parents = {"source": _source(), "cleaning": _cleaning(), "shards": _shards()}
    _add_tokenizer(commands, [parents["source"], parents["cleaning"]])
    _add_text(commands, list(parents.values()))
    _add_pairs(commands, [parents["cleaning"], parents["shards"]])
    _add_labels(commands, list(parents.values()))
    verify = commands.add_parser("verify", help="check every digest, offset and token of a folder of shards")
    verify.add_argument("folder", type=Path, metavar="DIR")
    return parser


_FOLDERS = """
A folder is searched for these endings at any depth. --glob names others instead, by name ('*.md') or by the end of the
path ('news/**/*.txt'); there case counts. Inputs are read in the order given, the files of a folder in the order of
their names. Links to files and folders are followed, and a file of several names is read once. Left out, counted and
named are: files of other endings; hidden ones, whose names begin with a dot (name them to --input, or begin a --glob
with a dot); links that lead nowhere; pipes and devices; and what this program wrote (shards, tokenizers, runs). A pipe
as --input is refused, for input is read more than once, and by every rank: write it to a file first."""

_LINES = """
Only \\n ends a line, alone or after \\r. A byte order mark at the beginning of a file is taken off and counted. Of a
JSON object the field must be text; UTF-16, and lines that end with \\r alone, are refused with the command that
converts them. What is bad is refused with file and place, or left out and counted with --skip-bad; but not what leaves
open where the next item begins: a quote that never closes, an array that is no JSON."""

_TABLES = """
A row has as many cells as the header line (or --columns) has names; one with more or fewer is bad. So is a label that
is empty or, in JSON, neither text nor a whole number. A file with quotes is read from its start, by one rank."""

_LABELS = """
With --multi-label , the cell 4,27 says two labels. --label-names numbers the labels from 0, in the file's order.
A label of which chance would give every text to validation keeps one in training, counted. One that only --val-input or
--test-input has is refused, or with --skip-bad its texts are left out."""

_SQUAD = """
Of SQuAD's questions the answer stands where the file says. Where it does not, it is looked for by its exact text, the
nearest first, and counted; one that is not in its paragraph is bad, as is a question without answers outside of
--test-input. A long paragraph becomes several windows; answers that fit none are counted, their questions then have
none."""

_ALIGNED = """
--source and --target are plain text, a line each; of a folder all files are read, whatever their endings, in the order
of their names."""

_SAMPLED = """
Where the input is larger than --sample-mb, places are drawn from all of it; of a compressed file from its first part,
four times as long as what is taken of it."""

_COMPRESSED = """
A compressed file is read from its start, by one rank, and makes as many shards as it takes. Memory does not grow with
what it holds; only a .zst may ask for a window of up to 2 GiB (zstd --long=31), which is memory then."""


def _add_tokenizer(commands, parents: list[argparse.ArgumentParser]) -> None:
    tokenizer = commands.add_parser("tokenizer", parents=parents, help="train a tokenizer", **_formats("tokenizer"))
    tokenizer.add_argument(
        "--kind",
        choices=KINDS,
        default="bpe",
        help="default: bpe (byte-level); byte needs no training; wordpiece: BERT's",
    )
    tokenizer.add_argument(
        "--vocab-size",
        type=_positive,
        default=32768,
        metavar="N",
        help="tokens (bpe, unigram, wordpiece; default: 32768)",
    )
    tokenizer.add_argument("--lower-case", action="store_true", help="wordpiece: small letters only")
    tokenizer.add_argument("--strip-accents", action="store_true", help="wordpiece: letters without their accents")
    tokenizer.add_argument(
        "--special",
        nargs="+",
        choices=ROLES,
        default=[],
        metavar="ROLE",
        help=f"more special tokens: {' '.join(ROLES)}",
    )
    tokenizer.add_argument(
        "--sample-mb", type=_positive, default=1024, metavar="N", help="of text to train on, at most (default: 1024)"
    )
    tokenizer.add_argument("--seed", type=_count, default=1, metavar="N", help="draws the sample (default: 1)")
    tokenizer.add_argument("--report", action="store_true", help="print coverage, bytes a token and token frequencies")
    tokenizer.add_argument("--out", type=Path, required=True, metavar="FILE", help="tokenizer.json to write")


def _add_text(commands, parents: list[argparse.ArgumentParser]) -> None:
    text = commands.add_parser(
        "text", parents=parents, help="plain text or JSON, for language models", **_formats("text")
    )
    text.add_argument(
        "--documents",
        choices=["file", "line", "blank-line"],
        default="file",
        help="one document a file (default), a line, or between blank lines",
    )
    text.add_argument("--val-split", choices=["hash", "tail"], default="hash", help="tail: the last bytes instead")
    _more_splits(text)
    _limits(text, "documents", most=0)


def _add_pairs(commands, parents: list[argparse.ArgumentParser]) -> None:
    pairs = commands.add_parser(
        "pairs", parents=parents, help="two aligned texts, for translation and summarisation", **_formats("pairs")
    )
    for split in ("", "val-", "test-"):
        what = f" ({split[:-1]} split)" if split else ""
        for side in ("source", "target"):
            pairs.add_argument(
                f"--{split}{side}", type=Path, nargs="+", default=[], metavar="F", help=f"one {side} a line{what}"
            )
        pairs.add_argument(
            f"--{split}input", type=Path, nargs="+", default=[], metavar="F", help=f"instead: tables or JSON{what}"
        )
    _folders(pairs)
    pairs.add_argument("--source-field", default="source", metavar="NAME", help="default: source")
    pairs.add_argument("--target-field", default="target", metavar="NAME", help="default: target")
    _columns(pairs)
    _limits(pairs, "pairs with a side", most=1024)


def _add_labels(commands, parents: list[argparse.ArgumentParser]) -> None:
    labels = commands.add_parser(
        "labels",
        parents=parents,
        help="tables or JSON with labels, for classification; SQuAD's JSON for questions",
        **_formats("labels"),
    )
    labels.add_argument("--label-field", default="label", metavar="NAME", help="default: label")
    labels.add_argument(
        "--multi-label", type=_separator, metavar="SEP", help="a text may have several labels, with this between them"
    )
    labels.add_argument(
        "--label-names", type=Path, metavar="FILE", help="names of all labels, one a line; a label may be its number"
    )
    labels.add_argument("--second-field", metavar="NAME", help="a second text, for sentence pairs")
    _columns(labels)
    _more_splits(labels)
    labels.add_argument(
        "--max-tokens", type=_count, metavar="N", help="longer texts lose their end (default: 512; SQuAD: 384 a window)"
    )
    labels.add_argument(
        "--stride", type=_positive, default=128, metavar="N", help="SQuAD: tokens from window to window (default: 128)"
    )
    labels.add_argument(
        "--question-tokens", type=_positive, default=64, metavar="N", help="SQuAD: of a question, at most (default: 64)"
    )


def _source() -> argparse.ArgumentParser:
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders")
    _folders(source)
    source.add_argument("--field", default="text", metavar="NAME", help="of JSON objects: the text (default: text)")
    return source


def _folders(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--glob", nargs="+", default=[], metavar="PATTERN", help="which files of a folder (default: by ending, below)"
    )
    command.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="files or folders to leave out, by name"
    )


def _cleaning() -> argparse.ArgumentParser:
    cleaning = argparse.ArgumentParser(add_help=False)
    cleaning.add_argument(
        "--invalid-utf8",
        choices=["refuse", "replace"],
        default="refuse",
        help="bytes that are not UTF-8, or zero: refuse them (default), or put U+FFFD in their place, counted",
    )
    cleaning.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out lines, rows or documents that cannot be used, counted and the first named (default: refuse)",
    )
    cleaning.add_argument(
        "--normalise",
        choices=["none", "nfc"],
        default="none",
        help="Unicode normalisation; default: every byte is kept",
    )
    return cleaning


def _shards() -> argparse.ArgumentParser:
    shards = argparse.ArgumentParser(add_help=False)
    shards.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.json to use")
    shards.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    shards.add_argument(
        "--val-fraction",
        type=_fraction,
        metavar="F",
        help="of the documents, for validation, chosen by a digest of each (default: 0.01, or 0 with validation input)",
    )
    shards.add_argument(
        "--shard-tokens", type=_positive, default=1 << 25, metavar="N", help="about so many a shard; default: 2**25"
    )
    shards.add_argument("--deduplicate", action="store_true", help="keep only the first of equal documents")
    _roles(shards)
    return shards


def _roles(shards: argparse.ArgumentParser) -> None:
    group = shards.add_argument_group(
        "tokens of the tokenizer",
        "Default: what the files of its folder say, then it itself, then known names of tokens marked special. "
        "Of several ends that of a document counts, not that of a turn; where it is not clear, --eos must be given.",
    )
    for role in ALL_ROLES:
        group.add_argument(f"--{role}", metavar="NAME", help=_WHAT_ROLES_ARE[role])


def _more_splits(command: argparse.ArgumentParser) -> None:
    for split, name in (("val", "validation"), ("test", "test")):
        command.add_argument(
            f"--{split}-input",
            type=Path,
            nargs="+",
            default=[],
            metavar="PATH",
            help=f"all of it is for the {name} split",
        )


def _columns(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of a table's columns, all of them, where it has no header line",
    )
    command.add_argument(
        "--quoted",
        action="store_true",
        help="cells of .tsv files may be in quotes, as those of .csv are: tabs and line ends within are text",
    )


def _limits(command: argparse.ArgumentParser, what: str, most: int) -> None:
    command.add_argument(
        "--min-tokens", type=_count, default=0, metavar="N", help=f"leave out {what} shorter than this"
    )
    default = f"default: {most}" if most else "default: 0, no limit"
    command.add_argument(
        "--max-tokens", type=_count, default=most, metavar="N", help=f"leave out {what} longer than this ({default})"
    )


def _formats(command: str) -> dict[str, Any]:
    """What ``--help`` says of files: which are read, and how."""
    tables = {"pairs": [_TABLES, _ALIGNED], "labels": [_TABLES, _LABELS, _SQUAD]}
    more = tables.get(command, [_SAMPLED] if command == "tokenizer" else [])
    table = f"How files are read, by their endings:\n{describe(command)}"
    return {"epilog": "\n".join([table, _LINES, *more, _FOLDERS, _COMPRESSED]), "formatter_class": _Help}


class _Help(argparse.HelpFormatter):
    """Paragraphs are filled, but those with indented lines are left as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(part if "\n  " in part else textwrap.fill(part, width) for part in paragraphs)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")


def _separator(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


# argparse shows these
_fraction.__name__, _positive.__name__, _count.__name__ = "fraction (0 to below 1)", "positive number", "number"
_separator.__name__ = "separator"
