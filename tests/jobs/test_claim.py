"""A run folder has one owner: two starts on one folder, and what becomes of a claim whose owner is gone."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import until
from launch import HVDTRAIN, Prepared, environment, launch, succeed, summary

from hvdtrain import files
from hvdtrain.comm.ancestors import process_began
from hvdtrain.comm.ranks import OneRank
from hvdtrain.errors import EXIT_CRASH, EXIT_USAGE, OutputError, RankError
from hvdtrain.jobs import claim
from hvdtrain.jobs.claim import Claim, describe_myself, has_ended, is_known_dead, newest_claim, read_owner
from hvdtrain.watch.log_file import read_log

STARTS, ROUNDS = 8, 3


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is a minute: forked processes have these too."""
    for name, seconds in (("BEAT_S", 0.1), ("STALE_S", 1.2), ("_LOOK_S", 0.02), ("_QUIET_S", 0.4)):
        monkeypatch.setattr(claim, name, seconds)


# --- one of many ---------------------------------------------------------------------------------------------------


def start(run_dir: Path, together, ended, answers) -> None:
    """Take the folder with the others; hold it until all have learned what they are."""
    together.wait()
    try:
        with Claim(run_dir, OneRank()) as mine:
            mine.take()
            answers.put("owner")
            ended.wait()
            mine.check()
    except RankError as error:
        assert error.exit_code == EXIT_USAGE
        answers.put(str(error))
        ended.wait()


@pytest.mark.parametrize("left", ["nothing", "given back", "dead", "silent"])
def test_of_many_starts_one_takes_the_folder(tmp_path: Path, hasty: None, left: str):
    """Together, from a folder that is new, was given back, or whose owner died, here or where nobody can tell."""
    fork = multiprocessing.get_context("fork")
    for number in range(ROUNDS if left != "silent" else 1):
        run_dir = tmp_path / f"run-{number}"
        leave(run_dir, left)
        together, ended, answers = fork.Barrier(STARTS), fork.Event(), fork.Queue()
        processes = [fork.Process(target=start, args=(run_dir, together, ended, answers)) for _ in range(STARTS)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=60) for _ in processes]
        ended.set()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert found.count("owner") == 1, found
        assert all(f"ConfigError: {run_dir} belongs to process " in words for words in found if words != "owner")
        assert len(list((run_dir / "claim").iterdir())) == 1
        _, raw = newest_claim(run_dir / "claim")
        assert claim.is_free(raw)


def leave(run_dir: Path, what: str) -> None:
    if what != "nothing":
        mine = Claim(run_dir, OneRank())
        with mine:
            mine.take()
            raw = (run_dir / "claim" / "00000001").read_bytes()
        if what == "dead":
            process = subprocess.Popen(["true"])
            process.wait()
            raw = raw.replace(f'"pid": {os.getpid()}'.encode(), f'"pid": {process.pid}'.encode())
        if what == "silent":
            raw = raw.replace(b"pid:[", b"pid:[9")
        if what != "given back":
            (run_dir / "claim" / "00000001").write_bytes(raw)


def test_the_last_heartbeat_is_waited_for_and_no_longer(tmp_path: Path, hasty: None, capfd: pytest.CaptureFixture):
    leave(tmp_path, "silent")
    began_s = time.monotonic()
    with Claim(tmp_path, OneRank()) as mine:
        mine.take()
        assert claim.STALE_S <= time.monotonic() - began_s < claim.STALE_S + 5
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"hvdtrain: note: {tmp_path} was not given back by process {os.getpid()} on ")


def test_an_owner_that_was_taken_over_does_not_write(tmp_path: Path, hasty: None):
    with Claim(tmp_path, OneRank()) as mine:
        mine.take()
        mine.check()
        (tmp_path / "claim" / "00000002").write_text('{"pid": 7, "host": "n7", "since": "now"}')
        (tmp_path / "claim" / "00000001").unlink()
        with pytest.raises(claim.ClaimLostError, match="was taken over by process 7 on n7, which began now"):
            until(lambda: mine.check() is not None, "the loss is found", 10)
    assert read_owner((tmp_path / "claim" / "00000002").read_bytes())["pid"] == 7  # and was not given back for it
    assert claim.ClaimLostError.exit_code == EXIT_CRASH


