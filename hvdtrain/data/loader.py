"""Feeds the loop: makes the batches of the steps to come on a thread, and keeps the proof of what was consumed."""

import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from hvdtrain.data.batch import AnyBatch
from hvdtrain.data.dealing import dealt
from hvdtrain.data.ramp import Ramp
from hvdtrain.data.sampler import Share, share_of
from hvdtrain.errors import ConfigError

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Feed:
    """How a run wants its batches: the sizes of a step, and which rank of how many asks (a ``sharer``, in messages).

    ``global_tokens``: padded tokens of a step, for rows of different lengths; 0: ``global_batch * context``.
    ``ramp``: of the batch's size, up to ``global_batch``.
    ``pin``: put the batches into page-locked memory. ``speeds``: of the ranks that share a step; none: all alike.
    """

    context: int
    seed: int
    global_batch: int
    microbatch: int = 0
    rank: int = 0
    size: int = 1
    global_tokens: int = 0
    pin: bool = False
    ramp: Ramp | None = None
    sharer: str = "rank"
    speeds: tuple[float, ...] = ()

    @property
    def share(self) -> Share:
        return self._share_of(self.global_batch)

    def check_ramp(self) -> None:
        """Errors: ConfigError where the ranks cannot share one of the ramp's batches evenly."""
        if self.ramp is None:
            return
        for rows in range(self.ramp.start, self.ramp.full, self.ramp.increment):
            try:
                self._share_of(rows)
            except ConfigError:
                raise ConfigError(
                    f"a batch of {rows} sequences on the way from train.ramp_start={self.ramp.start} to "
                    f"{self.ramp.full} cannot be shared by {self.size} {self.sharer}s in microbatches of "
                    f"train.microbatch={self.microbatch}; make train.ramp_start and train.ramp_increment multiples of "
                    f"{self.size * max(1, self.microbatch)}"
                ) from None

    def run_at(self, row: int, steps: int) -> tuple[int, Share, int]:
        """(rows of a step, this rank's share of it, steps) for the steps of one size, ``steps`` of them at most, that
        begin with row number ``row``.
        """
        if self.ramp is None:
            return self.global_batch, self.share, steps
        rows = self.ramp.size_at(row)
        return rows, self._share_of(rows), self.ramp.steps_alike(row, steps)

    def _share_of(self, rows: int) -> Share:
        if not self.speeds:
            return share_of(rows, self.microbatch, self.rank, self.size, self.sharer)
        counts = dealt(rows, self.speeds)
        count = counts[self.rank]
        return Share(sum(counts[: self.rank]), count, min(self.microbatch or count, count))


@dataclass(frozen=True)
class Step:
    """What the source makes this rank's microbatches of one step from, the sum of its rows' fingerprints, and how many
    rows of the training the step takes, over all ranks.
    """

    content: Any
    fingerprint: int
    rows: int


class Source(Protocol):
    """Makes steps. ``rows_per_step`` and ``rows_per_epoch`` count all ranks' rows (or batches, where those are drawn);
    while a batch grows, its steps have fewer.

    ``steps_per_block``: how many are best made at once.
    """

    rows_per_step: int
    rows_per_epoch: int
    steps_per_block: int

    @property
    def read_through(self) -> list[Path]:
        """The shards known by now to be read through HDF5, because they cannot be mapped."""

    def block(self, first_row: int, steps: int, number: int) -> list[Step]:
        """The ``steps`` (or fewer, but one at least) from row ``first_row`` since the beginning of training on: a
        function of these alone.

        Called by the thread, in the order of ``number``. What block ``number`` returned may be overwritten when block
        ``number + BUFFERS`` is made.
        """

    def batches(self, content: Any, device: torch.device) -> Sequence[AnyBatch]:
        """A step's microbatches on the device. Called by the loop; may overwrite what it returned before."""

    def for_rank(self, rank: int) -> "Source":
        """Of that rank's share. What is costly, the two have in common: only one of them is used at a time."""

    def deal(self, speeds: tuple[float, ...]) -> None:
        """From the next block on, which is number 0, ranks share a step in proportion to ``speeds``. Called where no
        thread makes blocks. Only of rows that are alike.
        """


class OfFeed:
    """A source of the share that ``_feed`` names."""

    _feed: Feed

    def for_rank(self, rank: int) -> Self:
        other = copy(self)
        other._feed = replace(self._feed, rank=rank)
        return other

    def deal(self, speeds: tuple[float, ...]) -> None:
        self._feed = replace(self._feed, speeds=speeds)


