"""What a command puts into its environment for libraries is there when the library is loaded: seen from inside the
processes that users start, because a setter that nobody calls passes every test of its own.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from launch import DATA_PREP, HVDTRAIN, Prepared, succeed

from hvdtrain.comm.horovod_group import KNOBS
from hvdtrain.machine.cores import LIBRARY_THREADS

ONEDNN_CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
OPEN_MPI = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_coll_tuned_use_dynamic_rules": "1"}
OPEN_MPI["OMPI_MCA_btl_tcp_flags"] = "send,inplace,need-ack,need-csum,hetero-rdma"
if Path(sys.prefix, "bin", "orterun_wrapper").exists():  # from the package index
    OPEN_MPI |= {"OPAL_PREFIX": sys.prefix, "OMPI_MCA_btl": "^ofi"}
SET_HERE = {**LIBRARY_THREADS, **KNOBS, **ONEDNN_CACHES, **OPEN_MPI, "RAYON_NUM_THREADS": ""}
ELSEWHERE = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")  # what the first of them depend on

# Python runs a module of this name first. It notes the environment where a library is first asked for, and at the end.
_WATCHER = """
import atexit, importlib.abc, json, os, sys

class Watch(importlib.abc.MetaPathFinder):
    unseen = {"numpy", "torch", "tokenizers", "horovod", "mpi4py.MPI"}

    def find_spec(self, name, path=None, target=None):
        if name in self.unseen:
            self.unseen.discard(name)
            note(name)

def note(when):
    with open(os.environ["SEEN"] + f"/{os.getpid()}", "a") as file:
        print(json.dumps([when, dict(os.environ)]), file=file)

sys.meta_path.insert(0, Watch())
atexit.register(note, "the end")
"""


def seen(folder: Path, *words: Any, program: tuple[Any, ...], **how: Any) -> list[dict[str, dict[str, str]]]:
    """Of each process of a command that must succeed: the environment at the moments that the watcher noted.

    The names below are unset in front of the program itself, where a launcher has had its say.
    """
    (folder / "seen").mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(_WATCHER)
    unset = ("env", *(f"--unset={name}" for name in (*SET_HERE, *ELSEWHERE)), *how.pop("given", ()))
    watched = {"PYTHONPATH": str(folder), "SEEN": str(folder / "seen")}
    succeed(*words, program=(*unset, *program), env=watched, **how)
    notes = [[json.loads(line) for line in path.read_text().splitlines()] for path in (folder / "seen").iterdir()]
    return [dict(of_process) for of_process in notes]


def test_training_alone(prepared: Prepared, tmp_path: Path):
    words = ("train", prepared.recipe, "train.steps=2", "--run-dir", tmp_path / "run")
    (found,) = seen(tmp_path / "watch", *words, program=HVDTRAIN)
    for moment in ("torch", "numpy"):
        assert found[moment].items() >= LIBRARY_THREADS.items(), moment
    assert found["the end"].items() >= ONEDNN_CACHES.items()
    assert "mpi4py.MPI" not in found


def test_training_on_two_ranks(prepared: Prepared, tmp_path: Path):
    words = ("train", prepared.recipe, "train.steps=2", "--run-dir", tmp_path / "run")
    ranks = seen(tmp_path / "watch", *words, program=HVDTRAIN, how="mpirun", ranks=2)
    assert len(ranks) == 2
    for found in ranks:
        assert found["torch"].items() >= LIBRARY_THREADS.items()
        assert found["mpi4py.MPI"].items() >= OPEN_MPI.items()
        assert found["horovod"].items() >= KNOBS.items()


def test_preparing_text(prepared: Prepared, tmp_path: Path):
    """RAYON_NUM_THREADS: a rank's share of the cores, here all of them."""
    words = ("text", "--input", prepared.corpus, "--tokenizer", prepared.tokenizer, "--out", tmp_path / "shards")
    (found,) = seen(tmp_path / "watch", *words, program=DATA_PREP)
    assert found["numpy"].items() >= LIBRARY_THREADS.items()
    assert found["tokenizers"]["RAYON_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert "torch" not in found


def test_what_the_user_has_set_wins(prepared: Prepared, tmp_path: Path):
    """OMP_WAIT_POLICY says how threads shall wait as well: GOMP_SPINCOUNT would overrule it."""
    words = ("train", prepared.recipe, "train.steps=2", "--run-dir", tmp_path / "run")
    given = ("OMP_WAIT_POLICY=active", "OPENBLAS_NUM_THREADS=2", "LRU_CACHE_CAPACITY=7")
    (found,) = seen(tmp_path / "watch", *words, program=HVDTRAIN, given=given)
    assert "GOMP_SPINCOUNT" not in found["the end"]
    assert (found["torch"]["OPENBLAS_NUM_THREADS"], found["the end"]["LRU_CACHE_CAPACITY"]) == ("2", "7")