def test_half_a_heartbeat_is_no_loss(tmp_path: Path, hasty: None):
    """It is read while it is written."""
    with Claim(tmp_path, OneRank()) as mine:
        mine.take()
        mine._ended.set()  # no more of them
        mine._thread.join()
        path = tmp_path / "claim" / "00000001"
        path.write_bytes(path.read_bytes()[:200].ljust(1024, b"7"))
        assert not read_owner(path.read_bytes())
        mine._looked_s = 0.0
        mine.check()
        assert mine._looked_s > 0


def test_a_list_that_is_old_takes_nothing_over(tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch):
    """A client of NFS may see a folder as it was a minute ago."""
    leave(tmp_path, "silent")
    (tmp_path / "claim" / "00000001").rename(tmp_path / "claim" / "00000007")
    numbers, lists = claim._numbers, [[]]
    monkeypatch.setattr(claim, "_numbers", lambda folder: lists.pop() if lists else numbers(folder))
    with Claim(tmp_path, OneRank()) as mine:
        assert not mine._try()  # it made 1, and saw 7
        assert [path.name for path in (tmp_path / "claim").iterdir()] == ["00000007"]


def test_a_file_system_that_fails_for_a_moment(tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch):
    """What could not be flushed is no claim, for this start nor for the others."""
    failures, fsync = [errno.EIO, errno.ESTALE], os.fsync

    def flush(file: int) -> None:
        if failures:
            raise OSError(failures.pop(), "a moment")
        fsync(file)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0))
    with Claim(tmp_path, OneRank()) as mine:
        mine.take()
        mine.check()
    assert not failures
    assert [path.name for path in (tmp_path / "claim").iterdir()] == ["00000001"]


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RankError, match=r"OutputError: cannot claim run folder .*/run: "):
        Claim(tmp_path / "run", OneRank()).take()
    assert OutputError.exit_code == 74


# --- who is dead ---------------------------------------------------------------------------------------------------

JOB = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "4711"}


@pytest.mark.parametrize(
    ("changes", "env", "dead"),
    [
        ({}, {}, False),  # this very process
        ({"process": "1"}, {}, True),  # its number was given to another since
        ({"pid": 1 << 22}, {}, True),  # above the highest number
        ({"pid": 1 << 22, "namespace": "pid:[1]"}, {}, False),  # another container's numbers
        ({"pid": 1 << 22, "boot": "another"}, {}, False),  # another host, whatever it is called; or this one before
        ({"boot": ""}, {}, False),
        ({"boot": "another", "restart": 0}, {**JOB, "SLURM_RESTART_COUNT": "1"}, True),
        ({"boot": "another", "restart": 1}, {**JOB, "SLURM_RESTART_COUNT": "1"}, False),
        ({"boot": "another", "cluster": "d"}, {**JOB, "SLURM_RESTART_COUNT": "1"}, False),
        ({"boot": "another", "job": "12"}, JOB, True),  # Slurm, which is asked, has forgotten it
        ({"boot": "another", "job": "13"}, JOB, False),
        ({"boot": "another", "job": "13"}, {}, False),
    ],
)
def test_who_is_known_to_be_dead(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], env: dict[str, str], dead: bool
):
    monkeypatch.setattr(claim, "has_ended", lambda job: job == "12")
    assert is_known_dead({**describe_myself(JOB), **changes}, describe_myself(env)) == dead


@pytest.mark.parametrize(
    ("answer", "ended"),
    [
        ("echo RUNNING", False),
        ("echo COMPLETING", False),  # its processes may still be there
        ("echo SUSPENDED", False),
        ("echo WORDS_OF_A_LATER_SLURM", False),
        ("echo PENDING", True),  # requeued: its earlier start has ended
        ("echo CANCELLED; echo FAILED", True),
        ("true", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),
        ("echo Unable to contact slurm controller >&2; exit 1", False),
        ("sleep 5", False),
    ],
)
def test_what_slurm_says_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, ended: bool):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(claim, "_ANSWER_S", 1.0)
    assert has_ended("4711") == ended


