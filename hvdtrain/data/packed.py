"""Rows that hold whole documents, each seen by itself: positions begin anew, attention stays inside.

text      a b c d #  e f #  g h i j k l m #          # ends a document
row       # a b c d | # e f | . .            tokens: what stood before each target
          a b c d # | e f # | . .            targets: each token of each document, exactly once an epoch
          0 1 2 3 4 | 0 1 2 | 0 0            positions
          0 0 0 0 0 | 1 1 1 | -1 -1          segments (-1: padding)
"""

from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from hvdtrain.data.batch import IGNORE, AnyBatch, Batch
from hvdtrain.data.corpora import Corpora
from hvdtrain.data.loader import Feed, OfFeed, Step
from hvdtrain.data.packing import PackSampler
from hvdtrain.data.sampler import Share, mix
from hvdtrain.data.shards import map_shard
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import Fingerprints

Made = TypeVar("Made", bound=AnyBatch)


def document_lengths(corpora: Corpora) -> np.ndarray:
    """Tokens of each training document, in the order of the stream: int64 [documents]."""
    return np.concatenate(
        [
            np.diff(map_shard(folder, info, manifest)["doc_offsets"][: info.documents + 1])
            for folder, manifest in corpora.entries
            for info in manifest.split("train")
        ]
    )


class TextSource(OfFeed, Generic[Made]):
    """Base of those that make rows of text out of a stream, one step at a time."""

    steps_per_block = 1

    def __init__(self, stream: TokenStream, rows_per_epoch: int, feed: Feed):
        self._stream, self._feed = stream, feed
        self.rows_per_step = feed.global_batch
        self.rows_per_epoch = rows_per_epoch
        self._fingerprints = Fingerprints(feed.context)

    @property
    def read_through(self) -> list[Path]:
        return self._stream.read_through

    def block(self, first_row: int, steps: int, number: int) -> list[Step]:
        rows_per_step, share, steps = self._feed.run_at(first_row, steps)
        return [self._step(first_row + step * rows_per_step, share, rows_per_step) for step in range(steps)]

    def batches(self, content: list[Made], device: torch.device) -> list[Made]:
        return [batch.to(device) for batch in content]

    def _step(self, first_row: int, share: Share, rows: int) -> Step:
        """This rank's share of a step of ``rows`` rows, which begins with ``first_row`` since the run began."""
        raise NotImplementedError

    def _pinned(self, batch: Made) -> Made:
        return batch.pinned() if self._feed.pin else batch


class PackedSource(TextSource[Batch]):
    """Steps of packed rows. end_of_text: what stands before the very first document."""

    def __init__(self, stream: TokenStream, sampler: PackSampler, feed: Feed, end_of_text: int):
        super().__init__(stream, sampler.rows_per_epoch, feed)
        self._sampler, self._end_of_text = sampler, end_of_text

    def _step(self, first_row: int, share: Share, rows: int) -> Step:
        context = self._feed.context
        first = first_row + share.first
        pieces = self._sampler.rows(first, share.count)
        tokens = np.zeros((share.count, context), np.int64)
        targets = np.full((share.count, context), IGNORE, np.int64)
        positions = np.zeros((share.count, context), np.int64)
        segments = np.full((share.count, context), -1, np.int64)
        row_before, place, segment = -1, 0, 0
        for row, start, length in zip(*(values.tolist() for values in pieces), strict=True):
            place, segment = (0, 0) if row != row_before else (place, segment + 1)
            row_before, end = row, place + length
            if start:
                text = self._stream.slice(start - 1, length + 1)
                tokens[row, place:end] = text[:-1]
                targets[row, place:end] = text[1:]
            else:
                text = self._stream.slice(0, length)
                tokens[row, place], tokens[row, place + 1 : end] = self._end_of_text, text[:-1]
                targets[row, place:end] = text
            positions[row, place:end] = np.arange(length)
            segments[row, place:end] = segment
            place = end
        # Each token is a target once, so the targets say it all, with where documents begin. (Mixed: in a mere sum, a
        # larger token at a smaller position would change nothing.)
        content = self._fingerprints.content(targets - IGNORE) + mix(self._fingerprints.content(positions), 5)
        total = self._fingerprints.with_turns(content, np.arange(first, first + share.count)).sum(dtype=np.uint64)
        whole = [torch.from_numpy(values) for values in (tokens, targets, positions, segments)]
        batches = []
        for cut in range(0, share.count, share.microbatch):
            x, y, p, s = (values[cut : cut + share.microbatch] for values in whole)
            batches.append(self._pinned(Batch(x, y, int((y != IGNORE).sum()), p, s)))
        return Step(batches, int(total), rows)
