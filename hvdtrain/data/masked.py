"""Rows of text in which tokens are hidden: framed, masked, and made into batches.

    windows     [CLS] c d # e f g [SEP]      context - 2 tokens of the stream, over the ends (#) of documents
    packed      [CLS] a b c # h i [SEP]      whole documents, best fit, as many as there is room for
                [CLS] k l m # [SEP] . .      . fills up

These are the "full sentences" of Liu et al. 2019 ("RoBERTa", 4.2), and whole documents instead: a row is one sequence
between two special tokens, as in NVIDIA's BERT scripts, without their second segment. Its documents see one another.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hvdtrain.data.batch import IGNORE, MaskedBatch
from hvdtrain.data.loader import Feed, Step
from hvdtrain.data.masking import Masking
from hvdtrain.data.packed import TextSource
from hvdtrain.data.packing import PackSampler
from hvdtrain.data.sampler import Share, derive_each, even_parts, mix
from hvdtrain.data.shards import frame_tokens
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import RowSampler

_OF_TRAINING, _OF_EVALUATION = 7, 8  # rows of both have keys of their own


@dataclass(frozen=True)
class Frame:
    """``first`` and ``last`` stand around a row's text, ``fill`` behind a short one; all are special tokens."""

    context: int
    first: int
    last: int
    fill: int

    @classmethod
    def of(cls, context: int, special: Mapping[str, int]) -> "Frame":
        """special: role -> id, with ``eos`` in it."""
        first, last = frame_tokens(special)
        return cls(context, first, last, special.get("pad", last))

    @property
    def room(self) -> int:
        """Tokens of text in a row."""
        return self.context - 2

    def around(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """text: int64 [rows, room], of which the first ``lengths`` count. int64 [rows, context], and their lengths."""
        place = np.arange(self.room)
        tokens = np.full((len(text), self.context), self.fill, np.int64)
        tokens[:, 0] = self.first
        tokens[:, 1:-1] = np.where(place < lengths[:, None], text, self.fill)
        np.put_along_axis(tokens, lengths[:, None] + 1, self.last, axis=1)
        return tokens, lengths + 2


class TextRows(Protocol):
    """Rows of text, by their numbers since the beginning of training."""

    rows_per_epoch: int

    def __call__(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Framed rows ``first .. first+count-1``: int64 [count, context], and their lengths."""


class FramedWindows:
    def __init__(self, stream: TokenStream, sampler: RowSampler, frame: Frame):
        self._stream, self._sampler, self._frame = stream, sampler, frame
        self.rows_per_epoch = sampler.rows_per_epoch

    def __call__(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self._sampler.starts_of(np.arange(first, first + count))
        text = self._stream.windows(starts, self._frame.room)
        return self._frame.around(text, np.full(count, self._frame.room))


class FramedDocuments:
    def __init__(self, stream: TokenStream, sampler: PackSampler, frame: Frame):
        self._stream, self._sampler, self._frame = stream, sampler, frame
        self.rows_per_epoch = sampler.rows_per_epoch

    def __call__(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        text, lengths = np.zeros((count, self._frame.room), np.int64), np.zeros(count, np.int64)
        pieces = self._sampler.rows(first, count)
        for row, start, length in zip(*(values.tolist() for values in pieces), strict=True):
            text[row, lengths[row] : lengths[row] + length] = self._stream.slice(start, length)
            lengths[row] += length
        return self._frame.around(text, lengths)


class MaskedSource(TextSource[MaskedBatch]):
    """Steps of masked rows; their fingerprints hold what is hidden and what stands there instead."""

    def __init__(self, stream: TokenStream, rows: TextRows, masking: Masking, feed: Feed):
        super().__init__(stream, rows.rows_per_epoch, feed)
        self._rows, self._masking = rows, masking

    def _step(self, first_row: int, share: Share, rows: int) -> Step:
        first = first_row + share.first
        numbers = np.arange(first, first + share.count)
        text, lengths = self._rows(first, share.count)
        tokens, targets = self._masking(text, derive_each(self._feed.seed, numbers, _OF_TRAINING))
        content = self._fingerprints.content(tokens) + mix(self._fingerprints.content(targets - IGNORE), 5)
        total = self._fingerprints.with_turns(content, numbers).sum(dtype=np.uint64)
        batches = []
        for cut in range(0, share.count, share.microbatch):
            part = slice(cut, cut + share.microbatch)
            batches.append(self._pinned(masked_batch(tokens[part], targets[part], lengths[part])))
        return Step(batches, int(total), rows)


def masked_batch(tokens: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> MaskedBatch:
    """tokens, targets: int64 [rows, T]. Where nothing is to be told, one target that does not count."""
    places = np.flatnonzero(targets != IGNORE)
    count, places = len(places), places if len(places) else np.zeros(1, np.int64)
    tensors = (tokens, lengths, places, targets.reshape(-1)[places])
    return MaskedBatch(*map(torch.from_numpy, tensors), count)


def eval_masked(
    stream: TokenStream, frame: Frame, masking: Masking, rows_per_batch: int, rank: int, size: int
) -> Iterator[MaskedBatch]:
    """This rank's part of a whole split: windows one after another, the last of which may be shorter. Their masks are
    the same in every evaluation, of every run.
    """
    first, count = even_parts(eval_rows_of(stream, frame), size)[rank]
    for start in range(first, first + count, rows_per_batch):
        numbers = np.arange(start, min(start + rows_per_batch, first + count))
        lengths = np.minimum(len(stream) - numbers * frame.room, frame.room)
        text = np.zeros((len(numbers), frame.room), np.int64)
        text.reshape(-1)[: lengths.sum()] = stream.slice(start * frame.room, int(lengths.sum()))
        tokens, lengths = frame.around(text, lengths)
        seen, targets = masking(tokens, derive_each(0, numbers, _OF_EVALUATION))
        yield masked_batch(seen, targets, lengths)


def eval_rows_of(stream: TokenStream, frame: Frame) -> int:
    return -(-len(stream) // frame.room)
