"""Batches of windows for extractive answers: of any rows in training, of whole questions in evaluation.

All windows of a question lie in one batch, so that its best answer is found where the batch is. The batches of a split
are the same for any number of ranks, which take contiguous parts of them:

    questions, by their longest window    q7 q3 | q0 | q5 q1 q2 | ...       a batch has up to ``rows`` windows, or one
    windows                               1  2  | 9  | 1  2  1              question of more
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from hvdtrain.data.batch import IGNORE, DocumentBatch, from_1
from hvdtrain.data.questions import Question, Questions
from hvdtrain.data.records import Records
from hvdtrain.data.sampler import mix


@dataclass(frozen=True)
class AskedQuestions:
    """The questions that a batch's windows belong to. numbers: of each in its split of ``total`` questions. firsts: its
    first row in the batch, and after the last question the number of rows. windows: int64 [rows, 2], chars: of each
    question int32 [tokens, 2]; see shards.py. rows: so many windows fit the device at once. some_have_none: has the
    split questions without an answer?
    """

    numbers: Sequence[int]
    firsts: Sequence[int]
    questions: Sequence[Question]
    windows: np.ndarray
    chars: Sequence[np.ndarray]
    total: int
    rows: int
    some_have_none: bool


@dataclass(frozen=True)
class SpanBatch(DocumentBatch):
    """``tokens``: int64 [B, T], ``lengths``: int64 [B]; ``types``: int64 [B, T], 1 from the paragraph's first token on;
    ``spans``: int64 [B, 2], first and last token of the answer (0, 0: none), or IGNORE. ``target_tokens``: two for each
    window that counts.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    types: torch.Tensor
    spans: torch.Tensor
    target_tokens: int
    asked: AskedQuestions | None = None

    @property
    def rows_at_once(self) -> int:
        """A question may have more windows than fit."""
        return 0 if self.asked is None else self.asked.rows

    def fingerprints(self, of_tokens: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        spans = mix(self.spans[:, 0].numpy(), 5) + mix(self.spans[:, 1].numpy(), 6)
        return of_tokens(from_1(self.tokens, self.lengths)) + spans


def span_batch(records: Records, rows: np.ndarray, asked: AskedQuestions | None = None) -> SpanBatch:
    """Windows, the answers of which count, but for those of questions whose answers are not told."""
    if not len(rows):
        one = torch.zeros(1, 1, dtype=torch.int64)
        return SpanBatch(one, torch.ones(1, dtype=torch.int64), one, torch.full((1, 2), IGNORE), 0)
    tokens, lengths = records.padded("tokens", rows)
    spans, windows = (records.column(name, rows).astype(np.int64) for name in ("spans", "windows"))
    if asked is not None:
        for question, (first, end) in zip(asked.questions, pairwise(asked.firsts), strict=True):
            if question.answers is None:
                spans[first:end] = IGNORE
    at = np.arange(tokens.shape[1])
    types = ((at >= windows[:, :1]) & (at < lengths[:, None])).astype(np.int64)
    counted = int(np.count_nonzero(spans != IGNORE))
    tensors = map(torch.from_numpy, (tokens, lengths, types, spans))
    return SpanBatch(*tensors, target_tokens=counted, asked=asked)


class QuestionBatches:
    """``len(batches)`` of a split; ``batches.of(rank, size)`` gives a rank's. rows: windows of a batch.

    ``some_have_none``, ``told``: are there questions without an answer, and of how many are the answers known?
    """

    def __init__(self, records: Records, rows: int):
        self._records, self._rows = records, rows
        self.questions = Questions(records)
        answers = [self.questions[number].answers for number in range(len(self.questions))]
        self.told = sum(one is not None for one in answers)
        self.some_have_none = any(one == () for one in answers)
        firsts = self.questions.first_rows
        windows = np.diff(firsts)
        longest = np.maximum.reduceat(records.lengths[:, 0], firsts[:-1])
        self._batches: list[list[int]] = []
        held = rows
        for number in np.argsort(longest, kind="stable").tolist():
            if held + windows[number] > rows:
                self._batches.append([])
                held = 0
            self._batches[-1].append(number)
            held += int(windows[number])

    def __len__(self) -> int:
        return len(self._batches)

    def of(self, first: int, count: int) -> Iterator[SpanBatch]:
        """``count`` batches from number ``first`` on."""
        for numbers in self._batches[first : first + count]:
            yield self._batch(numbers)

    def _batch(self, numbers: Sequence[int]) -> SpanBatch:
        begins, ends = self.questions.first_rows[numbers], self.questions.first_rows[np.add(numbers, 1)]
        rows = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
        asked = AskedQuestions(
            numbers,
            [0, *np.cumsum(ends - begins).tolist()],
            [self.questions[number] for number in numbers],
            self._records.column("windows", rows),
            [self.questions.chars(number) for number in numbers],
            len(self.questions),
            self._rows,
            self.some_have_none,
        )
        return span_batch(self._records, rows, asked)
