"""Answers within paragraphs: the loss, the best span over all windows, and scores that no number of ranks changes."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, HEAD, asked, documents, loss_of, measure_of, write_corpus
from torch import nn

from hvdtrain.data.corpora import Corpora, DataOptions, open_corpora
from hvdtrain.data.loader import Feed
from hvdtrain.data.spans import QuestionBatches, SpanBatch
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.options import TransformerOptions
from hvdtrain.tasks.span_answers import answers_of, span_scores
from hvdtrain.tasks.span_qa import SpanAnswering, SpanOptions
from hvdtrain.tasks.squad_scores import score, squad_scores

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = [
    (LETTERS[n % 7 : n % 7 + 4 + 3 * (n % 6)], [LETTERS[n % 7 + 1 : n % 7 + 3], LETTERS[n % 7]]) for n in range(17)
] + [("no answer here", []), ("not told at all", None), ("", [])]


class Guesses(nn.Module):
    """A model whose scores of a token are drawn from the token, its neighbours, its row's length and a seed alone."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.options = TransformerOptions(layers=1, width=8, heads=1)
        self.seed, self.most_rows = seed, 0

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        self.most_rows = max(self.most_rows, len(tokens))
        padded = torch.nn.functional.pad(tokens, (1, 1))
        mixed = padded[:, :-2] * 7 + tokens * 13 + padded[:, 2:] * 29 + lengths[:, None] + self.seed
        return torch.stack([(mixed * 37 % 101) / 10, (mixed * 53 % 97) / 10], -1)


@pytest.fixture
def corpora(tmp_path: Path) -> Corpora:
    splits = {"train": [asked(ROWS)], "val": [asked(ROWS[:9]), asked(ROWS[9:], 9)]}
    write_corpus(tmp_path / "qa", splits, kind="qa", version=2)
    return open_corpora(DataOptions(dir=str(tmp_path / "qa")))


def feed(rank: int = 0, size: int = 1, context: int = 16) -> Feed:
    return Feed(context, seed=1, global_batch=4, rank=rank, size=size)


def task(**options) -> SpanAnswering:
    return SpanAnswering(SpanOptions(**options))


def questions_of(corpora: Corpora, rows: int = 5) -> QuestionBatches:
    return task().open_questions(corpora, "val", feed(), rows)


# --- the loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_both_ends_over_each_rows_own_tokens():
    class Says(Guesses):
        def forward(self, tokens, lengths, types):
            return torch.tensor([[[1.0, 0.0], [2.0, 5.0], [9.0, 9.0]], [[0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]])

    tokens, spans = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1], [0, 2]])
    batch = SpanBatch(tokens, torch.tensor([2, 3]), tokens, spans, 4)
    found = loss_of(task(), Says(), batch)
    e = math.exp
    first = math.log(e(1) + e(2)) - 2 + math.log(e(0) + e(5)) - 5  # the third token is padding
    second = math.log(e(0) + e(1) + e(2)) - 0 + math.log(e(1) + e(1) + e(0)) - 0
    assert (found.total.item(), found.weight) == (pytest.approx(first + second, rel=1e-6), 4)


def test_token_types_are_those_of_the_paragraph(corpora: Corpora):
    class Looks(Guesses):
        seen = None

        def forward(self, tokens, lengths, types):
            self.seen = types
            return super().forward(tokens, lengths, None)

    model = Looks()
    model.options = TransformerOptions(layers=1, width=8, heads=1, token_types=2)
    batch = next(questions_of(corpora).of(2, 1))
    loss_of(task(), model, batch)
    for row, length in zip(model.seen.tolist(), batch.lengths.tolist(), strict=True):
        assert row == [0] * len(HEAD) + [1] * (length - len(HEAD)) + [0] * (len(row) - length)


