"""How each file is read: the one table of endings, which ``--help`` prints. For .json the content decides."""

import re
from collections.abc import Sequence

from pydantic_core import from_json

from data_prep.corpus import COMPRESSIONS, InputFile, ending_of
from hvdtrain.errors import ConfigError

TEXT = "plain text"
JSON_LINES = "JSON lines"
JSON_ARRAY = "an array of JSON objects"
JSON_OBJECT = "one JSON object"
SQUAD = "SQuAD"
TSV = "cells between tabs"
QUOTED_TSV = "cells between tabs, quoted"
CSV = "cells between commas, quoted"
_JSON = "JSON: objects a line each, an array of objects, or one object"
_JSON_OR_SQUAD = "JSON: as SQuAD has it, or objects a line each, an array of objects, or one object"

# What ends an item there may also stand within it: such a file cannot be cut, it is read from its start.
FROM_START = (JSON_ARRAY, JSON_OBJECT, QUOTED_TSV, CSV)

# Ending -> command -> how it is read. A folder is searched for the endings that the command has here.
FORMATS = {
    ".txt": {"tokenizer": TEXT, "text": TEXT},
    ".jsonl": dict.fromkeys(("tokenizer", "text", "pairs", "labels"), JSON_LINES),
    ".ndjson": dict.fromkeys(("tokenizer", "text", "pairs", "labels"), JSON_LINES),
    ".json": {"tokenizer": _JSON, "text": _JSON, "pairs": _JSON, "labels": _JSON_OR_SQUAD},
    ".tsv": {"pairs": TSV, "labels": TSV},
    ".csv": {"pairs": CSV, "labels": CSV},
}
# Any other file that is named itself or matched by --glob.
OTHERS = {"tokenizer": TEXT, "text": TEXT, "pairs": TSV, "labels": TSV}

_HEAD_BYTES = 1 << 16  # of a .json, that it is known by
# {"version": "1.1", "data": [{
_SQUAD = re.compile(rb'\{\s*(?:"(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[\w.+-]+)\s*,\s*)*"data"\s*:\s*\[\s*[{\]]')


def describe(command: str) -> str:
    """The command's part of the table, for ``--help``."""
    rows = [(ending, FORMATS[ending][command]) for ending in endings_of(command)]
    rows.append(("others", f"{OTHERS[command]}, where they are named or match --glob"))
    lines = [f"  {ending:<7} {how}" for ending, how in rows]
    return "\n".join([*lines, f"  each also in upper case, and compressed: {' '.join(COMPRESSIONS)}"])


def endings_of(command: str) -> list[str]:
    """What a folder is searched for."""
    return [ending for ending, formats in FORMATS.items() if command in formats]


def resolve(files: Sequence[InputFile], command: str, quoted: bool = False) -> list[InputFile]:
    """The files, each with ``how`` it is read. quoted: cells between tabs may be in quotes.

    Errors: DataError where a .json cannot be read.
    """
    by_ending = {}
    return [file if file.how else file.read_as(*_how(file, command, quoted, by_ending)) for file in files]


def _how(file: InputFile, command: str, quoted: bool, by_ending: dict[str, tuple[str, bool]]) -> tuple[str, bool]:
    """How a file is read, and whether only from its start. by_ending: what is known of endings already, because a
    corpus may be a million files. A .json is looked into.
    """
    ending = ending_of(file.name)
    if known := by_ending.get(ending):
        return known
    how = FORMATS.get(file.suffix, {}).get(command) or OTHERS[command]
    if how in (_JSON, _JSON_OR_SQUAD):
        how = _json_shape(_head(file), how == _JSON_OR_SQUAD)
        return how, how in FROM_START
    if how == TSV and quoted:
        how = QUOTED_TSV
    if not file.compression:
        by_ending[ending] = how, how in FROM_START
    return how, how in FROM_START


def _head(file: InputFile) -> bytes:
    with file.open() as handle:
        return file.read(handle, _HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()


def _json_shape(head: bytes, may_be_squad: bool) -> str:
    if may_be_squad and _SQUAD.match(head):
        return SQUAD
    if head.startswith(b"["):
        return JSON_ARRAY
    line, newline, rest = head.partition(b"\n")
    if line.startswith(b"{") and newline and rest.strip():
        try:
            from_json(line)
        except ValueError as error:
            return JSON_OBJECT if str(error).startswith("EOF") else JSON_LINES  # goes on in the next line?
    return JSON_LINES


def check_plain(files: Sequence[InputFile]) -> None:
    """Errors: ConfigError where a file that is to be read line by line has the ending of a table or of JSON."""
    tables = endings_of("pairs")
    for file in files:
        if file.suffix in tables:
            raise ConfigError(
                f"--source and --target are plain text line by line; {file.path} is no such file by its ending: "
                "give it with --input if it holds both sides, or rename it"
            )


def notes(files: Sequence[InputFile]) -> list[str]:
    """What the user should know of files whose ending does not say how they are read, or says something else."""
    tables, found = endings_of("labels"), dict[tuple[str, str], list[InputFile]]()
    for file in files:
        ending = file.suffix
        if ending == ".json" or (file.how == TEXT and ending in tables):
            found.setdefault((ending, file.how), []).append(file)
    return [
        f"{some[0].path}{f' and {len(some) - 1:,} more {ending} files' * (len(some) > 1)}: read as {how}"
        f"{', all columns of it' * (how == TEXT)}"
        for (ending, how), some in found.items()
    ]
