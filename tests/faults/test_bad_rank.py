"""Whatever happens to one rank, at any time and under any launcher: all end soon, and its message is the last.

Kills and errors in the middle of a step are in tests/test_one_rank_fails.py.
"""

import re
import socket
import time
from pathlib import Path

import pytest
from breaking import program
from launch import TRACE, Done, Prepared, launch

LIMIT_S = 30  # from the trouble to the end of the job; horovodrun gives a process that does not end 10 of them
HERE = f"hvdtrain: [rank 1 on {socket.gethostname()}]"


def _break(prepared: Prepared, folder: Path, how: str, trouble: str, place: str) -> Done:
    words = ("train", prepared.recipe, "--run-dir", "run")
    done = launch(*words, program=program(trouble, place), how=how, ranks=2, cwd=folder, timeout_s=120)
    assert time.time() - (folder / "trouble").stat().st_mtime < LIMIT_S, done
    assert not (folder / "run" / "summary.json").exists()
    return done


@pytest.mark.parametrize(
    ("how", "place", "trouble", "exit_code", "last"),
    [
        ("mpirun", "data", "sys.exit", 70, f"{HERE} SystemExit: 3"),
        ("horovodrun", "evaluation", "error", 70, f"{HERE} RuntimeError: oh"),
        ("gloo", "compute", "error", 70, f"{HERE} RuntimeError: oh"),
    ],
)
def test_its_message_is_the_last(
    prepared: Prepared, tmp_path: Path, how: str, place: str, trouble: str, exit_code: int, last: str
):
    """Not one of MPI's, which takes ten lines to say less; nor one of a rank that only saw it leave."""
    done = _break(prepared, tmp_path, how, trouble, place)
    assert done.rank_exit_code == exit_code, done
    assert done.messages == [last], done
    # Of horovodrun --gloo only the ranks' lines count, for it adds a traceback of its own; and the other rank's Horovod
    # (not its Python) may still log a line about the connection.
    told = done.text if how == "gloo" else done.stderr
    after = told.rpartition(last)[2].split("\n")[1:]
    assert len([line for line in after if line]) <= (how == "gloo"), done
    assert TRACE in done.stderr
    assert "MPI_ABORT" not in done.stderr
    assert "mpirun detected" not in done.stderr


def test_what_all_agree_on_is_told_by_rank_0(prepared: Prepared, tmp_path: Path):
    """In a save all ranks learn of it. Memory that does not suffice is no crash: the way out is told, not the place."""
    done = _break(prepared, tmp_path, "mpirun", "memory", "saving")
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (71, 1, False), done
    message, plan, cure = done.stderr.splitlines()[-3:]  # nothing of mpirun's comes after
    assert message == "hvdtrain: out of memory: MemoryError: oh (on rank 1)"
    assert plan.startswith("planned for a rank, MiB: ")
    assert cure.startswith("lower train.microbatch (now 6; the result stays the same)")


@pytest.mark.parametrize(
    ("how", "place", "trouble", "exit_code"),
    [
        ("mpirun", "joined", "os._exit", 3),
        ("mpirun", "evaluation", "segfault", 128 + 11),
        ("gloo", "start", "kill", 128 + 9),
    ],
)
def test_one_that_cannot_say_anything(
    prepared: Prepared, tmp_path: Path, how: str, place: str, trouble: str, exit_code: int
):
    """The launcher names it."""
    done = _break(prepared, tmp_path, how, trouble, place)
    assert done.rank_exit_code == exit_code, done
    assert done.messages == [], done
    assert re.search(r"Process name: (\[\[\d+,1\],)?1|process rank 1 ", done.stderr), done
    if trouble == "segfault":
        assert "Fatal Python error: Segmentation fault" in done.stderr
        assert "in break_it" in done.stderr
