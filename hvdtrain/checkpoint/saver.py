"""When a run saves, and how it gets on meanwhile: at once, or on a thread of each rank beside the training.

    loop     step 5 | copy | step 6 | step 7 | step 8 | step 9 |       | step 10
    thread           [ write own part, flush, digest ]
    ranks                   "not yet"  "not yet"  "mine is written" ...    one sum a step, read at the next boundary
    rank 0                                              [ manifest, rename, drop the old ]

No thread ever speaks to another rank: a collective from a second thread would mix with the loop's, and looking for the
others' files would trust a parallel file system to show them soon. Instead the loop, while a save is under way, starts
one sum of two integers at each step boundary and reads it at the next; it travels under the step, and as all ranks read
the same, all go on, or fail, at the same step. What a crash can so lose is a checkpoint whose parts are written and
whose manifest waits for the boundary: the one before is whole, and stays until the new one is.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import PartFile, Progress, key_of
from hvdtrain.checkpoint.retention import Score, best_of, folder_of, is_better, partial_of, remove, remove_left_over
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.group import Group
from hvdtrain.comm.ranks import Pending
from hvdtrain.errors import EXIT_IO, HvdtrainError, RankError, say
from hvdtrain.slices import Slice

_FIRST = 500  # steps to the first checkpoint, where `every` says nothing and the next ones come by measurement


def interval_steps(save_s: float, step_s: float, mtbf_s: float) -> int:
    """Steps between checkpoints that lose least time: to saving, and to doing again what a failure undid. At least 1.

    save_s: what a save holds up the loop; step_s: a step; mtbf_s: expected time between failures of the whole job.
    Source: Daly 2006, eq. 37 (Young 1974 is its first term, sqrt(2 save_s mtbf_s)).
    """
    if save_s >= 2 * mtbf_s:
        interval_s = mtbf_s
    else:
        ratio = save_s / (2 * mtbf_s)
        interval_s = math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s
    return max(1, round(interval_s / max(step_s, 1e-9)))


@dataclass
class _Save:
    """One under way. ``work``: what this rank's thread does for it now; ``parts``: of all ranks, once all are there."""

    progress: Progress
    score: Score | None
    is_last: bool
    began_s: float
    work: Future
    parts: list[PartFile] | None = None


