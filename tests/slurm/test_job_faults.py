"""What ends a job of slurm/ before its time, on a real Slurm: it goes on by itself, to the numbers of an unbroken run.

So that a fault hits in mid-step, and the same one each time, the last rank waits in the fifth step of a start:

    rank 0   forward  backward  all-reduce ....................   waits for rank 1
    rank 1   forward  backward  <waits to be asked to stop, or for its death>
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cluster import ENDED, SlurmCluster
from command import until
from launch import Prepared, environment, launch, snapshot, summary

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("eval.every=6", "checkpoint.every=0", "metrics.every=1", "stop.margin_s=0")
TIMED = ("_s", "_per_s", "_mib", "mfu")  # ends of the names of what differs from run to run
LONG_S = 120  # for what takes 10 s where the machine has nothing else to do
SILENT_S = 4  # more than TCP's first three attempts; 120 by default
FIRST_STEP_S = 40  # the promise is 20 s; this machine may be busy

_WAIT = """
import json, os, sys, time
from pathlib import Path
from hvdtrain.watch import stopping
from hvdtrain import __main__
place, asked, steps, times = Path(sys.argv[0]).parent, stopping.Stopping.asked, 5, []
start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
def wait(self):
    times.append(time.time())
    if len(times) == steps:
        note = place / f".waits-{start}"
        note.write_text(json.dumps({"pid": os.getpid(), "first_step_done": times[1]}))
        note.rename(place / f"waits-{start}")
        while not self._signals.flags:
            time.sleep(0.02)
    return asked(self)
if start < int(os.environ["WAITS"]) and int(os.environ["SLURM_PROCID"]) == int(os.environ["SLURM_NTASKS"]) - 1:
    stopping.Stopping.asked = wait
sys.exit(__main__.main())
"""


@dataclass(frozen=True)
class Job:
    """A job of slurm/train.sbatch: its run and its log lie in ``folder``."""

    slurm: SlurmCluster
    id: int
    folder: Path
    run: str = "run"

    @property
    def run_dir(self) -> Path:
        return self.folder / self.run

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.rpartition("-")[2]) for path in (self.run_dir / "checkpoints").glob("step-*"))

    def wait_in_step(self, start: int = 0) -> int:
        """Until the last rank of start number ``start`` waits in its fifth step; its process id.

        What the issue promises is looked at on the way: the time from the job's start to the end of its first step.
        """
        note = self.folder / f"waits-{start}"
        try:
            until(note.exists, f"start {start} of the job is in its fifth step", LONG_S)
        except TimeoutError as error:
            error.add_note(f"{self.slurm.show(self.id)}\n{self.log}")
            raise
        waiting = json.loads(note.read_text())
        began = datetime.fromisoformat(self.slurm.show(self.id)["StartTime"]).timestamp()
        assert waiting["first_step_done"] - began < FIRST_STEP_S
        return waiting["pid"]

    def until_said(self, words: str) -> None:
        try:
            until(lambda: words in self.log, words, LONG_S)
        except TimeoutError as error:
            error.add_note(self.log)
            raise

    def wait_for_restart(self, number: int, timeout_s: float = LONG_S) -> None:
        """Until the job is in the queue again, for the ``number``-th time."""
        try:
            until(lambda: self.slurm.show(self.id)["Restarts"] == str(number), f"restart {number}", timeout_s)
        except TimeoutError as error:
            error.add_note(f"{self.slurm.show(self.id)}\n{self.log}")
            raise

    def finish(self, restarts: int) -> dict[str, Any]:
        """Its summary, when it has completed, after so many restarts and no more."""
        job = self.slurm.wait(self.id, LONG_S)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), self.log
        return summary(self.run_dir)


@contextmanager
def submitted(
    slurm: SlurmCluster, prepared: Prepared, folder: Path, *options: str, settings: tuple[str, ...] = (), waits: int = 0
) -> Iterator[Job]:
    """A job that trains ``prepared.recipe`` by a task on each of two nodes; a failed test leaves none in the queue.

    options: of sbatch. waits: in how many of its starts the last rank waits.
    """
    python = f'[ "$*" = "${{*#-m hvdtrain train}}" ] || {{ shift 2 && set -- "{folder}/wait.py" "$@"; }}\n'
    python += f'exec "{sys.executable}" "$@"\n'
    (folder / "wait.py").write_text(_WAIT)
    words = (prepared.recipe, *SETTINGS, *settings, "--run-dir", "run")
    env = {"HVDTRAIN_LAUNCHER": "pmix", "WAITS": str(waits)}
    with _submitted(slurm, folder, python, "train", ("--nodes=2", *options), words, env) as job:
        yield job


@contextmanager
def _submitted(
    slurm: SlurmCluster,
    folder: Path,
    python: str,
    script: str,
    options: tuple[Any, ...],
    words: tuple[Any, ...],
    env: Mapping[str, str] | None = None,
    run: str = "run",
) -> Iterator[Job]:
    """python: in sh, what the python of the job's environment shall do."""
    program = folder / "venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{python}")
    program.chmod(0o755)
    env = {
        **environment(),
        "HVDTRAIN_PREFLIGHT": "0",
        "HVDTRAIN_HOME": str(ROOT),
        "HVDTRAIN_VENV": str(folder / "venv"),
        **(env or {}),
    }
    options = ("--ntasks-per-node=1", f"--output={folder}/log", *options, ROOT / "slurm" / f"{script}.sbatch")
    job = Job(slurm, slurm.sbatch(*options, *words, cwd=folder, env=env), folder, run)
    try:
        yield job
    finally:
        slurm.run(["scancel", str(job.id)], timeout_s=30)
        until(lambda: ENDED.fullmatch(slurm.show(job.id)["JobState"]) is not None, "the job has ended", 60)


