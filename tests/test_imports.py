"""Imports go only downwards: DESIGN.md's table, held against the source by reading it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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
    {"summary", "commands"},
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
    if top in ("horovod", "mpi4py"):
        allowed = any(module == room or module.startswith(f"{room}.") for room in TALKS_TO_RANKS)
        return None if allowed else "only comm/ talks to Horovod and MPI"
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


def test_every_room_has_its_place_in_the_table():
    rooms = {name.split(".")[1] for name in sources() if name.startswith("hvdtrain.")}
    assert rooms == set(LEVEL)


def test_imports_go_only_downwards():
    texts = sources()
    edges = [(name, target) for name, text in texts.items() for target in imports_of(text, set(texts))]
    assert [f"{a} imports {b}: {why}" for a, b in edges if (why := why_not(a, b))] == []


def test_there_is_no_cycle():
    texts = sources()
    graph = {name: imports_of(text, set(texts)) & set(texts) for name, text in texts.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(texts)  # or CycleError


@pytest.mark.parametrize(
    ("module", "line", "is_wrong"),
    [
        ("hvdtrain.models.decoder", "from hvdtrain.data.batch import IGNORE", True),
        ("hvdtrain.data.loader", "import hvdtrain.comm.world", True),
        ("hvdtrain.optim.lamb", "from hvdtrain.options import Options", False),
        ("hvdtrain.comm.world", "from hvdtrain import checkpoint", True),
        ("hvdtrain.train", "from hvdtrain import checkpoint", False),
        ("hvdtrain.train", "def f():\n    from hvdtrain.cli import run", True),
        ("hvdtrain.commands.evaluate", "from hvdtrain.train import train", True),
        ("hvdtrain.watch.metrics", "from hvdtrain.checkpoint.writer import save", True),
        ("hvdtrain.data.shards", "import data_prep", True),
        ("hvdtrain.engine", "import horovod.torch as hvd", True),
        ("hvdtrain.comm.mpi_group", "from mpi4py import MPI", False),
        ("data_prep.text", "from mpi4py import MPI", True),
        ("data_prep.text", "from hvdtrain.data import shards", False),
        ("data_prep.text", "from hvdtrain.data import sampler", True),
    ],
)
def test_the_check_finds(module: str, line: str, is_wrong: bool):
    known = {*sources(), module}
    assert any(why_not(module, target) for target in imports_of(line, known)) == is_wrong


def test_preparing_text_alone_needs_neither_torch_nor_mpi():
    code = (
        "import sys; from data_prep import __main__, aligned, labels, pairs, prepare, questions, text, verify; "
        "from hvdtrain.comm.session import open_ranks; from hvdtrain.comm.world import World\n"
        "with open_ranks(World()): print(*{'torch', 'horovod', 'mpi4py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_command_line_loads_nothing_heavy():
    """4096 ranks that read torch, Horovod and HDF5 only to print a usage message would hurt the file system."""
    code = "import sys, hvdtrain.cli; print(*{'torch', 'horovod', 'h5py', 'mpi4py', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
