"""Saving beside the training: what is saved is what was, nothing half-written counts, and no failure goes unnoticed."""

import errno
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import command
import pytest
import torch
from checkpoints import state_of, tensors_in
from hypothesis import given
from hypothesis import strategies as st
from launch import snapshot
from threads import ThreadGroup, on_ranks
from tiny import tiny_decoder

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.retention import Score, folder_of, steps_saved
from hvdtrain.checkpoint.saver import Saver, interval_steps
from hvdtrain.checkpoint.valid import newest_valid
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import EXIT_CRASH, EXIT_IO, DivergedError, RankError
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import whole_slices

GROUP = LocalGroup()
ASYNC = CheckpointOptions(asynchronous=True, keep_last=0)
LIMIT_S = 60


class Run:
    """A model that changes with every step, and its saver."""

    def __init__(self, run_dir: Path, options: CheckpointOptions = ASYNC):
        self.run_dir, self.model = run_dir, tiny_decoder()
        self.optimizer, self.ema = (
            make_optimizer(self.model.parameters(), OptimOptions()),
            Ema(whole_slices(self.model, LocalGroup()), EmaOptions(decay=0.9)),
        )
        self.saver, self.step = Saver(run_dir, GROUP, options), 0

    def walk(self) -> None:
        self.step += 1
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * self.step)
        self.optimizer.step()
        self.ema.update(self.step)

    def save(self, **more) -> list[str]:
        self.walk()
        return self.saver.save(state_of(self.model, self.optimizer, self.ema), Progress(step=self.step), **more)

    def poll_until(self, step: int) -> list[str]:
        """Boundary after boundary, until the checkpoint of ``step`` is there."""
        lines = []
        command.until(lambda: bool(lines.extend(self.saver.poll()) or lines), f"checkpoint of step {step}", LIMIT_S)
        assert lines == [f"step {step}: saved {folder_of(self.run_dir, step)}"]
        return lines


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Threads write only when it is set."""
    event, write = threading.Event(), writer.write_part

    def write_later(*args):
        assert event.wait(LIMIT_S)
        return write(*args)

    monkeypatch.setattr(writer, "write_part", write_later)
    yield event
    event.set()


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def test_the_files_are_those_of_a_save_at_once(tmp_path: Path):
    for folder, options in (
        ("one", CheckpointOptions(keep_last=2)),
        ("two", ASYNC.model_copy(update={"keep_last": 2})),
    ):
        run = Run(tmp_path / folder, options)
        with run.saver:
            lines = [line for last in (False, False, True) for line in run.save(last=last)]
        assert lines == [f"step {n}: saved {tmp_path / folder}/checkpoints/step-{n:08d}" for n in (1, 2, 3)]
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert steps_saved(tmp_path / "two") == [3, 2]


def test_what_is_saved_is_what_was(tmp_path: Path, held: threading.Event):
    """Training goes on, and changes weights, moments and averages, before the first byte is written."""
    run = Run(tmp_path)
    assert run.save() == []
    now = {piece.name: piece.tensor for piece in state_of(run.model, run.optimizer, run.ema)}
    then = {name: tensor.clone() for name, tensor in now.items()}
    for _ in range(3):
        run.walk()
        assert run.saver.poll() == []
    assert names(tmp_path) == {".step-00000001.partial"}
    held.set()
    run.poll_until(1)
    found = tensors_in(folder_of(tmp_path, 1))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in then.items()}
    assert all(not torch.equal(then[name], now[name]) for name in now if name != "ema_began")
    assert run.saver.poll() == run.saver.drain() == []


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, held: threading.Event):
    run = Run(tmp_path)
    run.save()
    buffers = {name: tensor.data_ptr() for name, tensor in run.saver._buffers.items()}
    timer = threading.Timer(0.3, held.set)
    timer.start()
    assert run.save() == [f"step 1: saved {folder_of(tmp_path, 1)}"]
    assert held.is_set()
    assert {name: tensor.data_ptr() for name, tensor in run.saver._buffers.items()} == buffers  # no new memory
    assert run.saver.blocked_s > 0.2
    assert run.save(last=True)[-1] == f"step 3: saved {folder_of(tmp_path, 3)}"
    assert newest_valid(tmp_path, GROUP)[1].step == 3
    assert run.saver.save_s > 0


# --- failures ----------------------------------------------------------------------------------------------------


def no_space(*_args, **_named) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


PHASES = {"part": (writer, "save_file"), "manifest": (Path, "write_text"), "name": (writer, "_publish")}


@pytest.mark.parametrize("phase", PHASES)
def test_a_failure_of_the_thread_ends_the_run_at_a_boundary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
):
    run = Run(tmp_path)
    run.save(last=True)
    before = snapshot(tmp_path)
    monkeypatch.setattr(*PHASES[phase], no_space)
    deadline = time.monotonic() + LIMIT_S
    with pytest.raises(RankError, match=r"OutputError: cannot (save|write) .*No space left") as caught, run.saver:
        run.save()
        while time.monotonic() < deadline:
            run.walk()
            run.saver.poll()
    assert caught.value.exit_code == EXIT_IO
    assert snapshot(tmp_path) == before
    assert names(tmp_path) == {"step-00000001"}


def test_a_mistake_of_ours_on_the_thread_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path, CheckpointOptions(asynchronous=True, on_error="continue"))  # which is about the disk
    monkeypatch.setattr(writer, "save_file", lambda *_: {}["no such key"])
    run.save()
    with pytest.raises(RankError, match="KeyError") as caught:
        run.saver.drain()
    assert caught.value.exit_code == EXIT_CRASH


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool):
    """A full disk costs checkpoints, and each is said; but the run does not end without its last one."""
    run = Run(tmp_path, CheckpointOptions(asynchronous=asynchronous, on_error="continue"))
    lines = run.save()
    lines += run.saver.drain()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", no_space)
        lines += run.save()
        lines += run.saver.drain()
        with pytest.raises(RankError, match="No space left") as caught:
            run.save(last=True)
    assert caught.value.exit_code == EXIT_IO
    (failure,) = run.saver.failures
    assert lines == [f"step 1: saved {folder_of(tmp_path, 1)}", f"hvdtrain: note: {failure}"]
    reason = f"OutputError: cannot save {folder_of(tmp_path, 2)}: No space left on device"
    assert failure == f"saving at step 2 failed, and training went on: {reason}"
    assert names(tmp_path) == {"step-00000001"}
    assert run.save(last=True) == [f"step 4: saved {folder_of(tmp_path, 4)}"]  # with room again


def test_a_run_that_diverges_has_its_checkpoint_first(
    tmp_path: Path, held: threading.Event, capfd: pytest.CaptureFixture
):
    run = Run(tmp_path)
    run.save()
    threading.Timer(0.2, held.set).start()
    with pytest.raises(DivergedError), run.saver:
        raise DivergedError("the loss is nan")
    assert newest_valid(tmp_path, GROUP)[1].step == 1
    assert capfd.readouterr().err == f"hvdtrain: step 1: saved {folder_of(tmp_path, 1)}\n"


def test_a_rank_that_fails_alone_does_not_wait_for_the_others(tmp_path: Path, held: threading.Event):
    def work(group: ThreadGroup) -> None:
        saver = Saver(tmp_path, group, ASYNC)
        model = tiny_decoder()
        saver.save(state_of(model), Progress(step=1))
        if group.rank == 0:
            met = group.meetings
            with pytest.raises(ZeroDivisionError), saver:
                _ = 1 // 0
            assert group.meetings == met

    on_ranks(2, work)
    assert not held.is_set()


KILLED = {
    "half a part": (writer, "save_file", [None, 1]),
    "no digest": (writer, "file_sha256", [None, 1]),
    "half a manifest": (Path, "write_text", [None, 1]),
    "no name": (writer, "_publish", [None, 1]),
    "named": (writer, "drop_old", [None, 2]),
    "half deleted": (writer, "drop_old", ["half", 2]),
}


@pytest.mark.parametrize("phase", KILLED)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_any_moment(tmp_path: Path, phase: str, asynchronous: bool):
    """A process that ends at once, as by SIGKILL: there is a whole checkpoint, and the next save leaves no rubbish."""
    options = CheckpointOptions(asynchronous=asynchronous, keep_last=1)
    Run(tmp_path, options).save(last=True)
    where, name, (how, expected) = KILLED[phase]

    def die(*args, **_named) -> None:
        if isinstance(args[0], dict):
            Path(args[1]).write_bytes(b"half")
        if isinstance(args[0], Path) and name == "write_text":
            args[0].write_bytes(b'{"format": 1')
        if how == "half":
            folder = folder_of(tmp_path, 1)
            os.replace(folder, folder.with_name(f".{folder.name}.old"))
        os._exit(9)

    if (pid := os.fork()) == 0:
        setattr(where, name, die)
        try:
            run = Run(tmp_path, options)
            run.step = 1
            run.save(last=True)
        finally:
            os._exit(1)
    ended = []
    command.until(lambda: bool(ended.extend(p for p in [os.waitpid(pid, os.WNOHANG)] if p[0]) or ended), "end", LIMIT_S)
    assert os.waitstatus_to_exitcode(ended[0][1]) == 9
    assert newest_valid(tmp_path, GROUP)[1].step == expected
    assert any(name.startswith(".") for name in names(tmp_path)) == (phase != "named")
    run = Run(tmp_path, options)  # removes what was left
    assert not any(name.startswith(".") for name in names(tmp_path))
    run.step = 2
    run.save(last=True)
    assert names(tmp_path) == {"step-00000003"}


# --- when --------------------------------------------------------------------------------------------------------


@given(
    save_s=st.floats(0.01, 1000),
    step_s=st.floats(0.001, 10),
    mtbf_s=st.floats(600, 1e7),
)
def test_the_interval_loses_least(save_s: float, step_s: float, mtbf_s: float):
    """Daly's cost of a run with failures at random: no interval half or twice as long is better by a thousandth."""

    def cost(interval_s: float) -> float:
        return math.expm1(min(700, (interval_s + save_s) / mtbf_s)) / interval_s

    steps = interval_steps(save_s, step_s, mtbf_s)
    assert steps >= 1
    best = min(cost(steps * step_s * factor) for factor in (0.5, 0.8, 1.25, 2.0))
    if steps >= 20 and save_s < mtbf_s / 2:  # rounding to whole steps says nothing then
        assert cost(steps * step_s) <= best * 1.001