def test_another_users_process_is_not_gone_where_proc_hides_it(monkeypatch: pytest.MonkeyPatch):
    """As with hidepid=2, on login nodes: the kernel still says that there is one."""

    def kill(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    assert not is_known_dead({**describe_myself({}), "pid": 1 << 22}, describe_myself({}))


def test_a_process_that_has_ended_but_was_not_asked_for_is_gone():
    process = subprocess.Popen(["sleep", "60"])
    assert process_began(process.pid) == process_began(process.pid) != ""
    process.kill()
    until(lambda: not process_began(process.pid), "a zombie is gone", 10)
    process.wait()


# --- whole runs ----------------------------------------------------------------------------------------------------

# Heartbeats of 0.2 s, stale after 3.
_HASTY = """
import sys
from hvdtrain.jobs import claim
from hvdtrain import __main__
claim.BEAT_S, claim.STALE_S = 0.2, 3.0
sys.exit(__main__.main())
"""
HASTY = (sys.executable, "-c", _HASTY)
ENDLESS = ("train.steps=1000000", "eval.every=0", "checkpoint.every=0", "metrics.every=1", "metrics.tensorboard=false")


@contextmanager
def training(prepared: Prepared, run_dir: Path, program: tuple[str, ...] = HVDTRAIN) -> Iterator[subprocess.Popen]:
    """A training that does not end by itself, from its first logged step on."""
    words = [*program, "train", prepared.recipe, *ENDLESS, "--run-dir", run_dir]
    lines = len(log_of(run_dir))
    with open(run_dir.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(words, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: len(log_of(run_dir)) > lines or process.poll() is not None, "it trains", 120)
        assert process.poll() is None, run_dir.with_suffix(".log").read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def log_of(run_dir: Path) -> list[dict[str, object]]:
    return read_log(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []


def test_a_second_start_is_refused_and_one_after_a_crash_goes_on(prepared: Prepared, trained: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    words = ("train", prepared.recipe, "--run-dir", run_dir)
    with training(prepared, run_dir) as owner:
        done = launch(*words, how="mpirun", ranks=2)
        assert (done.exit_code, len(done.messages)) == (EXIT_USAGE, 1), done
        assert f"ConfigError: {run_dir} belongs to process {owner.pid} on " in done.messages[0]
        assert f"`kill {owner.pid}` on " in done.messages[0] and "give another --run-dir" in done.messages[0]
        assert owner.poll() is None
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        began_s = time.monotonic()
        done = succeed(*words)
        assert time.monotonic() - began_s < claim.STALE_S  # it is known to be dead
    assert not done.messages, done
    assert summary(run_dir)["sample_digest"] == summary(trained)["sample_digest"]


def test_a_run_that_was_suspended_and_taken_over_ends_without_writing(prepared: Prepared, tmp_path: Path):
    run_dir = tmp_path / "run"
    with training(prepared, run_dir, HASTY) as first:
        os.kill(first.pid, signal.SIGSTOP)
        with training(prepared, run_dir, HASTY) as second:
            os.kill(first.pid, signal.SIGCONT)
            assert first.wait(60) == EXIT_CRASH
            said = run_dir.with_suffix(".log").read_text()
            assert f"hvdtrain: ClaimLostError: {run_dir} was taken over by process {second.pid} on " in said
            step = log_of(run_dir)[-1]["step"]
            until(lambda: log_of(run_dir)[-1]["step"] > step, "the second trains on", 60)
            (run_dir / "stop").touch()
            assert second.wait(60) == 75, run_dir.with_suffix(".log").read_text()
    steps = [line["step"] for line in log_of(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{steps[-1]:08d}"]


def test_a_finished_run_is_only_looked_at(prepared: Prepared, trained: Path, tmp_path: Path):
    """Also while another start owns it."""
    shutil.copytree(trained, tmp_path / "run")
    with Claim(tmp_path / "run", OneRank()) as mine:
        mine.take()
        assert "is finished (12 steps)" in succeed("train", prepared.recipe, "--run-dir", tmp_path / "run").text
