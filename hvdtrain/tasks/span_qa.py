"""Extractive question answering: the first and the last token of an answer in its paragraph (Devlin et al. 2018)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from hvdtrain.data.batch import IGNORE
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.questions import Question, windows_of
from hvdtrain.data.records import Records
from hvdtrain.data.sampler import even_parts
from hvdtrain.data.shards import Manifest, frame_tokens
from hvdtrain.data.spans import AskedQuestions, QuestionBatches, SpanBatch, span_batch
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.encoder import SpanModel
from hvdtrain.models.options import TransformerOptions
from hvdtrain.options import Options, option
from hvdtrain.tasks.answers import Answer, Asked, Prediction, Predictions, Row, refuse_given
from hvdtrain.tasks.rows import bucketed_training, check_one_folder, open_records
from hvdtrain.tasks.span_answers import Answered, answers_of
from hvdtrain.tasks.squad_scores import Scored, score, squad_scores
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training, run


class SpanOptions(Options):
    max_answer_tokens: int = option(30, "longest answer that is given, in tokens", ge=1)
    null_threshold: float = option(
        0.0, "where questions may have no answer: give none if its score exceeds the best answer's by more than this"
    )
    n_best: int = option(5, "so many answers to a question are told, where several can be", ge=1)
    language: Literal["en", "zh"] = option(
        "en", "how answers are compared: en: as SQuAD does; zh: Chinese, as MLQA does"
    )


class SpanAnswering(Task[SpanModel, SpanBatch]):
    """Cross-entropy of an answer's first and last token, in nats, summed over windows; both are the first token of the
    row where a window has none.

    Scores: exact match and F1 of the best answer over all windows of a question. Each question has places of its own
    in the sums, so that the best threshold, for which all must be looked at together, is exact too.
    """

    name = "span_qa"
    about = "an answer within a paragraph"
    options = SpanOptions
    kind = "qa"

    def __init__(self, options: SpanOptions):
        self._options = options

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> SpanModel:
        return SpanModel(options, manifest.vocab_size)

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_one_folder(corpora, self)
        _check_questions(corpora)

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        records = _open(corpora, "train", feed)
        return bucketed_training(records, feed, span_batch, "windows")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        batches = self.open_questions(corpora, split, feed, rows)
        if not batches.told:
            raise DataError(f"the {split} split of {corpora.names} does not tell the answers; nothing to score")
        first, count = even_parts(len(batches), feed.size)[feed.rank]
        return Evaluation(partial(batches.of, first, count), count)

    def open_questions(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> QuestionBatches:
        """A split to be answered, whether its answers are told or not. Errors: DataError, ConfigError."""
        _check_questions(corpora)
        return QuestionBatches(_open(corpora, split, feed), rows)

    def inputs(self, batch: SpanBatch) -> tuple[torch.Tensor | None, ...]:
        return batch.tokens, batch.lengths, batch.types

    def loss(self, model: SpanModel, output: torch.Tensor, batch: SpanBatch) -> LossSum:
        return LossSum(_cross_entropy(output, batch), batch.target_tokens)

    def training_flops(self, model: SpanModel, batch: SpanBatch) -> int:
        return model.training_flops(batch.tokens.shape)

    def measure(self, model: SpanModel, output: torch.Tensor, batch: SpanBatch) -> torch.Tensor:
        assert batch.asked is not None, "a batch of evaluation has whole questions"
        questions = torch.zeros(batch.asked.total, len(Scored._fields), dtype=torch.float64)
        for answered in answers_of(output, batch, self._options.max_answer_tokens, 1):
            questions[answered.number] = torch.tensor(self._scored(answered, batch.asked.some_have_none))
        loss = _cross_entropy(output, batch).double()
        sums = torch.stack([loss, loss.new_tensor(batch.target_tokens)])
        return torch.cat([sums, questions.flatten().to(sums.device)])

    def _scored(self, answered: Answered, some_have_none: bool) -> Scored:
        answers = answered.question.answers
        if answers is None:
            return Scored()
        return score(answered.text, answers, answered.null, self._options.language, some_have_none)

    def scores(self, sums: list[float]) -> dict[str, float]:
        loss, targets, *questions = sums
        size = len(Scored._fields)
        scored = [Scored(*questions[first : first + size]) for first in range(0, len(questions), size)]
        return {"val_loss": loss / targets, **squad_scores(scored, self._options.null_threshold)}

    def extract(self, model: SpanModel, batch: SpanBatch, count: int) -> Iterator[Answered]:
        """The ``count`` best answers to each question of a batch of ``open_questions``; without autograd."""
        assert batch.asked is not None, "only batches of whole questions are answered"
        logits = run(model, self.inputs(batch), batch.rows_at_once)
        return answers_of(logits, batch, self._options.max_answer_tokens, count)

    def predictions(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Predictions:
        batches = self.open_questions(corpora, split, feed, rows)
        first, count = even_parts(len(batches), feed.size)[feed.rank]
        some_have_none = batches.some_have_none if batches.told else _may_have_none(corpora.manifest)

        def answer(model: SpanModel, batch: SpanBatch) -> Iterator[Prediction]:
            for one in self.extract(model, batch, 1):
                none = _probability(one.null - self._options.null_threshold) if some_have_none else 0.0
                yield Prediction(one.number, one.question.id, one.text, none)

        return Predictions(count, partial(batches.of, first, count), answer)

    def answers(self, asked: Asked) -> "SpanTexts":
        refuse_given(asked.given, self.name)
        return SpanTexts(asked, self, self._options)

    def directions(self) -> Mapping[str, int]:
        return {"val_loss": -1, "exact_match": 1, "f1": 1}

    def example(self, rows: int, positions: int) -> SpanBatch:
        tokens, types = (torch.zeros(rows, positions, dtype=torch.int64) for _ in range(2))
        spans = torch.zeros(rows, 2, dtype=torch.int64)
        return SpanBatch(tokens, torch.full((rows,), positions), types, spans, 2 * rows)

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        # tokens and types of a batch; of each window its length and its turn
        return BUFFERS * 2 * 8 * rows * positions + 12 * facts.documents


class SpanTexts:
    """Of each line, a question and its paragraph with a tab between them, the best answers. See ``Answers``.

    Of a question and a paragraph as much is read, and in such windows, as of those that the run learned from. Where
    some of these had no answer, none is an answer too, empty: the best one if ``null_threshold`` says so.
    """

    tokens_at_once = 8192
    room: int | None = None  # of a long paragraph come windows

    def __init__(self, asked: Asked, task: SpanAnswering, options: SpanOptions):
        self._asked, self._task, self._options = asked, task, options
        self._frame = frame_tokens(asked.manifest.special_tokens)
        self._made = asked.manifest.source

    def encode(self, text: str) -> list[int]:
        question, tab, paragraph = text.partition("\t")
        if not tab:
            raise DataError(f"a line is a question and its paragraph with a tab between them; {text[:60]!r} has none")
        tokens = self._asked.encode(paragraph)
        return [*self._head(question), *tokens, self._frame[1]] if tokens else []

    def _head(self, question: str) -> list[int]:
        return [self._frame[0], *self._asked.encode(question)[: self._made["question_tokens"]], self._frame[1]]

    def cut(self, tokens: list[int]) -> list[int]:
        return tokens

    @torch.no_grad()
    def answer(self, model: SpanModel, rows: Sequence[Row]) -> list[list[Answer]]:
        batch = self._batch(rows).to(next(model.parameters()).device)
        return [self._told(one) for one in self._task.extract(model, batch, self._options.n_best)]

    def _told(self, answered: Answered) -> list[Answer]:
        found = [Answer(one.text, one.score) for one in answered.answers]
        if not found or _may_have_none(self._asked.manifest):
            none = Answer("", (found[0].score if found else 0.0) + (answered.null if found else 0.0))
            found.insert(0 if not found or answered.null > self._options.null_threshold else len(found), none)
        return found

    def _batch(self, rows: Sequence[Row]) -> SpanBatch:
        tokens, types, windows, firsts, questions, chars = [], [], [], [0], [], []
        for row in rows:
            asked, _, paragraph = row.text.partition("\t")
            head, encoded = self._head(asked), self._asked.tokenizer.encode(paragraph, add_special_tokens=False)
            room = self._made["max_tokens"] - len(head) - 1
            for begin, end in windows_of(len(encoded.ids), room, self._made["stride"]):
                tokens.append(torch.tensor([*head, *encoded.ids[begin:end], self._frame[1]]))
                types.append(torch.tensor([0] * len(head) + [1] * (end - begin + 1)))
                windows.append([len(head), begin])
            firsts.append(len(tokens))
            questions.append(Question(str(row.number), paragraph, None))
            chars.append(np.array(encoded.offsets).reshape(-1, 2))
        at_once = max(1, self.tokens_at_once // self._made["max_tokens"])
        group = AskedQuestions(
            range(len(rows)), firsts, questions, np.array(windows), chars, len(rows), at_once, some_have_none=True
        )
        lengths = torch.tensor([len(row) for row in tokens])
        padded = [pad_sequence(rows, batch_first=True) for rows in (tokens, types)]
        return SpanBatch(padded[0], lengths, padded[1], torch.full((len(tokens), 2), IGNORE), 0, group)

    def line(self, answers: Sequence[Answer]) -> str:
        """The best answer; empty where that is none."""
        return answers[0].text


def _may_have_none(manifest: Manifest) -> bool:
    """Had some of the questions that the shards were made of no answer?"""
    return bool(manifest.source.get("questions_without_answer"))


def _probability(null: float) -> float:
    """Half at 0."""
    return 1 / (1 + math.exp(-null)) if null > -700 else 0.0


def _check_questions(corpora: Corpora) -> None:
    if not corpora.manifest.has_questions:
        raise DataError(
            f"{corpora.names} was prepared by an older data_prep, without the answers' texts that a score needs; "
            "prepare it again with data_prep labels"
        )


def _open(corpora: Corpora, split: str, feed: Feed) -> Records:
    """Errors: DataError for a split that is missing or empty; ConfigError for windows that the model cannot hold."""
    records = open_records(corpora, split)
    if (longest := int(records.lengths.max())) > feed.context:
        raise ConfigError(
            f"the {split} split of {corpora.names} has windows of {longest} tokens, model.context={feed.context} holds "
            f"fewer; set it to {longest}, or prepare with data_prep labels --max-tokens {feed.context}"
        )
    return records


def _cross_entropy(logits_BT2: torch.Tensor, batch: SpanBatch) -> torch.Tensor:
    """Over each row's own positions, both scores summed."""
    padding_BT = torch.arange(logits_BT2.shape[1], device=logits_BT2.device) >= batch.lengths[:, None]
    masked_BT2 = logits_BT2.float().masked_fill(padding_BT[:, :, None], -torch.inf)
    scores = masked_BT2.transpose(1, 2).flatten(0, 1)
    return F.cross_entropy(scores, batch.spans.flatten(), ignore_index=IGNORE, reduction="sum")