@pytest.fixture(scope="module")
def unbroken(prepared: Prepared) -> Path:
    """The run folder of two ranks that nothing disturbed; look, do not touch."""
    run_dir = prepared.folder / "unbroken"
    done = launch("train", prepared.recipe, *SETTINGS, "--run-dir", run_dir, how="mpirun", ranks=2)
    assert done.exit_code == 0, done
    return run_dir


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.endswith(TIMED)} for line in lines]


def assert_equal_to_the_bit(run_dir: Path, unbroken: Path) -> None:
    """The same samples, the same curves to the digit, the same parameters and optimizer state to the bit."""
    assert curve(run_dir) == curve(unbroken)
    found, expected = summary(run_dir), summary(unbroken)
    for key in ("sample_digest", "world_size", "val_loss", "best_val_loss", "tokens"):
        assert found[key] == expected[key], key
    last = f"checkpoints/step-{expected['step']:08d}"
    parts, expected_parts = (
        {name: data for name, data in snapshot(run / last).items() if name != "manifest.json"}
        for run in (run_dir, unbroken)
    )
    assert parts == expected_parts
    assert parts


# --- Slurm ends the job ----------------------------------------------------------------------------------------------


def test_time_limit(slurm: SlurmCluster, prepared: Prepared, unbroken: Path, tmp_path: Path):
    """Slurm looks at its jobs' limits every 30 s, and so warns within the first 30 s here, early as ever."""
    with submitted(slurm, prepared, tmp_path, "--time=1", "--signal=B:USR2@55", waits=1) as job:
        job.wait_for_restart(1)
        slurm.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=30"], timeout_s=30)
        saved = job.checkpoints
        job.finish(restarts=1)
    # Before the first step or in the fifth, where it waits: nothing is lost either way.
    assert saved in ([1], [5]), job.log
    assert f"hvdtrain: stopped at step {saved[0]} (SIGUSR2); the same command goes on" in job.log
    assert f"hvdtrain job: stopped early; newest checkpoint: step-0000000{saved[0]}" in job.log
    assert f"hvdtrain: resumed from run/checkpoints/step-0000000{saved[0]}" in job.log
    assert_equal_to_the_bit(job.run_dir, unbroken)


def test_preemption(slurm: SlurmCluster, prepared: Prepared, unbroken: Path, tmp_path: Path):
    """Slurm asks the ranks to stop (TERM) and requeues the job; where the partition grants it grace, the script does.

    Without grace there is KillWait for saving: 5 s here, 30 s where nobody has changed it.
    """
    with submitted(slurm, prepared, tmp_path, "--time=30", waits=2) as job:
        try:
            for start, grace_s in enumerate((0, 30)):
                job.wait_in_step(start)
                slurm.run(["scontrol", "update", "PartitionName=main", f"GraceTime={grace_s}"], timeout_s=30)
                urgent = slurm.sbatch(
                    "--nodes=2", "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap=:"
                )
                assert slurm.wait(urgent, LONG_S)["JobState"] == "COMPLETED"
                job.wait_for_restart(start + 1)
                assert job.checkpoints == [5, 10][: start + 1], job.log
        finally:
            slurm.run(["scontrol", "update", "PartitionName=main", "GraceTime=0"], timeout_s=30)
        job.finish(restarts=2)
    # The script passes USR2 on as soon as it hears of it: on a busy node before the ranks have looked at their TERM.
    assert len(re.findall(r"\((SIGUSR2 and )?SIGTERM\); the same command goes on", job.log)) == 2, job.log
    assert_equal_to_the_bit(job.run_dir, unbroken)


