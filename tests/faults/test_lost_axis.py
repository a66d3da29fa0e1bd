"""A rank that is killed while the others wait for it in the middle of a pass: all end, and soon."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from breaking import program
from command import until
from launch import LAUNCHERS, TRACE, Prepared, environment, launch

from hvdtrain.comm.ancestors import find_process

SOON_S = 6.0
# Rank 1 dies in the fiftieth turn, at once or together with its launcher; then rank 0 waits for it.
PROGRAM = """
import os, signal, sys, time
import torch
from hvdtrain.comm.ancestors import Launcher
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import detect_world

what, place = sys.argv[1:]
world = detect_world()
if what == "launcher too":
    Launcher(world).outlast()  # as training does: MPI ends nobody for some minutes
with open_group(world) as group:
    axis = group.axis([range(group.size)], torch.device("cpu"))
    if group.rank == 0:
        with open(place + ".waits", "w") as file:
            file.write(str(os.getpid()))
    for turn in range(100):
        axis.sum(torch.ones(1000))
        if turn == 50 and group.rank == 1:
            time.sleep(0.3)  # rank 0 waits by now
            with open(place, "w") as file:
                file.write(f"{axis.backend} {time.time()}")
            if what == "launcher too":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "backend"), [("mpirun", "shared memory"), ("gloo", "gloo")])
def test_the_others_end_soon(tmp_path: Path, how: str, backend: str):
    place = tmp_path / "died"
    done = launch("alone", place, how=how, ranks=2, program=(sys.executable, "-c", PROGRAM))
    ended = time.time()  # nothing is left of them
    used, _, died = place.read_text().rpartition(" ")
    assert used == backend
    assert done.exit_code != 0
    assert ended - float(died) < SOON_S, done


@pytest.mark.parametrize(("how", "said"), [("mpirun", "rank 1 .* exited on signal 9"), ("gloo", "Exit code: 137")])
def test_a_rank_that_is_killed_in_the_middle_of_a_pipelines_step(
    prepared: Prepared, tmp_path: Path, how: str, said: str
):
    """Rank 0 waits for the gradients of what it has sent. The launcher says who it was; nobody else has a word."""
    words = ("train", prepared.recipe, "--run-dir", "run", "mesh.pipeline=2", "train.microbatch=3")
    done = launch(*words, program=program("kill", "pass back"), how=how, ranks=2, cwd=tmp_path)
    ended = time.time()
    assert ended - (tmp_path / "trouble").stat().st_mtime < SOON_S, done
    assert done.exit_code != 0
    assert (done.messages, TRACE in done.text, len(re.findall(said, done.stderr))) == ([], False, 1), done


def test_one_that_waits_in_memory_does_not_outlive_its_launcher_by_minutes(tmp_path: Path):
    """Rank and launcher have died together, and nobody is left to end it: it looks for the others itself."""
    place = tmp_path / "died"
    command = [*LAUNCHERS["mpirun"], "2", sys.executable, "-c", PROGRAM, "launcher too", place]
    launcher = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        assert launcher.wait(60) == -signal.SIGKILL
        waiting = int(Path(f"{place}.waits").read_text())
        until(lambda: find_process(waiting) is None, "rank 0 ends", timeout_s=30)
    finally:
        launcher.kill()
