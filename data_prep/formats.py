"""Which ending is read how: the one table, which ``--help`` prints. Upper or lower case, plain or compressed."""

from collections.abc import Sequence

from data_prep.corpus import COMPRESSIONS, InputFile

TEXT = "plain text"
JSON_LINES = "JSON lines"
JSON = "JSON: lines, an array of objects, or one object"
SQUAD = "the same, or SQuAD's"
TSV = "cells between tabs"
CSV = "cells between commas, quoted"

# Ending -> command -> how it is read. A folder is searched for the endings that the command has here.
FORMATS = {
    ".txt": {"tokenizer": TEXT, "text": TEXT},
    ".jsonl": dict.fromkeys(("tokenizer", "text", "pairs", "labels"), JSON_LINES),
    ".ndjson": dict.fromkeys(("tokenizer", "text", "pairs", "labels"), JSON_LINES),
    ".json": {"tokenizer": JSON, "text": JSON, "pairs": JSON, "labels": SQUAD},
    ".tsv": {"pairs": TSV, "labels": TSV},
    ".csv": {"pairs": CSV, "labels": CSV},
}
# Any other file that is named itself or matched by --glob.
OTHERS = {"tokenizer": TEXT, "text": TEXT, "pairs": TSV, "labels": TSV}
COMMANDS = tuple(OTHERS)


def format_of(file: InputFile, command: str) -> str:
    """How ``command`` reads the file."""
    return FORMATS.get(file.suffix.lower(), {}).get(command) or OTHERS[command]


def endings_of(command: str) -> list[str]:
    """What a folder is searched for."""
    return [ending for ending, formats in FORMATS.items() if command in formats]


def describe(command: str) -> str:
    """The command's part of the table, for ``--help``."""
    rows = [(ending, FORMATS[ending][command]) for ending in endings_of(command)]
    return _table([*rows, ("others", f"{OTHERS[command]}, where they are named or match --glob")])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(ending) for ending, _ in rows)
    lines = [f"  {ending:<{width}}  {how}" for ending, how in rows]
    return "\n".join([*lines, f"  each also in upper case, and compressed: {', '.join(COMPRESSIONS)}"])
