"""One checkpoint out of several: the mean of the weights of a run's newest ones.

Source: Vaswani et al. 2017, 6.1 (the last 5 checkpoints, or 20, each 10 minutes after the other), and fairseq's
scripts/average_checkpoints.py. What comes out is a run folder that ``evaluate`` and ``generate`` take like any other.
It has no optimizer state, so ``train`` refuses to go on from it.

    RUN_DIR/average-5/config.yaml, data/             the run's own
                      checkpoints/step-00000200/     named after the newest of them; its manifest lists all of them
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress, check_resumable
from hvdtrain.checkpoint.reader import Checkpoint
from hvdtrain.checkpoint.retention import folder_of, steps_saved
from hvdtrain.checkpoint.valid import read_progress
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.data.carried import carry_over
from hvdtrain.errors import CheckpointError, ConfigError, OutputError, plural, say
from hvdtrain.files import make_folder, move_folder, write
from hvdtrain.slices import Rect, whole_slice
from hvdtrain.trained import read_config
from hvdtrain.version import versions

PART_BYTES = 1_000_000_000


def average(run_dir: Path, last: int, out: Path | None, world: World) -> str:
    """Average the ``last`` newest whole checkpoints into ``out``, and return what was done. One process.

    Only weights as they were after a step (``raw``) are averaged, never averages. A damaged checkpoint is named on
    standard error and skipped. Memory: a file of ``PART_BYTES``, and 12 bytes for each number of its largest tensor.

    Errors: ConfigError under several ranks, where ``out`` is there already, or where fewer than ``last`` are whole
    (as in fairseq: an average of 5 shall not be one of 2); CheckpointError where there is none or they differ in shape;
    OutputError, and then ``out`` is not there.
    """
    if world.size > 1:
        raise ConfigError(f"average works on one process; {world.launcher} started {world.size}")
    if last < 1:
        raise ConfigError(f"--last {last}: give the number of checkpoints to average, 1 or more")
    out = run_dir / f"average-{last}" if out is None else out
    config = read_config(run_dir)
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already; remove it, or give another --out DIR")
    whole = _newest_whole(run_dir, last, config.checkpoint.keep_last)
    folders = [folder_of(run_dir, progress.step) for progress in whole]
    for folder, progress in zip(folders, whole, strict=True):
        check_resumable(folder, progress)  # a run's own, not made by this command
    mean = Average(folders)
    steps = tuple(progress.step for progress in whole)
    progress = replace(whole[0], averaged_from=steps, best_val_loss=None, world_size=1, versions=versions())
    _write_run(run_dir, out, mean, progress)
    return f"averaged the weights of steps {_list(steps)} into {out}"


class Average:
    """The mean of the weights of several checkpoints: ``Tensors`` that are worked out where they are read (local).

    Errors: CheckpointError where one of them has other tensors than the first.
    """

    def __init__(self, folders: Sequence[Path]):
        self._checkpoints = [Checkpoint(folder) for folder in folders]
        found = [{name: one.whole(name) for name in one if name.startswith("model.")} for one in self._checkpoints]
        self._wholes = found[0]
        for folder, wholes in zip(folders, found, strict=True):
            differing = {n for n in {**wholes, **found[0]} if wholes.get(n) != found[0].get(n)}
            if differing:
                what = f"{min(differing)} is not the same in both"
                raise CheckpointError(f"{folder} is of another model than {folders[0]}: {what}")

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(sorted(self._wholes))

    def whole(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self._wholes[name]

    def shared_out(self, part_bytes: int) -> list[list[str]]:
        """Names, in parts of so many bytes at most, or of one tensor."""
        parts: list[list[str]] = [[]]
        size = 0
        for name in self:
            shape, dtype = self.whole(name)
            length = shape.numel() * dtype.itemsize
            if parts[-1] and size + length > part_bytes:
                parts.append([])
                size = 0
            parts[-1].append(name)
            size += length
        return parts

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        """Summed in fp64, and rounded once to the type that it was saved in."""
        first, *others = self._checkpoints
        total = first.read(name, places).to(torch.float64, copy=True)
        for other in others:
            total += other.read(name, places)
        return total.div_(len(self._checkpoints)).to(self._wholes[name][1])


def _newest_whole(run_dir: Path, last: int, keep_last: int) -> list[Progress]:
    whole: list[Progress] = []
    damaged = 0
    for step in steps_saved(run_dir):
        if len(whole) == last:
            break
        try:
            whole.append(read_progress(folder_of(run_dir, step)))
        except CheckpointError as error:
            damaged += 1
            say(f"note: damaged checkpoint skipped: {error}")
    if len(whole) == last:
        return whole
    if not whole:
        raise CheckpointError(f"{run_dir} has no whole checkpoint to average")
    count = plural(len(whole), "whole checkpoint")
    steps = _list(progress.step for progress in whole)
    why = f"; {damaged} more {'is' if damaged == 1 else 'are'} damaged" if damaged else ""
    if 0 < keep_last < last:
        why += (
            f"; the run keeps no more than checkpoint.keep_last={keep_last}: set it to {last} or 0 (all) for the next"
        )
    raise ConfigError(f"{run_dir} has {count} (step {steps}), not --last {last}{why}; or give --last {len(whole)}")


def _write_run(run_dir: Path, out: Path, mean: Average, progress: Progress) -> None:
    """Everything beside its final name, renamed when it is whole."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        write(partial / "config.yaml", lambda temporary: shutil.copyfile(run_dir / "config.yaml", temporary))
        carry_over(run_dir, partial)
        _write_checkpoint(partial, mean, progress)
        move_folder(partial, out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(run_dir: Path, mean: Average, progress: Progress) -> None:
    """A part of the checkpoint at a time is in memory."""
    writer.begin(run_dir, progress.step)
    shares, group = mean.shared_out(PART_BYTES), LocalGroup()
    parts = []
    for number, names in enumerate(shares):
        pieces = [whole_slice(name, mean.read(name), group) for name in names]
        parts.append(writer.write_part(run_dir, progress.step, pieces, number, len(shares)))
    writer.finish(run_dir, progress, parts, CheckpointOptions(keep_last=0))


def _list(steps) -> str:
    return ", ".join(map(str, steps))