class WithoutRows:
    """The steps of ``source``, of which this rank takes no row: only a source knows how many rows a step has."""

    def __init__(self, source: Source):
        self._source = source
        self.rows_per_step, self.rows_per_epoch = source.rows_per_step, source.rows_per_epoch
        self.steps_per_block = source.steps_per_block

    @property
    def read_through(self) -> list[Path]:
        return self._source.read_through

    def block(self, first_row: int, steps: int, number: int) -> list[Step]:
        return [Step(None, 0, step.rows) for step in self._source.block(first_row, steps, number)]

    def batches(self, content: Any, device: torch.device) -> Sequence[AnyBatch]:
        return ()

    def for_rank(self, rank: int) -> Source:
        return self

    def deal(self, speeds: tuple[float, ...]) -> None:
        self._source.deal(speeds)


BUFFERS = 3  # one that is read, one that waits, one that is filled


class TrainLoader:
    """Yields this rank's share of one optimizer step after another. Its whole state is ``rows_consumed``, which may be
    set before the first step.

    A thread makes the steps ahead. What ``next_step`` returns is valid until the next step is asked for.

    ``fingerprint`` proves the order: a sum, modulo 2**64, of one number for each row that this rank was given, made of
    the row's tokens and of its turn in the whole training. The sum over ranks is therefore equal for every rank count,
    and changes with any token and with any swap.
    """

    def __init__(self, source: Source, device: torch.device):
        self._source, self._device = source, device
        self.rows_consumed = 0
        self.rows_of_step = 0  # of the last one, over all ranks
        self.fingerprint = 0
        self._ready: deque[Step] = deque()
        self._thread: _Thread | None = None

    @property
    def epoch(self) -> int:
        return self.rows_consumed // self._source.rows_per_epoch

    place: tuple[int, int] | None = None  # see ``TicketLoader``: those of this rank's share

    def steps(self, steps: range) -> Iterable[int]:
        """Those that this rank takes part in: all."""
        return steps

    def next_step(self) -> Sequence[AnyBatch]:
        """The microbatches of the next optimizer step, in order, on the device."""
        if not self._ready:
            self._ready.extend(self._next_block())
        step = self._ready.popleft()
        self.rows_consumed += step.rows
        self.rows_of_step = step.rows
        self.fingerprint = (self.fingerprint + step.fingerprint) & _MASK
        return self._source.batches(step.content, self._device)

    def deal(self, speeds: tuple[float, ...]) -> None:
        """From the next step on, ranks share its rows in proportion to ``speeds`` (local; on all ranks after the same
        step). What was read ahead is dropped, and read anew by whoever has it now: no row is lost, none comes twice.
        """
        self.close()
        self._ready.clear()
        if self._device.type == "cuda":  # it may still fetch from buffers that will be filled anew
            torch.cuda.current_stream(self._device).synchronize()
        self._source.deal(speeds)

    def close(self) -> None:
        """End the thread (local)."""
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def _next_block(self) -> list[Step]:
        if self._thread is None:
            self._thread = _Thread(self._source, self.rows_consumed)
            weakref.finalize(self, self._thread.stop.set)
            self._thread.start()
        return self._thread.next_block(self._device)


class _Thread(threading.Thread):
    """Makes block after block, at most one ahead of what is being read. The first is of one step, so that it comes
    soon, the next of two, then of four, up to the source's ``steps_per_block``.
    """

    def __init__(self, source: Source, first_row: int):
        super().__init__(name="hvdtrain-loader", daemon=True)
        self._source, self._row = source, first_row
        self._blocks: queue.Queue[list[Step] | BaseException] = queue.Queue(maxsize=1)
        self.stop = threading.Event()
        self._asked = 0
        self._copied: dict[int, torch.cuda.Event] = {}

    def next_block(self, device: torch.device) -> list[Step]:
        """Called by the loop; an error of the thread is raised here."""
        if device.type == "cuda":  # all copies from the block before have been ordered by now
            self._copied[self._asked] = torch.cuda.Event()
            self._copied[self._asked].record()
        self._asked += 1
        block = self._blocks.get()
        if isinstance(block, BaseException):
            self._blocks.put(block)  # the thread has ended: who asks again shall not wait for ever
            raise block
        return block

    def end(self) -> None:
        """Called by the loop. A rank that leaves because another failed must not be held up here."""
        self.stop.set()
        with contextlib.suppress(queue.Empty):  # make room for what the thread may be waiting to hand over
            self._blocks.get_nowait()
        self.join()

    def run(self) -> None:
        steps, number = 1, 0
        try:
            while not self.stop.is_set():
                # Block number - 2 was taken, so the one before, whose buffer comes next, is done with; but a device may
                # still be fetching from it.
                if event := self._copied.pop(number - 2, None):
                    event.synchronize()
                block = self._source.block(self._row, steps, number)
                self._put(block)
                self._row += sum(step.rows for step in block)
                steps = min(2 * steps, self._source.steps_per_block)
                number += 1
        except BaseException as error:  # told to the loop, which is waiting
            self._put(error)

    def _put(self, block: "list[Step] | BaseException") -> None:
        while not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                self._blocks.put(block, timeout=0.1)
                return