# --- a part of the job dies ------------------------------------------------------------------------------------------


def test_killed_rank(slurm: SlurmCluster, prepared: Prepared, unbroken: Path, tmp_path: Path):
    """The others cannot go on: the whole job ends within 15 s, and starts again from the newest checkpoint."""
    settings = ("checkpoint.every=3",)
    with submitted(slurm, prepared, tmp_path, "--time=30", settings=settings, waits=1) as job:
        pid = job.wait_in_step()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        job.wait_for_restart(1, timeout_s=15)
        until(lambda: slurm.show(job.id)["JobState"] == "PENDING", "no rank is left", 15 - (time.monotonic() - killed))
        job.finish(restarts=1)
    assert "hvdtrain job: exit code 137: a rank has died; newest checkpoint: step-00000003" in job.log
    assert "hvdtrain: resumed from run/checkpoints/step-00000003" in job.log
    assert_equal_to_the_bit(job.run_dir, unbroken)


def test_dies_before_every_checkpoint(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """It is started again so often and no more."""
    python = "kill -KILL $$\n"
    options, env = ("--nodes=1", "--time=30"), {"HVDTRAIN_MAX_STALLED": "1"}
    with _submitted(slurm, tmp_path, python, "train", options, (prepared.recipe, "--run-dir", "run"), env) as job:
        ended = slurm.wait(job.id, LONG_S)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "1"), job.log
    assert "not started again: 2 times in a row without a newer checkpoint (HVDTRAIN_MAX_STALLED=1)" in job.log


@pytest.mark.usefixtures("slurm")  # it says where there is none
def test_cut_cable(prepared: Prepared, unbroken: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """Nobody is told when the cable of n2 is pulled in mid-step: each node only finds that the other does not answer.

    TCP itself would wait for a quarter of an hour. When the cable is back, Slurm starts the job again on both nodes.
    """
    settings = ("checkpoint.every=3", f"watchdog.network_timeout_s={SILENT_S}")
    with (
        SlurmCluster(tmp_path_factory.mktemp("own")) as own,
        submitted(own, prepared, tmp_path, settings=settings, waits=1) as job,
    ):
        job.wait_in_step()
        own.network.unplug("n2")
        job.until_said(f"hvdtrain: [rank 0 on n1] no answer from n2 (10.77.0.2) for {SILENT_S} s, in sync of step 5")
        job.wait_for_restart(1)
        own.network.plug("n2")
        job.finish(restarts=1)
    assert "hvdtrain job: exit code 70: a rank has died; newest checkpoint: step-00000003" in job.log
    assert "hvdtrain: resumed from run/checkpoints/step-00000003" in job.log
    assert_equal_to_the_bit(job.run_dir, unbroken)


@pytest.mark.usefixtures("slurm")  # it says where there is none
def test_lost_node(prepared: Prepared, trained: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """n2 loses its power. The job waits for another node, or goes on with fewer if told to.

    Slurm itself would believe in n2 for another 30 to 45 s.
    """
    settings = (f"watchdog.network_timeout_s={SILENT_S}",)
    with (
        SlurmCluster(tmp_path_factory.mktemp("own")) as own,
        submitted(own, prepared, tmp_path, settings=settings, waits=1) as job,
    ):
        job.wait_in_step()
        own.network.power_off("n2")
        job.until_said("hvdtrain: [rank 0 on n1] no answer from n2 (10.77.0.2)")
        own.run(["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost"], timeout_s=30)
        job.wait_for_restart(1)
        done = own.run(["scontrol", "update", f"JobId={job.id}", "NumNodes=1", "NumTasks=1"], timeout_s=30)
        assert done.returncode == 0, done
        found = job.finish(restarts=1)
    expected = summary(trained)
    assert (found["world_size"], found["sample_digest"]) == (1, expected["sample_digest"])
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)  # as in test_launchers
