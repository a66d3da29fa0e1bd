"""Ctrl-C, typed at a terminal: a run saves at its next step boundary and exits 75; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import until
from launch import HVDTRAIN, TRACE, Prepared, environment, launch, launch_rows
from test_stopping import reason

from hvdtrain.errors import crash_code
from hvdtrain.watch.stopping import StopSignals

INT = signal.SIGINT
LONG = ("train.steps=100000", "eval.every=0", "checkpoint.every=0", "metrics.every=1", "metrics.tensorboard=false")


@dataclass
class Terminal:
    """A program in the foreground of a terminal of its own."""

    process: subprocess.Popen[bytes]
    keyboard: int
    log: Path

    def ctrl_c(self) -> None:
        os.write(self.keyboard, b"\x03")

    def until(self, ready: Callable[[], bool], what: str) -> None:
        try:
            until(lambda: ready() or self.process.poll() is not None, what, timeout_s=120)
        except TimeoutError as error:
            error.add_note(self.text)
            raise
        assert ready(), self.text

    def wait(self) -> int:
        return self.process.wait(120)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def terminal(log: Path, *words: Any, program: tuple[Any, ...] = HVDTRAIN) -> Iterator[Terminal]:
    """Its output goes to a file, which nobody has to empty."""
    keyboard, screen = os.openpty()
    args = ["setsid", "--ctty", *map(str, (*program, *words))]
    with open(log, "wb") as out:
        process = subprocess.Popen(args, stdin=screen, stdout=out, stderr=out, env=environment())
    os.close(screen)
    try:
        yield Terminal(process, keyboard, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        os.close(keyboard)


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").glob("*")]


# --- one process ---------------------------------------------------------------------------------------------------


def test_an_interrupt_asks_only_while_there_is_something_to_save():
    before = signal.getsignal(INT)
    with StopSignals() as signals:
        assert signal.getsignal(INT) == before  # torch is still being loaded
        signals.hold_interrupts(speaks=False)
        os.kill(os.getpid(), INT)
        assert (signals.got(INT), signal.getsignal(INT)) == (True, signal.SIG_DFL)
    assert signal.getsignal(INT) == before
    StopSignals().hold_interrupts(speaks=False)  # of a program that only calls ``train``: nobody would put it back
    assert signal.getsignal(INT) == before
    assert reason(signals.flags) == "SIGINT"
    assert reason(*[signals.flags] * 100_000, 1, 1 << 17) == "SIGUSR2 and SIGTERM and SIGINT"
    assert reason(*[signals.flags] * 100_000, 1 << 51) == "stop file"
    assert crash_code(KeyboardInterrupt()) == 130  # in the job's record, where it came before


def test_interrupts_that_are_ignored_stay_so():
    """A shell lets a job in the background ignore them, and the terminal sends them to it all the same."""
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.hold_interrupts(speaks=False)
            os.kill(os.getpid(), INT)
            assert (signals.flags, signal.getsignal(INT)) == (0, signal.SIG_IGN)
    finally:
        signal.signal(INT, before)


def test_it_saves_and_the_same_command_goes_on(prepared: Prepared, tmp_path: Path):
    run_dir = tmp_path / "run"
    words = ("train", prepared.recipe, *LONG, "--run-dir", run_dir)
    with terminal(tmp_path / "log", *words) as run:
        run.until(lambda: steps_of(run_dir) > 2, "three steps")
        run.ctrl_c()
        assert run.wait() == 75, run.text
    assert "hvdtrain: interrupted: saving after this step; Ctrl-C again ends at once" in run.text
    step = int(saved(run_dir)[0].removeprefix("step-"))
    assert f"hvdtrain: stopped at step {step} (SIGINT); the same command goes on" in run.text
    assert TRACE not in run.text
    (resumed,) = launch_rows([(*words, f"train.steps={step + 1}")])
    assert f"resumed from {run_dir}/checkpoints/step-{step:08}" in resumed.text


# Saving never ends: the second Ctrl-C comes in the middle of it.
_HANGS = """
import ctypes, sys
from hvdtrain.checkpoint import writer
from hvdtrain import __main__
def hang(partial, final):
    (final.parent.parent / "saving").touch()
    while True:
        ctypes.CDLL(None).sleep(600)
writer._publish = hang
sys.exit(__main__.main())
"""


def test_a_second_one_ends_it_whatever_it_is_doing(prepared: Prepared, tmp_path: Path):
    run_dir = tmp_path / "run"
    words = ("train", prepared.recipe, *LONG, "--run-dir", run_dir)
    with terminal(tmp_path / "log", *words, program=(sys.executable, "-c", _HANGS)) as run:
        run.until(lambda: steps_of(run_dir) > 2, "three steps")
        run.ctrl_c()
        run.until((run_dir / "saving").exists, "it saves")
        began = time.monotonic()
        run.ctrl_c()
        assert run.wait() == -INT, run.text  # which shells call 130
    assert time.monotonic() - began < 30  # a busy machine's; nothing waits for the end of `sleep`
    assert TRACE not in run.text


# Ctrl-C comes when the import of torch begins.
_EARLY = """
import os, signal, sys
from hvdtrain import __main__
class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Early())
sys.exit(__main__.main())
"""


def test_while_it_is_still_loading(prepared: Prepared, tmp_path: Path):
    done = launch("train", prepared.recipe, "--run-dir", tmp_path / "run", program=(sys.executable, "-c", _EARLY))
    assert (done.exit_code, TRACE in done.text) == (130, False), done
    assert done.messages == ["hvdtrain: interrupted; the same command goes on from the last checkpoint"]
    assert not (tmp_path / "run").exists()


def test_a_sweep_lets_its_run_save_and_begins_no_other(prepared: Prepared, tmp_path: Path):
    words = ("sweep", prepared.recipe, *LONG, "--vary", "seed=1,2", "--out", tmp_path / "out")
    with terminal(tmp_path / "log", *words) as sweep:
        sweep.until(lambda: steps_of(tmp_path / "out/seed-1") > 2, "three steps of the first run")
        sweep.ctrl_c()
        assert sweep.wait() == 75, sweep.text
    assert len(saved(tmp_path / "out/seed-1")) == 1, sweep.text
    assert not (tmp_path / "out/seed-2").exists()
    assert TRACE not in sweep.text