def test_intervals_by_hand():
    assert interval_steps(5.0, 1.0, 10_000.0) == 313  # sqrt(2 * 5 * 10000) = 316.2, + 1.7 - 5
    assert interval_steps(5.0, 0.5, 10_000.0) == 626
    assert interval_steps(10_000.0, 10.0, 3600.0) == 360  # saving takes longer than the machine lasts
    assert interval_steps(0.0, 1.0, 3600.0) == interval_steps(1.0, 1e6, 60.0) == 1
    assert interval_steps(1.0, 0.0, 3600.0) > 1_000_000


def test_due_every_so_many_steps(tmp_path: Path):
    due = Saver(tmp_path, GROUP, CheckpointOptions(every=4), step=5).is_due
    assert [step for step in range(6, 20) if due(step)] == [8, 12, 16]
    assert not any(map(Saver(tmp_path, GROUP, CheckpointOptions(every=0)).is_due, range(1, 2000)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_due_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool):
    """The first as ``every`` says, the next by what saving and a step took on rank 0."""
    clock = [0.0]
    monkeypatch.setattr("hvdtrain.checkpoint.saver.time.monotonic", lambda: clock[0])

    def slow(*args, **named):
        clock[0] += 5.0

    options = CheckpointOptions(every=10, mtbf_hours=10_000 / 3600, asynchronous=asynchronous)
    run = Run(tmp_path, options)
    monkeypatch.setattr(writer, "begin", slow)  # held up by that in both ways
    monkeypatch.setattr(writer, "write_part", lambda *_: None)
    monkeypatch.setattr(writer, "finish", lambda *_: None)
    saved, lines = [], []
    for step in range(1, 1000):
        due = run.saver.is_due(step)
        clock[0] += 1.0
        run.saver.drain()
        if due:
            run.step = step - 1
            lines += run.save()
            saved.append(step)
    assert saved == [10, 10 + 313, 10 + 2 * 313, 10 + 3 * 313]
    said = [line for line in lines if line.startswith("hvdtrain: a checkpoint")]
    assert said == ["hvdtrain: a checkpoint every 313 steps (2.77778 h between failures)"]


def test_the_best_is_worth_a_checkpoint(tmp_path: Path):
    best = CheckpointOptions(asynchronous=True, keep_best=True, keep_last=1)
    run = Run(tmp_path, best)

    def loss(value: float) -> Score:
        return Score("val_loss", value, -1)

    assert run.saver.is_best(loss(3.0))
    assert not run.saver.is_best(loss(math.nan))
    for val_loss in (3.0, 2.0, 2.5, None, 9.0):
        run.save(score=None if val_loss is None else loss(val_loss))
    run.saver.drain()
    assert names(tmp_path) == {"step-00000002", "step-00000005", "best.json"}
    resumed = Run(tmp_path, best)
    assert [resumed.saver.is_best(loss(value)) for value in (2.0, 1.9)] == [False, True]
    assert not Run(tmp_path).saver.is_best(loss(0.0))
