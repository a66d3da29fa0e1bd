"""Markdown tables of measurements, with the machine and the versions that gave them."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.version import versions

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))


def machine() -> str:
    """Processor, usable cores and memory of this machine, in one line."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB, {platform.system()}"


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
