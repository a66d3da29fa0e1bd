"""A rank that hangs, or is stopped, ends the job in the time that was set; who and where is told."""

import re
import time
from pathlib import Path

import pytest
from breaking import program
from launch import Done, Prepared, launch, summary

TIMEOUT_S = 6  # a busy machine may need three for a phase of a small step
# From the trouble to the end: the time that was set, the patience of those who wait (5 s), and twice horovodrun's with
# a process that does not end (5 s); the rest is for a busy machine.
LIMIT_S = 60
# A rank that is stopped before its first heartbeat is named without one.
SEEN = "(lambda path: os.path.exists(path) and os.path.getsize(path) > 0)('run/heartbeats/rank-00001.json')"
STOP = f"[time.sleep(0.05) for _ in iter(lambda: {SEEN}, True)]; os.kill(os.getpid(), signal.SIGSTOP)"


def _hang(prepared: Prepared, folder: Path, how: str, trouble: str, place: str, *more: str) -> Done:
    ranks = 1 if how == "none" else 2
    words = ("train", prepared.recipe, "--run-dir", "run", f"watchdog.timeout_s={TIMEOUT_S}", *more)
    broken = program(trouble, place, rank=ranks - 1)
    done = launch(*words, program=broken, how=how, ranks=ranks, cwd=folder, timeout_s=120)
    assert (folder / "trouble").exists(), done
    assert TIMEOUT_S < time.time() - (folder / "trouble").stat().st_mtime < LIMIT_S
    assert done.rank_exit_code == 70, done
    assert not (folder / "run" / "summary.json").exists()
    return done


def _stacks(folder: Path, rank: int) -> str:
    return (folder / f"run/heartbeats/rank-{rank:05d}.stacks.txt").read_text(encoding="utf-8")


def _told(rank: int, step: int, where: str, more: str) -> str:
    return rf"hvdtrain: \[rank {rank} on \S+\] no progress for \d+ s in \w+ of step {step}, {where}; {more}"


def test_alone(prepared: Prepared, tmp_path: Path):
    done = _hang(prepared, tmp_path, "none", "hang", "data")
    assert re.match(
        _told(0, 3, r"_walk \(train.py:\d+\)", r"stacks: run/heartbeats/rank-00000\.stacks\.txt"), done.messages[-1]
    )
    assert len(done.messages) == 1, done
    for written in (_stacks(tmp_path, 0), done.stderr):
        assert "in break_it" in written
    assert done.stderr.splitlines()[-1] == done.messages[-1]


@pytest.mark.parametrize("how", ["mpirun", "gloo"])
def test_a_rank_that_is_stopped(prepared: Prepared, tmp_path: Path, how: str):
    """It cannot speak for itself, and the launcher does not see it."""
    done = _hang(prepared, tmp_path, how, STOP, "compute")
    behind = r"behind: rank 1 on \S+ \(process \d+\), silent for \d+ s, last seen in "
    assert re.match(_told(0, 3, r"over_ranks \(sync/sums.py:\d+\)", behind), done.messages[-1]), done
    assert len(done.messages) == 1, done


@pytest.mark.parametrize(
    ("mesh", "where"),
    [("mesh.tensor=2", r"_crossed \(cut/crossings.py:\d+\)"), ("mesh.tensor=1", r"\w+ \(sync/\w+.py:\d+\)")],
)
def test_a_rank_of_a_mesh_that_is_stopped(prepared: Prepared, tmp_path: Path, mesh: str, where: str):
    """The other waits in an axis, which is no collective of Horovod's; or it has a gradient for Horovod, whose thread
    keeps the table of sets of ranks locked for ever.
    """
    done = _hang(prepared, tmp_path, "mpirun", STOP, "compute", mesh)
    behind = r"behind: rank 1 on \S+ \(process \d+\), silent for \d+ s, last seen in "
    assert re.match(_told(0, 3, where, behind), done.messages[-1]), done
    assert len(done.messages) == 1, done


def test_a_rank_that_is_stopped_when_all_is_done(prepared: Prepared, tmp_path: Path):
    """MPI's own end waits for it, after the last of our code."""
    broken = program("stop", "left")
    done = launch("train", prepared.recipe, "--run-dir", "run", program=broken, how="mpirun", ranks=2, cwd=tmp_path)
    assert done.exit_code == 70, done
    assert re.fullmatch(r"hvdtrain: \[rank 0 on \S+\] not all ranks leave within 4 s", done.messages[-1]), done
    assert summary(tmp_path / "run")["status"] == "finished"


def test_a_rank_that_holds_pythons_lock(prepared: Prepared, tmp_path: Path):
    """As C code may, in a file system that does not answer: its own watchdog does not get its turn. Here in a save, in
    which the others wait in a collective that the watchdog has never heard of.
    """
    done = _hang(prepared, tmp_path, "mpirun", "locked hang", "saving")
    behind = r"behind: rank 1 on \S+ \(process \d+\), silent for \d+ s, last seen in checkpoint of step 6, "
    assert re.match(_told(0, 6, r"\w+ \(\S+\.py:\d+\)", behind), done.messages[-1]), done
    assert "in break_it" in _stacks(tmp_path, 1)
