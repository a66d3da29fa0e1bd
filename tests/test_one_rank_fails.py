"""Trouble of one rank alone ends the whole job soon, with one message that names the rank."""

import socket
import sys
import time
from pathlib import Path

import pytest
from launch import TRACE, Done, Prepared, launch

LIMIT_S = 20  # from the trouble to the end of the job
# The same with the start, which on a busy machine takes its time. Horovod would complain after 60 s and end never.
WHOLE_S = 50


def _on_two_ranks(on_rank_1: str, train: str, cwd: Path) -> Done:
    """mpirun with ``train`` on both ranks, in a shell that runs ``on_rank_1`` before it."""
    program = ("sh", "-c", f'[ "$OMPI_COMM_WORLD_RANK" = 1 ] && {on_rank_1}; exec {sys.executable} -m hvdtrain {train}')
    return launch(program=program, how="mpirun", ranks=2, cwd=cwd, timeout_s=WHOLE_S)


def test_shards_that_one_rank_does_not_see(prepared: Prepared, tmp_path: Path):
    """The settings are the same on all ranks, the file systems are not."""
    (tmp_path / "shards").symlink_to(prepared.shards)
    train = f"train {prepared.recipe} data.dir=shards --run-dir {tmp_path}/run"
    done = _on_two_ranks("cd /", train, cwd=tmp_path)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (65, 1, False), done
    assert done.messages[0].startswith("hvdtrain: DataError: no shards in shards (there is no such folder)")
    assert done.messages[0].endswith("(on rank 1)")
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_settings_are_refused(prepared: Prepared, tmp_path: Path):
    train = f"train {prepared.recipe} optim.lr=0.00$LR --run-dir {tmp_path}/run"
    done = _on_two_ranks("LR=5 || LR=6", train, cwd=tmp_path)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (2, 1, False), done
    assert "the configuration differs between ranks" in done.messages[0]
    assert "rank 1" in done.messages[0]
    assert not (tmp_path / "run").exists()


# Rank 1 meets {trouble} at the beginning of step 5, in which rank 0 waits for its gradient.
_TROUBLE = """
import os, signal, sys
from hvdtrain import __main__
from hvdtrain.errors import OutputError
from hvdtrain.engine import Engine
forward_backward = Engine.forward_backward
def troubled(engine, microbatches, task, step, *place):
    if step == 5 and engine.mesh.world.rank == 1:
        open("trouble", "w").close()
        {trouble}
    return forward_backward(engine, microbatches, task, step, *place)
Engine.forward_backward = troubled
sys.exit(__main__.main())
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("how", "trouble", "exit_code", "message"),
    [
        ("mpirun", "raise OutputError('disk full')", 74, "hvdtrain: [rank 1 on {host}] OutputError: disk full"),
        ("mpirun", "[][5]", 70, "hvdtrain: [rank 1 on {host}] IndexError: list index out of range"),
        ("mpirun", KILL, 128 + 9, None),  # mpirun itself says which rank it was
        ("gloo", KILL, 1, None),
    ],
    ids=["error", "crash", "kill", "kill-gloo"],
)
def test_in_the_middle_of_training(
    prepared: Prepared, tmp_path: Path, how: str, trouble: str, exit_code: int, message: str | None
):
    program = (sys.executable, "-c", _TROUBLE.format(trouble=trouble))
    words = ("train", prepared.recipe, "--run-dir", "run")
    done = launch(*words, program=program, how=how, ranks=2, cwd=tmp_path, timeout_s=WHOLE_S)
    assert time.time() - (tmp_path / "trouble").stat().st_mtime < LIMIT_S
    assert done.exit_code == exit_code, done
    expected = [message.format(host=socket.gethostname())] if message else []
    assert [line.partition(" during a collective")[0] for line in done.messages] == expected, done
    assert (TRACE in done.text) == (trouble == "[][5]")  # where the cause is our own mistake, its place is told
    assert not (tmp_path / "run" / "summary.json").exists()
