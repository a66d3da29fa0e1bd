"""Batches of pairs and of labelled texts: rows of about one length together, as many as a budget of tokens allows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from hvdtrain.data.batch import IGNORE, DocumentBatch, LabelBatch, PairBatch
from hvdtrain.data.buckets import BucketSampler
from hvdtrain.data.loader import Feed, Step
from hvdtrain.data.records import Records
from hvdtrain.data.sampler import even_parts, mix
from hvdtrain.data.windows import Fingerprints

# Rows may be none: then the batch has one row that counts nothing.
MakeBatch = Callable[[Records, np.ndarray], DocumentBatch]


class BucketSource:
    """Steps of bucketed batches. A row of the training is here a whole global batch, so ``rows_per_step`` is 1; the
    ranks share its rows as evenly as can be.
    """

    steps_per_block = 1
    rows_per_step = 1

    def __init__(self, records: Records, sampler: BucketSampler, feed: Feed, make_batch: MakeBatch):
        self._records, self._sampler, self._feed, self._make_batch = records, sampler, feed, make_batch
        self.rows_per_epoch = sampler.batches_per_epoch
        self._fingerprints = Fingerprints(feed.context)

    @property
    def read_through(self) -> list[Path]:
        return self._records.read_through

    def block(self, first_row: int, steps: int, number: int) -> list[Step]:
        return [self._step(first_row + step) for step in range(steps)]

    def batches(self, content: list[DocumentBatch], device: torch.device) -> list[DocumentBatch]:
        return [batch.to(device) for batch in content]

    def _step(self, turn: int) -> Step:
        feed = self._feed
        rows = self._sampler.batch(turn)
        first, count = even_parts(len(rows), feed.size)[feed.rank]
        mine = rows[first : first + count]
        size = feed.microbatch or max(1, count)
        batches = [self._make_batch(self._records, mine[cut : cut + size]) for cut in range(0, max(1, count), size)]
        content = np.concatenate([batch.fingerprints(self._fingerprints.content) for batch in batches])[:count]
        turns = mix(np.full(count, turn), 2) ^ mix(np.arange(first, first + count), 4)
        total = int(mix(content ^ turns, 3).sum(dtype=np.uint64))
        if feed.pin:
            batches = [batch.pinned() for batch in batches]
        return Step(batches, total, rows=1)


def eval_rows(
    records: Records, rows_per_batch: int, rank: int, size: int, make_batch: MakeBatch
) -> Iterator[DocumentBatch]:
    """This rank's part of a whole split, every row once, rows of about one length together."""
    order = np.argsort(records.lengths.max(axis=1), kind="stable")
    first, count = even_parts(len(order), size)[rank]
    for start in range(first, first + count, rows_per_batch):
        yield make_batch(records, order[start : min(start + rows_per_batch, first + count)])


def pair_batch(records: Records, rows: np.ndarray, begin: int, context: int) -> PairBatch:
    """Decoder input: ``begin``, then the target without its last token. Longer sides are cut to ``context``."""
    if not len(rows):
        one = torch.zeros(1, 1, dtype=torch.int64)
        return PairBatch(one, torch.ones(1, dtype=torch.int64), one, torch.full((1, 1), IGNORE), 0)
    source, source_lengths = records.padded("source_tokens", rows, context)
    target, lengths = records.padded("target_tokens", rows, context)
    tokens = np.empty_like(target)
    tokens[:, 0], tokens[:, 1:] = begin, target[:, :-1]
    targets = np.where(np.arange(target.shape[1]) < lengths[:, None], target, IGNORE)
    sources = torch.from_numpy(source), torch.from_numpy(source_lengths)
    return PairBatch(*sources, torch.from_numpy(tokens), torch.from_numpy(targets), int(lengths.sum()))


def label_batch(records: Records, rows: np.ndarray, context: int) -> LabelBatch:
    """Texts above ``context`` tokens are cut."""
    if not len(rows):
        one = torch.zeros(1, 1, dtype=torch.int64)
        return LabelBatch(one, torch.ones(1, dtype=torch.int64), torch.full((1,), IGNORE), 0)
    tokens, lengths = records.padded("tokens", rows, context)
    labels = records.column("labels", rows).astype(np.int64)
    return LabelBatch(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(labels), len(rows))
