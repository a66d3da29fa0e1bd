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
        f"`{command}` on {machine()}; {', '.join(f'{k} {v}' for k, v in versions().items())}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        note,
        "",
    ]
    folder.mkdir(exist_ok=True)
    text = "\n".join(lines)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return text
