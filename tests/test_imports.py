"""Imports go only downwards: the table of the house (tests/house.py), held against the source by reading it."""

import subprocess
import sys

import pytest
from house import LEVEL, ROOT, drawing, imports_of, sources, why_not, wrong_imports


def test_every_room_has_its_place_in_the_table():
    rooms = {name.split(".")[1] for name in sources() if name.startswith("hvdtrain.")}
    assert rooms == set(LEVEL)


def test_no_import_goes_up_or_round_in_a_circle():
    assert wrong_imports(sources()) == []


def test_the_drawing_shows_every_room():
    lines = drawing(sources()).splitlines()
    assert {line.split()[1] for line in lines} == set(LEVEL)
    (of_cut,) = [line for line in lines if line.split()[1] == "cut"]
    assert "tasks" in of_cut and "sync" not in of_cut


def test_a_circle_is_found():
    texts = {"hvdtrain.files": "import hvdtrain.errors", "hvdtrain.errors": "import hvdtrain.files"}
    assert len(wrong_imports(texts)) == 2  # the circle, and the half of it that goes up


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