# --- the best span -----------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, batch: SpanBatch, most: int) -> list[tuple[float, float, str]]:
    """(by how much none is better, score, text) of each question's best answer, one span after another."""
    logits, found = model(batch.tokens, batch.lengths, None).tolist(), []
    for (first, end), question in zip(pairwise(batch.asked.firsts), batch.asked.questions, strict=True):
        best, null = (-math.inf, ""), math.inf
        for row in range(first, end):
            null = min(null, sum(logits[row][0]))
            begin, length = int(batch.asked.windows[row, 1]), int(batch.lengths[row]) - len(HEAD) - 1
            for a in range(length):
                for b in range(a, min(a + most, length)):
                    value = logits[row][a + len(HEAD)][0] + logits[row][b + len(HEAD)][1]
                    text = question.context[begin + a : begin + b + 1].strip()
                    best = max(best, (value, text), key=lambda one: one[0])
        found.append((null - best[0], *best))
    return found


@pytest.mark.parametrize("most", [1, 3, 30])
def test_the_best_span_over_all_windows(corpora: Corpora, most: int):
    for seed in range(3):
        model = Guesses(seed)
        for batch in questions_of(corpora).of(0, 99):
            logits = model(batch.tokens, batch.lengths, None)
            for answered, (null, value, text) in zip(
                answers_of(logits, batch, most, 1), by_hand(model, batch, most), strict=True
            ):
                assert answered.null == pytest.approx(null, abs=1e-4)
                assert answered.text == text or answered.answers[0].score == pytest.approx(value)  # of equals, one
                assert bool(answered.answers) == bool(answered.question.context)


def test_several_answers_come_in_order_each_text_once(corpora: Corpora):
    for batch in questions_of(corpora).of(0, 99):
        for answered in answers_of(Guesses()(batch.tokens, batch.lengths, None), batch, 4, 5):
            texts = [one.text for one in answered.answers]
            assert len(set(texts)) == len(texts)
            assert len(texts) == min(5, len(texts)) > 0 or not answered.question.context
            scores = [one.score for one in answered.answers]
            assert scores == sorted(scores, reverse=True)
            for one in answered.answers:
                assert answered.question.context.startswith(one.text, one.start)


def test_no_span_leaves_the_paragraph():
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0]])
    batch = SpanBatch(tokens, torch.tensor([7, 4]), types, torch.zeros(2, 2, dtype=torch.int64), 4)
    scores = span_scores(torch.zeros(2, 7, 2), batch, 2)
    assert [tuple(place) for place in (scores == 0).nonzero().tolist()] == [
        (0, 3, 0), (0, 3, 1), (0, 4, 0), (0, 4, 1), (0, 5, 0)
    ]  # fmt: skip


# --- scores ------------------------------------------------------------------------------------------------------


def sums_of(corpora: Corpora, model: nn.Module, size: int, rows: int = 5) -> torch.Tensor:
    """All ranks' sums, added; a rank without a batch adds nothing."""
    batches = [task().open_evaluation(corpora, "val", feed(rank, size), rows) for rank in range(size)]
    measured = [measure_of(task(), model, batch) for part in batches for batch in part()]
    assert {(one.dtype, len(one)) for one in measured} == {(torch.float64, 2 + 6 * len(ROWS))}
    return torch.stack(measured).sum(0)


def test_scores_are_the_same_for_any_number_of_ranks(corpora: Corpora):
    model = Guesses()
    one = sums_of(corpora, model, 1)
    for size in (2, 3, 7, 40):
        other = sums_of(corpora, model, size)
        assert torch.equal(other[1:], one[1:])  # to the bit
        assert other[0].item() == pytest.approx(one[0].item(), rel=1e-12)  # the loss is a sum in another order
    assert sums_of(corpora, model, 2, rows=3)[1:].tolist() == pytest.approx(one[1:].tolist())


