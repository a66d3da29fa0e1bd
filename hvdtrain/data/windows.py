"""Rows that are windows of the token stream (GPT style), gathered for many steps at once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.data.loader import BUFFERS, Feed, OfFeed, Step
from hvdtrain.data.mixture import BLOCK, Mixture
from hvdtrain.data.sampler import WindowSampler, even_parts, mix
from hvdtrain.data.stream import TokenStream

_BLOCK_TOKENS = 1 << 20  # gathered at once: so many that handing them over costs little


class RowSampler(Protocol):
    """Where rows begin in the stream: ``WindowSampler`` and ``MixedWindows``."""

    @property
    def context(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int: ...

    def starts_of(self, rows: np.ndarray) -> np.ndarray:
        """Starts of the rows with these numbers since the beginning of training, ascending: int64 [rows]."""


class MixedWindows:
    """Rows of several corpora that follow one another in the stream, mixed by weight; each has its own epochs.

    ``bases``: where each corpus begins in the stream. An epoch is here as many rows as all corpora have together.
    """

    def __init__(self, samplers: Sequence[WindowSampler], bases: np.ndarray, weights: Sequence[float], seed: int):
        self._samplers, self._bases = samplers, bases
        self.mixture = Mixture(weights, seed)
        self.context = samplers[0].context
        self.rows_per_epoch = sum(sampler.rows_per_epoch for sampler in samplers)

    def starts_of(self, rows: np.ndarray) -> np.ndarray:
        starts = np.empty(len(rows), np.int64)
        blocks = rows // BLOCK
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == block)
            corpora, numbers = self.mixture.place(block * BLOCK, BLOCK)
            corpora, numbers = corpora[rows[here] - block * BLOCK], numbers[rows[here] - block * BLOCK]
            for corpus in np.unique(corpora).tolist():
                chosen = corpora == corpus
                starts[here[chosen]] = self._samplers[corpus].starts_of(numbers[chosen]) + self._bases[corpus]
        return starts


class WindowSource(OfFeed):
    """Steps of windows. The thread gathers them as narrow as they lie on disk; they are widened to int64 when a step is
    handed out: on the CPU into one buffer, which stays in the cache; on a GPU by the GPU, after a quarter of the bytes
    has travelled, from page-locked buffers.
    """

    def __init__(self, stream: TokenStream, sampler: RowSampler, feed: Feed):
        self._stream, self._sampler = stream, sampler
        self.rows_per_step = feed.global_batch
        self.rows_per_epoch = sampler.rows_per_epoch
        self._width = sampler.context + 1
        self._fingerprints = Fingerprints(self._width)
        self._pinned: dict[int, torch.Tensor] = {}
        self._fit(feed)

    def deal(self, speeds: tuple[float, ...]) -> None:
        self._fit(replace(self._feed, speeds=speeds))

    def _fit(self, feed: Feed) -> None:
        self._feed, rows_of_rank = feed, feed.share.count
        steps_per_epoch = self.rows_per_epoch // feed.global_batch
        self.steps_per_block = steps_per_block(rows_of_rank * self._width, steps_per_epoch)
        self._wide = torch.empty(rows_of_rank, self._width, dtype=torch.int64)
        self._wide_batches = self._cut(self._wide)

    @property
    def read_through(self) -> list[Path]:
        return self._stream.read_through

    def block(self, first_row: int, steps: int, number: int) -> list[Step]:
        rows_per_step, share, steps = self._feed.run_at(first_row, steps)
        firsts = first_row + share.first + np.arange(steps) * rows_per_step
        rows = (firsts[:, None] + np.arange(share.count)).reshape(-1)
        windows = self._stream.windows(self._sampler.starts_of(rows), self._width)
        sums = self._fingerprints.of_rows(windows, rows).reshape(steps, -1).sum(axis=1, dtype=np.uint64).tolist()
        by_step = windows.reshape(steps, share.count, self._width)
        content = self._pin(by_step, number) if self._feed.pin else by_step
        return [Step(narrow, total, rows_per_step) for narrow, total in zip(content, sums, strict=True)]

    def batches(self, content: np.ndarray | torch.Tensor, device: torch.device) -> Sequence[Batch]:
        if isinstance(content, np.ndarray):
            ids = self._wide[: len(content)]
            ids.numpy()[...] = content
            return self._wide_batches if len(ids) == len(self._wide) else self._cut(ids)
        ids = content.to(device, non_blocking=True).long()
        return self._cut(
            ids.bitwise_and_((1 << 8 * self._stream.dtype.itemsize) - 1)
        )  # they travelled as signed numbers

    def _pin(self, windows: np.ndarray, number: int) -> torch.Tensor:
        """A copy in page-locked memory: one of the buffers that are used in turn."""
        signed = torch.from_numpy(windows.view(f"i{windows.itemsize}"))
        place = number % BUFFERS
        if place not in self._pinned or self._pinned[place].shape != signed.shape:
            self._pinned[place] = torch.empty_like(signed, pin_memory=True)
        return self._pinned[place].copy_(signed)

    def _cut(self, ids: torch.Tensor) -> list[Batch]:
        """The microbatches of a step, as views: ids int64 [rows, T + 1]."""
        parts = ids.split(self._feed.microbatch or len(ids))
        return [Batch(part[:, :-1], part[:, 1:], part.shape[0] * (self._width - 1)) for part in parts]


def steps_per_block(step_tokens: int, steps_per_epoch: int | None) -> int:
    """How many steps of ``step_tokens`` on this rank are gathered at once.

    Of a short text no more than an epoch (None: not known), since each has a price of its own.
    """
    most = _BLOCK_TOKENS // step_tokens
    return max(1, most if steps_per_epoch is None else min(most, steps_per_epoch))


class Fingerprints:
    """One number for each row, made of its tokens and of its turn in the training: changes with any of them.

    width: the most tokens that a row may have. Tokens 0 at the end, as padding has, change nothing.
    """

    def __init__(self, width: int):
        self._weights = mix(np.arange(width), 1) | np.uint64(1)  # odd: no change is multiplied away

    def of_rows(self, tokens: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """tokens: [rows, T]; turns: which rows of the training they are, [rows]. uint64 [rows]."""
        return self.with_turns(self.content(tokens), turns)

    def content(self, tokens: np.ndarray) -> np.ndarray:
        """Of the tokens alone: uint64 [rows]. Narrow tokens are taken eight bytes at a time, the rest one by one."""
        per_word = 8 // tokens.itemsize
        packed = tokens.shape[1] // per_word
        words = tokens[:, : packed * per_word].view(np.uint64)
        content = np.einsum("rw,w->r", words, self._weights[:packed])  # numpy's fastest: no array in between
        rest = tokens[:, packed * per_word :].astype(np.uint64)
        return content + np.einsum("rw,w->r", rest, self._weights[packed : packed + rest.shape[1]])

    @staticmethod
    def with_turns(content: np.ndarray, turns: np.ndarray) -> np.ndarray:
        return mix(content ^ mix(turns, 2), 3)


def eval_windows(stream: TokenStream, context: int, rows_per_batch: int, rank: int, size: int) -> Iterator[Batch]:
    """This rank's part of a whole split: every token but the first is a target exactly once, for any ``size``.

    The last window of the split may be shorter: it is filled up with targets that do not count.
    """
    targets = len(stream) - 1
    rows = -(-targets // context)
    first, count = even_parts(rows, size)[rank]
    for start in range(first, first + count, rows_per_batch):
        numbers = np.arange(start, min(start + rows_per_batch, first + count))
        whole = numbers[(numbers + 1) * context <= targets]
        if len(whole):
            yield Batch.from_windows(stream.windows(whole * context, context + 1))
        if len(whole) < len(numbers):
            yield _padded(stream, int(numbers[-1]) * context, context)


def _padded(stream: TokenStream, start: int, context: int) -> Batch:
    window = stream.slice(start, len(stream) - start).astype(np.int64)
    counted = len(window) - 1
    tokens = torch.zeros(1, context, dtype=torch.int64)
    targets = torch.full((1, context), IGNORE, dtype=torch.int64)
    tokens[0, :counted] = torch.from_numpy(window[:-1])
    targets[0, :counted] = torch.from_numpy(window[1:])
    return Batch(tokens, targets, counted)
