"""A run that is asked to stop saves at the next step boundary on all ranks, exits 75, and goes on as if nothing was."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import Prepared, launch, snapshot, succeed, summary

from hvdtrain.errors import ConfigError
from hvdtrain.watch.stopping import StopOptions, Stopping, StopSignals

USR2, TERM = signal.SIGUSR2, signal.SIGTERM


def stopping(run_dir: Path, signals: StopSignals | None = None, is_main: bool = True, **env: str) -> Stopping:
    return Stopping(run_dir, StopOptions(margin_s=10), is_main, signals, env)


def reason(*flags: int) -> str | None:
    return stopping(Path("nowhere")).agreed(torch.tensor(float(sum(flags)), dtype=torch.float64))


# --- one rank ------------------------------------------------------------------------------------------------------


def test_a_signal_sets_a_flag_and_no_more(tmp_path: Path):
    before = {number: signal.getsignal(number) for number in (USR2, TERM)}
    with StopSignals() as signals:
        asks = stopping(tmp_path, signals)
        assert (asks.asked(), reason(asks.asked())) == (0, None)
        os.kill(os.getpid(), USR2)
        assert reason(asks.asked()) == "SIGUSR2"
        os.kill(os.getpid(), TERM)
        os.kill(os.getpid(), TERM)
        assert reason(asks.asked()) == "SIGUSR2 and SIGTERM"
    assert {number: signal.getsignal(number) for number in (USR2, TERM)} == before


def test_the_reasons_of_many_ranks_add_up():
    with StopSignals() as signals:
        os.kill(os.getpid(), TERM)
        term = stopping(Path("nowhere"), signals).asked()
    assert reason(*[term] * 100_000) == "SIGTERM"
    assert reason(*[0] * 100_000) is None
    assert reason(*[term] * 16_384, *[1] * 16_384) == "SIGUSR2 and SIGTERM"


def test_the_file_is_looked_for_by_rank_0(tmp_path: Path):
    first, second = stopping(tmp_path), stopping(tmp_path, is_main=False)
    assert (first.asked(), second.asked()) == (0, 0)
    first.check_start()
    (tmp_path / "stop").touch()
    assert first.asked() == 0  # not at every step
    assert reason(stopping(tmp_path).asked()) == "stop file"
    assert second.asked() == 0
    with pytest.raises(ConfigError, match="/stop asks this run to stop; remove it"):
        first.check_start()
    second.check_start()


def test_time_is_kept_for_saving_and_evaluating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, clock = 1_000_000.0, [0.0]
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for seconds_left, late in ((10.5, False), (9.5, True)):
        assert bool(stopping(tmp_path, HVDTRAIN_END_TIME=str(now + seconds_left)).asked()) == late
    asks = stopping(tmp_path, HVDTRAIN_END_TIME=str(now + 10 + 2 * (3 + 4) - 0.5))
    assert asks.asked() == 0
    for what, seconds in (("saving", 1.0), ("saving", 3.0), ("evaluation", 4.0)):  # what took how long last
        with asks.measured(what):
            clock[0] += seconds
    assert reason(asks.asked()) == "the job's time ends"
    assert stopping(tmp_path, is_main=False, HVDTRAIN_END_TIME="0").asked() == 0


def test_an_end_that_is_no_time(tmp_path: Path):
    with pytest.raises(ConfigError, match="HVDTRAIN_END_TIME='noon' is no number of seconds"):
        stopping(tmp_path, HVDTRAIN_END_TIME="noon")
    assert stopping(tmp_path, HVDTRAIN_END_TIME="").asked() == 0


# --- whole runs ----------------------------------------------------------------------------------------------------

# Gets a signal on one rank, right after it has noted a step.
_SIGNALLED = """
import os, signal, sys
from hvdtrain.watch import metrics
from hvdtrain import __main__
from hvdtrain.comm.world import detect_world
rank, step, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[1:4]
add = metrics.Metrics.add
def add_and_ask(self, at, *rest):
    add(self, at, *rest)
    if at == step and detect_world().rank == rank:
        os.kill(os.getpid(), getattr(signal, name))
metrics.Metrics.add = add_and_ask
sys.exit(__main__.main())
"""


def signalled(rank: int, step: int, name: str) -> tuple[str, ...]:
    return (sys.executable, "-c", _SIGNALLED, str(rank), str(step), name)


@pytest.mark.parametrize(
    ("how", "ranks", "rank", "name"),
    [
        ("none", 1, 0, "SIGUSR2"),
        ("none", 1, 0, "SIGINT"),
        ("mpirun", 2, 1, "SIGUSR2"),
        ("gloo", 2, 1, "SIGTERM"),
        ("mpirun", 4, 2, "SIGTERM"),
    ],
)
def test_stopped_run_ends_where_an_unbroken_one_does(
    prepared: Prepared, trained: Path, tmp_path: Path, how: str, ranks: int, rank: int, name: str
):
    run_dir, words = tmp_path / "run", ("train", prepared.recipe, "checkpoint.every=0", "--run-dir", tmp_path / "run")
    done = launch(*words, how=how, ranks=ranks, program=signalled(rank, 4, name))
    assert done.rank_exit_code == 75, done
    assert f"hvdtrain: stopped at step 5 ({name}); the same command goes on" in done.text
    told = ["hvdtrain: interrupted: saving after this step; Ctrl-C again ends at once"] * (name == "SIGINT")
    assert done.messages == told, done
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (run_dir / "summary.json").exists()
    succeed(*words, how=how, ranks=ranks)
    found, expected = summary(run_dir), summary(trained)
    assert found["sample_digest"] == expected["sample_digest"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    if ranks == 1:
        last = Path("checkpoints/step-00000012")
        parts = [name for name in snapshot(trained / last) if name.endswith(".safetensors")]
        assert [snapshot(run_dir / last)[part] for part in parts] == [snapshot(trained / last)[part] for part in parts]


def test_asked_before_the_first_step(prepared: Prepared, tmp_path: Path):
    """The job's time may be over before training began: one step is made, so that no chain of jobs stands still."""
    words = ("train", prepared.recipe, "--run-dir", tmp_path / "run")
    for step in (1, 2):
        done = launch(*words, env={"HVDTRAIN_END_TIME": "1000"})
        assert done.exit_code == 75, done
        assert f"hvdtrain: stopped at step {step} (the job's time ends); the same command goes on" in done.text


def test_stop_file(prepared: Prepared, tmp_path: Path):
    words = ("train", prepared.recipe, "--run-dir", tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    done = launch(*words)
    assert (done.exit_code, len(done.messages)) == (2, 1), done
    assert "remove it, and the same command goes on" in done.messages[0]
    (tmp_path / "run/stop").unlink()
    succeed(*words)
    (tmp_path / "run/stop").touch()
    assert "is finished (12 steps)" in succeed(*words).text


def test_asked_in_the_last_step_it_is_finished(prepared: Prepared, tmp_path: Path):
    words = ("train", prepared.recipe, "--run-dir", tmp_path / "run")
    done = succeed(*words, program=signalled(0, 12, "SIGTERM"))
    assert "stopped" not in done.text
    assert summary(tmp_path / "run")["status"] == "finished"
