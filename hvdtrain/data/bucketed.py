"""Batches of pairs and of labelled texts: rows of about one length together, as many as a budget of tokens allows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hvdtrain.data.batch import IGNORE, DocumentBatch, LabelBatch, PairBatch
from hvdtrain.data.buckets import BucketSampler
from hvdtrain.data.loader import Feed, OfFeed, Step
from hvdtrain.data.records import Records
from hvdtrain.data.sampler import even_parts, mix
from hvdtrain.data.windows import Fingerprints

# Rows may be none: then the batch has one row that counts nothing.
MakeBatch = Callable[[Records, np.ndarray], DocumentBatch]


class BucketSource(OfFeed):
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

    def deal(self, speeds: tuple[float, ...]) -> None:
        raise NotImplementedError("its rows are of different lengths")

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


@dataclass(frozen=True)
class LabelledTexts:
    """How labelled texts become a batch: texts above ``context`` tokens are cut; ``last`` ends the first of two texts.

    classes: how many labels there are where a text may have several; 0: each has one. weights: of each label's loss,
    see LabelBatch; fp32 [labels], None: 1.
    """

    context: int
    last: int
    classes: int = 0
    weights: np.ndarray | None = None

    def __call__(self, records: Records, rows: np.ndarray) -> LabelBatch:
        if not len(rows):
            one, none = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, self.classes or 1), IGNORE)
            return LabelBatch(one, torch.ones(1, dtype=torch.int64), one, none if self.classes else none[0], 0)
        tokens, lengths = records.padded("tokens", rows, self.context)
        if self.classes:
            labels = records.many_hot(rows, self.classes).astype(np.int64)
        else:
            labels = records.column("labels", rows).astype(np.int64)
        types = torch.from_numpy(types_of(tokens, lengths, self.last))
        weights = None if self.weights is None else torch.from_numpy(self._weights(self.weights, labels))
        text = torch.from_numpy(tokens), torch.from_numpy(lengths), types
        return LabelBatch(*text, torch.from_numpy(labels), labels.size, weights)

    def _weights(self, of_label: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.where(labels == 1, of_label, np.float32(1)) if self.classes else of_label[labels]


def types_of(tokens: np.ndarray, lengths: np.ndarray, last: int) -> np.ndarray:
    """0 up to the first token ``last`` of a row, with which its first text ends; then 1, to the row's length.

    [cls] a b [sep] c d [sep] .
      0   0 0   0   1 1   1   0
    """
    ended = np.cumsum(tokens == last, axis=1) - (tokens == last)
    return ((ended > 0) & (np.arange(tokens.shape[1]) < lengths[:, None])).astype(np.int64)
