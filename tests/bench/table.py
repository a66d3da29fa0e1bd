"""Markdown tables of measurements, with the machine and the versions that gave them."""

import os
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.machine.about import machine
from hvdtrain.version import versions

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))


def write(
    name: str,
    title: str,
    command: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str,
    folder: Path = RESULTS,
) -> str:
    """Write ``FOLDER/NAME.md`` and return its text."""
    lines = [
        f"# {title}",
        "",
        f"`{command}` on {_here()}",
        "",
        _line(head),
        "|" + " --- |" * len(head),
        *map(_line, rows),
        "",
        note,
        "",
    ]
    folder.mkdir(exist_ok=True)
    text = "\n".join(lines)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def kept(name: str, command: str, head: Sequence[str], folder: Path = RESULTS) -> list[list[str]]:
    """Rows of ``FOLDER/NAME.md``, if they are of this machine, these versions and this head: parts of a table may be
    measured one by one.
    """
    path = folder / f"{name}.md"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if f"`{command}` on {_here()}" not in lines or _line(head) not in lines:
        return []
    return [line[2:-2].split(" | ") for line in lines[lines.index(_line(head)) + 2 :] if line.startswith("| ")]


def _here() -> str:
    return f"{machine()}; {', '.join(f'{k} {v}' for k, v in versions().items())}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
