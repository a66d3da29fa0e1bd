"""From a window's scores of first and last tokens to answers as text.

Shape letters:  B windows, T positions, L tokens of an answer at most
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from hvdtrain.data.questions import Question
from hvdtrain.data.spans import SpanBatch

_LOOK_AT = 4  # times as many spans as answers are wanted: many say the same text


@dataclass(frozen=True)
class Extract:
    """A text out of the paragraph, the character where it begins, and its score: the sum of two logits."""

    text: str
    start: int
    score: float


@dataclass(frozen=True)
class Answered:
    """A question, its best answers (each text once, the best first), and by how much the score for none exceeds that
    of the best: infinite where the paragraph has no token. ``number``: of the question in its split.
    """

    number: int
    question: Question
    answers: tuple[Extract, ...]
    null: float

    @property
    def text(self) -> str:
        """The best answer; empty where there is no text to answer from."""
        return self.answers[0].text if self.answers else ""


def answers_of(logits_BT2: torch.Tensor, batch: SpanBatch, most_tokens: int, count: int) -> Iterator[Answered]:
    """``count`` answers of at most ``most_tokens`` tokens for each question of a batch, over all its windows.

    The score for none is that of the first token, the least of all windows' (Devlin et al. 2018).
    """
    assert batch.asked is not None, "only batches of whole questions are answered"
    asked = batch.asked
    scores_BTL = span_scores(logits_BT2.float(), batch, most_tokens)
    none_B = logits_BT2[:, 0].float().sum(-1).tolist()
    width = scores_BTL.shape[1]
    for place, (first, end) in enumerate(pairwise(asked.firsts)):
        flat = scores_BTL[first:end].flatten()
        found = flat.topk(min(len(flat), count if count == 1 else _LOOK_AT * count))
        question, chars = asked.questions[place], asked.chars[place]
        answers: dict[str, Extract] = {}
        for score, at in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            if score == -np.inf or len(answers) == count:
                break
            row, token, length = np.unravel_index(at, (end - first, width, most_tokens))
            head, begin = asked.windows[first + int(row)]
            number = int(begin + token - head)
            start, stop = int(chars[number, 0]), int(chars[number + int(length), 1])
            text = question.context[start:stop]
            start += len(text) - len(text.lstrip())
            answers.setdefault(text.strip(), Extract(text.strip(), start, score))
        best = next(iter(answers.values())).score if answers else -np.inf
        yield Answered(asked.numbers[place], question, tuple(answers.values()), min(none_B[first:end]) - best)


def span_scores(logits_BT2: torch.Tensor, batch: SpanBatch, most_tokens: int) -> torch.Tensor:
    """``[b, t, l]``: score of the answer from token t over l more of the paragraph; -inf beyond it. fp32 [B, T, L]."""
    #   paragraph at 3 .. 6, L = 3      t   3       4       5       6
    #                                       3 - 3   4 - 4   5 - 5   6 - 6
    #                                       3 - 4   4 - 5   5 - 6
    #                                       3 - 5   4 - 6
    at = torch.arange(logits_BT2.shape[1], device=logits_BT2.device)
    inside_BT = (batch.types == 1) & (at < batch.lengths[:, None] - 1)  # the last token ends the row
    begins, ends = logits_BT2.masked_fill(~inside_BT[:, :, None], -torch.inf).unbind(-1)
    ends = torch.nn.functional.pad(ends, (0, most_tokens - 1), value=-torch.inf)
    return begins[:, :, None] + ends.unfold(1, most_tokens, 1)
