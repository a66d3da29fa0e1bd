"""When does the job end? As HVDTRAIN_END_TIME says, else as Slurm does; what cannot be found out is said."""

import os
import time
from pathlib import Path

import pytest
from launch import Prepared, environment, launch, summary

from hvdtrain.watch import stopping
from hvdtrain.watch.stopping import StopOptions, Stopping, end_of_job, parse_end

JOB = {"SLURM_JOB_ID": "4711"}


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script to be written; what it was asked for is in ``asked``."""
    path = tmp_path / "bin" / "squeue"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return path


def answer(squeue: Path, script: str) -> None:
    asked = squeue.with_name("asked")
    squeue.write_text(f'#!/bin/sh\necho "$* $SLURM_TIME_FORMAT $SQUEUE_STATES" >>{asked}\n{script}\n')
    squeue.chmod(0o755)


def end(**env: str) -> tuple[float | None, list[str]]:
    return end_of_job({"PATH": os.environ["PATH"], **env})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("4711|1767323045\n", 1767323045.0),
        (" 4711| 1767323045 \n", 1767323045.0),
        ("4711|NONE\n", None),
        ("4711|N/A\n", None),
        ("4710|1767323000\n4711|1767323045\n4712|N/A\n", 1767323045.0),  # the tasks of an array share its id
        ("CLUSTER: one\n4711|1767323045\n", 1767323045.0),
    ],
)
def test_what_squeue_says(said: str, expected: float | None):
    assert parse_end(said, "4711") == expected


@pytest.mark.parametrize("said", ["", "4710|1767323045\n", "4711|2026-01-02T03:04:05\n", "4711|\n", "slurm_load_jobs"])
def test_what_is_no_answer(said: str):
    with pytest.raises(ValueError, match="squeue said"):
        parse_end(said, "4711")


def test_the_nearest_source_is_asked_and_squeue_last(squeue: Path):
    answer(squeue, "echo '4711|300'")
    assert end() == (None, [])
    assert end(HVDTRAIN_END_TIME="100.5", SLURM_JOB_END_TIME="200", **JOB) == (100.5, [])
    assert end(SLURM_JOB_END_TIME="200", **JOB) == (200.0, [])
    assert not squeue.with_name("asked").exists()
    for of_no_use in ("", "0", "Unknown"):
        assert end(SLURM_JOB_END_TIME=of_no_use, SQUEUE_STATES="PENDING", SLURM_TIME_FORMAT="relative", **JOB) == (
            (300.0, [])
        )
    asked = squeue.with_name("asked").read_text().splitlines()
    assert asked == ["--noheader --jobs=4711 --format=%A|%e %s "] * 3


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm"),
        ("echo 2026-01-02T03:04:05", "squeue said '2026-01-02T03:04:05'"),
        ("sleep 60", "squeue has not answered within 0.5 s"),
        (None, "No such file"),
    ],
    ids=["refused", "not understood", "silent", "not there"],
)
def test_what_slurm_does_not_say_is_said(
    squeue: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, why: str, tmp_path: Path
):
    monkeypatch.setattr(stopping, "_ANSWER_S", 0.5)
    if script:
        answer(squeue, script)
    path = os.environ["PATH"] if script else "/nowhere"
    began = time.monotonic()
    asks = Stopping(tmp_path, StopOptions(), is_main=True, env={"PATH": path, **JOB})
    assert time.monotonic() - began < 20  # a busy machine's
    assert len(asks.notes) == 1
    assert "when job 4711 ends is not known" in asks.notes[0]
    assert why in asks.notes[0]
    assert asks.asked() == 0


def test_one_rank_asks_for_all(squeue: Path, tmp_path: Path):
    answer(squeue, "echo '4711|300'")
    assert Stopping(tmp_path, StopOptions(), is_main=False, env={"PATH": os.environ["PATH"], **JOB}).asked() == 0
    assert not squeue.with_name("asked").exists()


def test_a_run_goes_on_without_an_answer_and_says_so(prepared: Prepared, squeue: Path, tmp_path: Path):
    """From the command line down; that it stops in time where there is an answer is shown by a real Slurm."""
    answer(squeue, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    path = {"PATH": f"{squeue.parent}{os.pathsep}{environment()['PATH']}"}
    done = launch(
        "train", prepared.recipe, "device=cpu", "train.steps=2", "--run-dir", tmp_path / "run", env={**JOB, **path}
    )
    assert done.exit_code == 0, done
    (note,) = summary(tmp_path / "run")["fallbacks"]
    assert "when job 4711 ends is not known (squeue failed (exit 1): slurm_load_jobs error: Invalid job id" in note
    assert done.text.count(f"hvdtrain: note: {note}") == 1