def test_scores_are_those_of_the_official_rules(corpora: Corpora):
    model, scored = Guesses(), {}
    for batch in questions_of(corpora).of(0, 99):
        asked_here = zip(batch.asked.numbers, batch.asked.questions, by_hand(model, batch, 30), strict=True)
        for number, question, (null, _, text) in asked_here:
            if question.answers is not None:
                scored[number] = score(text, question.answers, null, "en", True)
    found = task().scores(sums_of(corpora, model, 2).tolist())
    expected = squad_scores(list(scored.values()), 0.0)
    assert found.pop("val_loss") > 0
    assert found == pytest.approx(expected, abs=1e-4)
    assert found["questions"] == len(ROWS) - 1  # one is not told


def test_whole_questions_fill_a_batch_and_what_is_not_told_is_no_target(corpora: Corpora):
    batches = list(questions_of(corpora, rows=5).of(0, 99))
    assert sorted(number for batch in batches for number in batch.asked.numbers) == [*range(len(ROWS))]
    assert all(len(batch.tokens) <= 5 for batch in batches if len(batch.asked.numbers) > 1)
    windows = sum(len(batch.tokens) for batch in batches)
    (untold,) = (n for n, (_, answers) in enumerate(ROWS) if answers is None)
    first, end = questions_of(corpora).questions.first_rows[untold : untold + 2]
    assert sum(batch.target_tokens for batch in batches) == 2 * (windows - (end - first)) < 2 * windows


def test_a_threshold_is_an_option(corpora: Corpora):
    sums = sums_of(corpora, Guesses(), 1).tolist()
    never, always = (task(null_threshold=limit).scores(sums) for limit in (1e9, -1e9))
    assert always["exact_match"] == always["f1"] == pytest.approx(100 * 2 / 19)
    assert never["no_answer_exact_match"] == 50  # the empty paragraph has no text to answer with
    assert never["best_f1"] == always["best_f1"] >= max(never["f1"], always["f1"])


def test_a_question_of_many_windows_goes_in_parts(corpora: Corpora):
    model = Guesses()
    whole = sums_of(corpora, model, 1, rows=50)
    assert model.most_rows > 3
    model.most_rows = 0
    assert sums_of(corpora, model, 1, rows=2).tolist() == pytest.approx(whole.tolist())
    assert model.most_rows == 2


# --- what cannot be answered -------------------------------------------------------------------------------------


def test_shards_of_before_are_refused(tmp_path: Path):
    old = {**documents([[1, 2]]), "spans": np.zeros((1, 2), np.int64), "examples": np.zeros(1, np.int64)}
    write_corpus(tmp_path, {"train": [old], "val": [old]}, kind="qa")
    corpora = open_corpora(DataOptions(dir=str(tmp_path)))
    with pytest.raises(DataError, match="was prepared by an older data_prep, without the answers' texts"):
        task().check(corpora, feed())


def test_windows_above_the_context_are_refused(corpora: Corpora):
    opens: list[Callable] = [
        lambda: task().open_training(corpora, feed(context=11)),
        lambda: task().open_evaluation(corpora, "val", feed(context=11), 4),
    ]
    for opened in opens:
        with pytest.raises(ConfigError, match=r"windows of 12 tokens, model\.context=11 holds fewer; set it to 12, or"):
            opened()


def test_a_test_set_whose_answers_are_not_told_can_be_answered_but_not_scored(tmp_path: Path):
    splits = {"train": [asked(ROWS)], "val": [asked(ROWS)], "test": [asked([("one two", None), ("three", None)])]}
    write_corpus(tmp_path, splits, kind="qa", version=2)
    corpora = open_corpora(DataOptions(dir=str(tmp_path)))
    with pytest.raises(DataError, match=r"the test split of .* does not tell the answers; nothing to score"):
        task().open_evaluation(corpora, "test", feed(), 4)
    batches = task().open_questions(corpora, "test", feed(), 4)
    answered = [one for batch in batches.of(0, 9) for one in task().extract(Guesses(), batch.to(CPU), 2)]
    assert sorted(one.question.id for one in answered) == ["q0", "q1"]
    assert all(len(one.answers) == 2 for one in answered)
