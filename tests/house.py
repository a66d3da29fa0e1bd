"""The house as it is: rooms by floors, and which imports which. ``python tests/house.py`` draws it.

It fails where an import goes up, or round in a circle.
"""

import ast
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up. A room imports what lies below it, never a neighbour on its own line.
TABLE = [
    {"errors", "options"},
    {"files", "strict_yaml"},
    {"version"},
    {"comm"},
    {"slices"},
    {"machine"},
    {"data", "models", "optim"},
    {"tasks"},
    {"cut", "sync"},
    {"checkpoint", "watch"},
    {"config", "engine"},
    {"sizing"},
    {"trained", "planner", "jobs"},
    {"opening"},
    {"building", "summary", "commands"},
    {"train"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(TABLE) for room in rooms}
# These learn nothing of ranks: a row's place, a model's layers and an update do not depend on who is there.
BOTTOM = {"errors", "options", "version", "files", "slices"}
ONLY_THE_BOTTOM = {"data", "models", "optim"}
TALKS_TO_RANKS = {"hvdtrain.comm", "hvdtrain.jobs.doctor", "hvdtrain.jobs.elastic"}
# The format and its checks, and ranks that share work: without torch and Horovod, which preparing text does not need.
DATA_PREP_MAY = {
    "hvdtrain.comm.ancestors",
    "hvdtrain.data.shards",
    "hvdtrain.data.check",
    "hvdtrain.data.cleaning",
    "hvdtrain.data.questions",
    "hvdtrain.data.compressed",
    "hvdtrain.machine.cores",
    "hvdtrain.comm.ranks",
    "hvdtrain.comm.session",
    "hvdtrain.comm.terminal",
    "hvdtrain.comm.world",
    "hvdtrain.errors",
    "hvdtrain.files",
    "hvdtrain.machine.malloc",
}


def sources() -> dict[str, str]:
    """Module name -> text, of both packages; a package goes by its own name."""
    paths = [path for package in ("hvdtrain", "data_prep") for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {names[path]: path.read_text(encoding="utf-8") for path in paths}


def imports_of(text: str, modules: set[str]) -> set[str]:
    """Every module that ``text`` imports, inside functions too; ``from package import name`` may mean a module."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a thing comes from"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(names & modules)
            if not names <= modules:
                found.add(node.module)
    return found


def why_not(module: str, imported: str) -> str | None:
    """What the table says against ``module`` importing ``imported``; None: nothing."""
    top = imported.partition(".")[0]
    if top in ("horovod", "mpi4py") or imported.startswith("torch.distributed"):
        allowed = any(module == room or module.startswith(f"{room}.") for room in TALKS_TO_RANKS)
        return None if allowed else "only comm/ talks to Horovod, MPI and torch.distributed"
    if module.partition(".")[0] == "data_prep":
        return None if top != "hvdtrain" or imported in DATA_PREP_MAY else f"data_prep may import {DATA_PREP_MAY}"
    if top == "data_prep":
        return "the training side knows shards, not how they were made"
    if top != "hvdtrain":
        return None
    room, target = (name.split(".")[1] if "." in name else "version" for name in (module, imported))
    if room == target:
        return None
    if room in ONLY_THE_BOTTOM and target not in BOTTOM:
        return f"{room} imports only {sorted(BOTTOM)}"
    return None if LEVEL[target] < LEVEL[room] else f"{target} is not below {room}"


def edges(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(module, module that it imports)."""
    return [(name, target) for name, text in texts.items() for target in imports_of(text, set(texts))]


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "version"


def wrong_imports(texts: Mapping[str, str]) -> list[str]:
    """What the table forbids, and circles of modules."""
    found = [f"{a} imports {b}: {why}" for a, b in edges(texts) if (why := why_not(a, b))]
    graph = {name: imports_of(text, set(texts)) & set(texts) for name, text in texts.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def drawing(texts: Mapping[str, str]) -> str:
    """Floors from the top down; of each room the rooms that it imports, and how often."""
    ours = {name: text for name, text in texts.items() if name.partition(".")[0] == "hvdtrain"}
    counts: dict[str, dict[str, int]] = {}
    for name, target in edges(ours):
        if target.partition(".")[0] == "hvdtrain" and room_of(name) != room_of(target):
            below = counts.setdefault(room_of(name), {})
            below[room_of(target)] = below.get(room_of(target), 0) + 1
    lines = []
    for floor in range(len(TABLE) - 1, -1, -1):
        for room in sorted(TABLE[floor]):
            below = sorted(counts.get(room, {}).items(), key=lambda item: (-LEVEL[item[0]], item[0]))
            lines.append(f"{floor:>2}  {room:<10}  -> {', '.join(f'{name} {n}' for name, n in below) or '-'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawing(sources()))
    if problems := wrong_imports(sources()):
        sys.exit("\n".join(problems))
    print("\nno arrow goes up, and none in a circle")