class Saver(AbstractContextManager):
    """Saves the checkpoints of one run, as ``checkpoint.*`` asks. Making one is a collective, and so is every method
    that is not marked *local*: all ranks call it at the same step.

        with Saver(run_dir, group, options, first_step) as saver:
            ... a step ...
            lines += saver.poll()
            if saver.is_due(step):
                lines += saver.save(state, progress)

    The lines that come back are for the log. ``failures``: saves that failed and that the run survived, for its record.
    ``save_s``: seconds from the beginning of the last save until it was whole (rank 0 knows); ``blocked_s``: how long
    the loop was held up by it.

    Memory: asynchronous, each rank's part of the checkpoint once more on the host; pinned where it comes from a GPU,
    which rounds each tensor up to a power of two.

    Errors, on all ranks alike: RankError with exit code 74 where a checkpoint could not be written and ``on_error`` is
    "stop", or it is the last. Asynchronous, that is at the latest when the next one is due or the run ends.
    """

    def __init__(
        self,
        run_dir: Path,
        group: Group,
        options: CheckpointOptions,
        step: int = 0,
        check_owner: Callable[[], None] = lambda: None,
    ):
        """step: what the run has behind it. check_owner: raises where the run folder is not ours any more (rank 0)."""
        self._run_dir, self._group, self._options, self._check_owner = run_dir, group, options, check_owner
        self._is_main = group.rank == 0
        self._pool = ThreadPoolExecutor(1, "hvdtrain-saver") if options.asynchronous else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._save: _Save | None = None
        self._told: tuple[torch.Tensor, Pending] | None = None
        self._next = step + (options.every or _FIRST)  # only where the interval is measured
        self._interval = 0
        self._mark: tuple[int, float] | None = None
        self.failures: list[str] = []
        self.save_s = self.blocked_s = 0.0
        self._best: float | None = None
        if self._is_main:
            remove_left_over(run_dir)
        if options.keep_best:
            self._best = group.all_gather_object(best_of(run_dir, options.best) if self._is_main else None)[0]

    def is_due(self, step: int) -> bool:
        """Is a checkpoint due after ``step``? The same on all ranks; called as each step begins (local)."""
        if self._mark is None:
            self._mark = step - 1, time.monotonic()
        if self._options.mtbf_hours:
            return step >= self._next
        return self._options.every > 0 and step % self._options.every == 0

    def is_best(self, score: Score) -> bool:
        """With ``keep_best``: is this score worth a checkpoint? As rank 0 finds it."""
        if not self._options.keep_best:
            return False
        return self._group.all_gather_object(is_better(score, self._best))[0]

    def save(
        self,
        state: Sequence[Slice],
        progress: Progress,
        score: Score | None = None,
        last: bool = False,
    ) -> list[str]:
        """Save ``state``, this rank's slices, as it is now; asynchronous, return as soon as there is a copy of it.

        A save that is still under way is waited for. score: of a validation at this very step.
        last: the process ends afterwards: return when the checkpoint is whole, and fail where it is not.
        """
        began_s, step = time.monotonic(), progress.step
        step_s = self._step_s(step, began_s)
        lines = self.drain()
        self.blocked_s = 0.0
        if self._pool is None:
            lines += self._save_now(state, progress, score, last)
        else:
            lines += self._begin(writer.share(state, self._group), progress, score, last)
        self.blocked_s += time.monotonic() - began_s
        if last:
            lines += self.drain()
        elif self._options.mtbf_hours:
            lines += self._plan_next(step, step_s)
        self._mark = step, time.monotonic()
        return lines

    def poll(self) -> list[str]:
        """After every step: has a save under way come further? Where there is none, nothing is done."""
        if self._save is None:
            return []
        began_s, lines = time.monotonic(), []
        if self._told is not None:
            ended, failed = self._settle()
            if failed or ended == self._group.size:
                lines = self._advance()
        if self._save is not None:
            work = self._save.work
            ended = work.done()
            told = torch.tensor([ended, ended and work.exception() is not None], dtype=torch.int64)
            self._told = told, self._group.all_reduce_sum_async(told, "hvdtrain.checkpoint.saver")
        self.blocked_s += time.monotonic() - began_s
        return lines

    def drain(self) -> list[str]:
        """Wait until no save is under way."""
        lines = []
        while self._save is not None:
            if self._told is not None:
                self._settle()
            lines += self._advance()
        return lines

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Drained, unless this rank fails alone: the others would not come to meet it."""
        try:
            if error is None:
                self.drain()
            elif self._group.size == 1 or getattr(error, "on_all_ranks", False):
                self._drain_beside(error)
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def _drain_beside(self, error: BaseException) -> None:
        """The run has failed already, and that shall be its last word."""
        try:
            lines = self.drain()
        except HvdtrainError as other:
            lines = [f"note: {other}"]
        if self._is_main:
            for line in lines:
                say(line)

    def _save_now(self, state: Sequence[Slice], progress: Progress, score: Score | None, is_last: bool) -> list[str]:
        began_s = time.monotonic()
        try:
            writer.save(self._run_dir, state, progress, self._group, self._options, score, self._check_owner)
        except RankError as error:
            return self._failed(error, progress.step, is_last)
        return self._whole(progress.step, score, time.monotonic() - began_s)

    def _begin(self, pieces: Sequence[Slice], progress: Progress, score: Score | None, is_last: bool) -> list[str]:
        """Copy what this rank writes, and hand the copy to the thread."""
        began_s, step = time.monotonic(), progress.step
        run_dir, group = self._run_dir, self._group
        copies, copied = self._copy(pieces)
        try:
            group.on_main(lambda: writer.begin(run_dir, step))
        except RankError as error:
            return self._failed(error, step, is_last)
        rank, size = group.rank, group.size

        def write() -> PartFile:
            copied()
            return writer.write_part(run_dir, step, copies, rank, size)

        self._save = _Save(progress, score, is_last, began_s, self._pool.submit(write))
        return []

    @torch.no_grad()
    def _copy(self, pieces: Sequence[Slice]) -> tuple[list[Slice], Callable[[], object]]:
        """Fill the buffers, which are those of the save before. Returns them, and what waits until they are full.

        From a GPU the copies stand in its queue before the next step's kernels: the loop needs not wait for them.
        """
        buffers, device = {}, None
        for piece in pieces:
            key, tensor = key_of(piece), piece.tensor
            buffer = self._buffers.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffer.copy_(tensor, non_blocking=True)
            buffers[key] = buffer
            device = tensor.device if tensor.is_cuda else device
        self._buffers = buffers
        copies = [replace(piece, tensor=buffer) for piece, buffer in zip(pieces, buffers.values(), strict=True)]
        if device is None:
            return copies, lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return copies, event.synchronize

    def _settle(self) -> list[int]:
        """How many ranks' threads had ended at the boundary before, and how many of them failed."""
        (told, pending), self._told = self._told, None
        pending.wait()
        return told.tolist()

    def _advance(self) -> list[str]:
        """When the parts are written: the manifest; when that is: done. Waits for this rank's thread."""
        save = self._save
        step = save.progress.step
        try:
            result = self._group.together(save.work.result)
            if save.parts is None:
                save.parts = self._group.all_gather_object(result)
                save.work = self._finish(save)
                return []
        except RankError as error:
            self._save = None
            if self._is_main:  # no rank writes any more
                remove(partial_of(self._run_dir, step))
            return self._failed(error, step, save.is_last)
        self._save = None
        return self._whole(step, save.score, result - save.began_s)

    def _finish(self, save: _Save) -> Future:
        """Rank 0 writes the manifest; the others have nothing to do. The result: when it was there (monotonic)."""
        run_dir, options, is_main = self._run_dir, self._options, self._is_main

        def finish() -> float:
            if is_main:
                self._check_owner()
                writer.finish(run_dir, save.progress, save.parts, options, save.score)
            return time.monotonic()

        return self._pool.submit(finish)

    def _whole(self, step: int, score: Score | None, save_s: float) -> list[str]:
        self.save_s = save_s
        if score is not None and is_better(score, self._best):
            self._best = score.value
        return [f"step {step}: saved {folder_of(self._run_dir, step)}"]

    def _failed(self, error: RankError, step: int, is_last: bool) -> list[str]:
        if error.exit_code != EXIT_IO or is_last or self._options.on_error == "stop":
            raise error
        failure = f"saving at step {step} failed, and training went on: {error}"
        self.failures.append(failure)
        return [f"hvdtrain: note: {failure}"]

    def _step_s(self, step: int, now_s: float) -> float:
        """Mean seconds of a step since the last save."""
        since, then_s = self._mark or (step - 1, now_s)
        return (now_s - then_s) / max(1, step - since)

    def _plan_next(self, step: int, step_s: float) -> list[str]:
        """Set when the next checkpoint is due by what rank 0 has measured."""
        interval = interval_steps(self.blocked_s, step_s, 3600 * self._options.mtbf_hours)
        if self._pool is not None:  # and the thread must have done with it
            interval = max(interval, math.ceil(self.save_s / max(step_s, 1e-9)))
        interval = self._group.all_gather_object(interval)[0]
        self._next = step + interval
        if abs(interval - self._interval) <= self._interval / 5:
            return []
        self._interval = interval
        return [f"hvdtrain: a checkpoint every {interval} steps ({self._options.mtbf_hours:g} h between failures)"]
