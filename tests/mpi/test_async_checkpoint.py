"""Saving beside the training on several ranks: no thread speaks to another rank, and still all know the same."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from checkpoints import state_of
from tiny import tiny_decoder

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import load
from hvdtrain.checkpoint.retention import Score, folder_of
from hvdtrain.checkpoint.saver import Saver
from hvdtrain.checkpoint.valid import newest_valid
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.errors import EXIT_IO, DivergedError, RankError
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import whole_slices

LIMIT_S = 60


class Run:
    def __init__(self, group: HorovodGroup, run_dir: Path, **options):
        self.group, self.run_dir, self.step, self.boundaries = group, run_dir, 0, 0
        self.model = tiny_decoder()
        self.optimizer = make_optimizer(self.model.parameters(), OptimOptions())
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.saver = Saver(run_dir, group, CheckpointOptions(asynchronous=True, **options))

    def save(self, **more) -> list[str]:
        self.step += 1
        self.optimizer.step()
        return self.saver.save(state_of(self.model, self.optimizer), self.progress(), **more)

    def progress(self) -> Progress:
        return Progress(self.step, world_size=self.group.size)

    def boundary(self) -> list[str]:
        """What a step brings: something summed over the ranks, and a look at the save."""
        self.boundaries += 1
        self.group.all_reduce_sum(torch.ones(1), "step")
        return self.saver.poll()

    def walk(self) -> list[str]:
        """Steps, until the save has said something. As all ranks agree, none is left behind in a sum."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            if lines := self.boundary():
                return lines
        raise TimeoutError("the save has not ended")

    def assert_whole(self, step: int) -> None:
        found, progress, damaged = newest_valid(self.run_dir, self.group)
        assert (found, progress.step, damaged) == (folder_of(self.run_dir, step), step, [])
        parts = [f"part-{rank:05d}-of-{self.group.size:05d}.safetensors" for rank in range(self.group.size)]
        assert sorted(file.name for file in found.iterdir()) == ["manifest.json", *parts]

    def left_over(self) -> list[str]:
        self.group.barrier()  # rank 0 clears up
        found = sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())
        self.group.barrier()  # and goes on to the next save
        return found


@pytest.fixture
def slow(group: HorovodGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's thread takes its own time."""
    write = writer.write_part

    def write_slowly(*args):
        time.sleep(0.1 * group.rank)
        return write(*args)

    monkeypatch.setattr(writer, "write_part", write_slowly)


def test_all_know_at_the_same_step_that_it_is_whole(group: HorovodGroup, folder: Path, slow: None):
    run = Run(group, folder, keep_last=1)
    for step in (1, 2):
        assert run.save() == []
        assert run.walk() == [f"step {step}: saved {folder_of(folder, step)}"]
        group.agree(run.boundaries, "the number of steps")
        run.assert_whole(step)
    assert run.left_over() == ["step-00000002"]
    model = tiny_decoder(seed=9)
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    load(folder_of(folder, 2), whole_slices(model, group), optimizer)
    for saved, loaded in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(saved, loaded)
        assert all(torch.equal(run.optimizer.state[saved][k], v) for k, v in optimizer.state[loaded].items())


def test_a_save_that_is_still_under_way_is_waited_for(group: HorovodGroup, folder: Path, slow: None):
    run = Run(group, folder)
    run.save()
    run.boundary()  # a sum is under way when the next save comes
    assert run.save() == [f"step 1: saved {folder_of(folder, 1)}"]
    assert run.save(last=True) == [f"step {step}: saved {folder_of(folder, step)}" for step in (2, 3)]
    run.assert_whole(3)
    run.saver.__exit__(None, None, None)


def test_a_rank_that_cannot_write_is_an_error_on_all(
    group: HorovodGroup, folder: Path, slow: None, monkeypatch: pytest.MonkeyPatch
):
    """At the same step, with the reason; whoever is still writing is waited for. The next save is a new one."""
    run, last = Run(group, folder), group.size - 1
    run.save(last=True)

    def disk_full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for way in (run.walk, run.saver.drain):
        with monkeypatch.context() as patched:
            if group.rank == last:
                patched.setattr(writer, "save_file", disk_full)
            run.save()
            with pytest.raises(RankError) as caught:
                way()
        reason = "No space left on device" + (f" (on rank {last})" if last else "")
        assert str(caught.value) == f"OutputError: cannot save {folder_of(folder, run.step)}: {reason}"
        assert caught.value.exit_code == EXIT_IO
        group.agree(run.boundaries, "the number of steps")
        assert run.left_over() == ["step-00000001"]
    assert run.save(last=True) == [f"step 4: saved {folder_of(folder, 4)}"]


def test_rank_0_cannot_write_the_manifest_and_training_goes_on(
    group: HorovodGroup, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(group, folder, on_error="continue")

    def disk_full(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        if group.rank == 0:
            patched.setattr(writer, "_publish", disk_full)
        run.save()
        lines = run.walk()
    group.agree((lines, run.saver.failures, run.boundaries), "what was said")
    assert lines == [f"hvdtrain: note: {failure}" for failure in run.saver.failures]
    assert "went on: OutputError: cannot save" in lines[0]
    assert "Input/output error" in lines[0]
    assert run.left_over() == []
    run.save(last=True)
    run.assert_whole(2)


def test_all_that_fail_together_save_first(group: HorovodGroup, folder: Path, slow: None):
    run = Run(group, folder)
    run.save()
    with pytest.raises(DivergedError), run.saver:
        raise DivergedError("the loss is nan")
    run.assert_whole(1)


def test_all_take_the_interval_and_the_best_of_rank_0(group: HorovodGroup, folder: Path):
    """Whose clocks and disks differ."""
    run = Run(group, folder, every=2, mtbf_hours=1e-3 * (1 + group.rank), keep_best=True)
    with run.saver:
        due = []
        for step in range(1, 8):
            if run.saver.is_due(step):
                run.step = step - 1
                run.save(score=Score("val_loss", 1.0, -1))
                due.append(step)
            time.sleep(0.02 * (1 + group.rank))
            run.boundary()
    group.agree(due, "when checkpoints were due")
    assert due[0] == 2
    group.agree(
        Saver(folder, group, CheckpointOptions(keep_best=True)).is_best(Score("val_loss", 0.5, -1)), "what is best"
    )
