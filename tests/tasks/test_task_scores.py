"""What a task makes of a model's logits: the loss of training, the sums of evaluation, the scores. All by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import loss_of, measure_of
from torch import nn

from hvdtrain.data.batch import IGNORE, Batch, LabelBatch, MaskedBatch, PairBatch
from hvdtrain.data.questions import Question
from hvdtrain.data.spans import AskedQuestions, SpanBatch
from hvdtrain.models import flops
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier, MaskedLanguageModel, SpanModel
from hvdtrain.models.heads import OutputHead
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.tasks import TASKS, TaskOptions, make_task
from hvdtrain.tasks.classify import Classification, ClassifyOptions
from hvdtrain.tasks.lm import LanguageModel
from hvdtrain.tasks.mlm import MaskedText, MaskedTextOptions
from hvdtrain.tasks.seq2seq import Seq2SeqOptions, SequenceToSequence
from hvdtrain.tasks.span_qa import SpanAnswering, SpanOptions
from hvdtrain.tasks.task import Task

# Probabilities of a vocabulary of 4, as logits.
SURE, LEANS, EVEN = [0.7, 0.1, 0.1, 0.1], [0.2, 0.4, 0.2, 0.2], [0.25] * 4
TOKENS = torch.zeros(2, 3, dtype=torch.int64)
TARGETS = torch.tensor([[0, 1, 0], [3, IGNORE, IGNORE]])
SPOKEN = [[SURE, LEANS, LEANS], [EVEN, SURE, SURE]]
LOSS = -math.log(0.7) - math.log(0.4) - math.log(0.2) - math.log(0.25)  # of the four targets that count


class Head(nn.Linear):
    cross_entropy, best = OutputHead.cross_entropy, OutputHead.best

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Says(nn.Module):
    """Whatever it is asked, a model answers with these probabilities."""

    def __init__(self, probabilities: list, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.answer = torch.tensor(probabilities).log().to(dtype)
        self.head = Head(4, 4, bias=False, dtype=dtype)
        self.options = TransformerOptions()
        nn.init.eye_(self.head.weight)

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        return self.answer

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def pairs_batch() -> PairBatch:
    return PairBatch(TOKENS, torch.tensor([3, 1]), TOKENS, TARGETS, 4)


def labels_batch(labels: list[int]) -> LabelBatch:
    rows = len(labels)
    counted = sum(label != IGNORE for label in labels)
    tokens = torch.zeros(rows, 1, dtype=torch.int64)
    return LabelBatch(tokens, torch.ones(rows), tokens, torch.tensor(labels), counted)


def smoothed(probabilities: list[float], target: int, share: float) -> float:
    """Cross-entropy with (1 - share) on the target and the rest on all alike (Szegedy et al. 2016)."""
    nats = [-math.log(p) for p in probabilities]
    return (1 - share) * nats[target] + share * sum(nats) / len(nats)


def test_every_task_of_the_table_can_be_chosen():
    for name, task in TASKS.items():
        assert type(make_task(TaskOptions(name=name))) is task


# --- model FLOPs ---------------------------------------------------------------------------------------------------


def test_every_task_counts_what_its_model_multiplies():
    """By the shapes that the model reads: a language model's documents, both sides of a pair, a text."""
    options = TransformerOptions(layers=2, width=16, heads=2, context=24)
    tokens, segments = torch.zeros(2, 8, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [0] * 8])
    text, source = Batch(tokens, tokens, 16, tokens, segments), torch.zeros(2, 5, dtype=torch.int64)
    pairs = PairBatch(source, torch.tensor([5, 2]), tokens, tokens, 16)
    labels = LabelBatch(tokens, torch.tensor([8, 3]), tokens, torch.tensor([0, 1]), 2)
    of_text = LanguageModel().training_flops(Decoder(options, 50), text)
    assert of_text == flops.decoder_flops(options, 50, 2, 8, pairs=6 + 10 + 1 + 36)
    of_pairs = SequenceToSequence(Seq2SeqOptions()).training_flops(Seq2Seq(options, 50), pairs)
    assert of_pairs == flops.seq2seq_flops(options, 50, 2, source=5, positions=8)
    of_windows = SpanAnswering(SpanOptions()).training_flops(SpanModel(options, 50), windows_batch())
    assert of_windows == flops.span_flops(options, 3, 3)
    of_labels = Classification(ClassifyOptions()).training_flops(Classifier(options, 50, 3), labels)
    assert of_labels == flops.classifier_flops(options, 3, 2, 8)


def test_a_task_that_does_not_count_is_worth_no_flops():
    class Silent(Task[nn.Module, Batch]):
        kind = "text"

    assert Silent(None).training_flops(nn.Linear(2, 2), Batch(TOKENS, TARGETS, 4)) == 0


# --- language models ---------------------------------------------------------------------------------------------


def test_a_language_models_loss_is_the_sum_over_the_targets_that_count():
    loss = loss_of(LanguageModel(), Says(SPOKEN), Batch(TOKENS, TARGETS, 4))
    assert (loss.total.item(), loss.weight) == (pytest.approx(LOSS, rel=1e-6), 4)
    assert loss.total.shape == ()


def test_a_language_models_scores():
    task = LanguageModel()
    sums = measure_of(task, Says(SPOKEN), Batch(TOKENS, TARGETS, 4))
    assert sums.dtype == torch.float64
    scores = task.scores((2 * sums).tolist())  # of two such batches
    assert scores == {
        "val_loss": pytest.approx(LOSS / 4, rel=1e-6),
        "perplexity": pytest.approx(math.exp(LOSS / 4), rel=1e-6),
        "target_tokens": 8,
    }


@pytest.mark.parametrize("name", ["lm", "seq2seq"])
def test_a_hopeless_loss_has_a_perplexity(name: str):
    assert math.isfinite(make_task(TaskOptions(name=name)).scores([1e6, 1.0, 0.0])["perplexity"])


# --- masked text --------------------------------------------------------------------------------------------------


def masked_batch() -> MaskedBatch:
    """Told are the tokens of SPOKEN that have a target in TARGETS; the one at the end is that of nothing to tell."""
    places, targets = torch.tensor([0, 1, 2, 3, 5]), torch.tensor([0, 1, 0, 3, IGNORE])
    return MaskedBatch(TOKENS, torch.tensor([3, 3]), places, targets, 4)


def test_the_loss_and_the_scores_of_what_is_hidden():
    """As of pairs: right are 0 where SURE and 1 where LEANS."""
    task = MaskedText(MaskedTextOptions())
    loss = loss_of(task, Says(SPOKEN), masked_batch())
    assert (loss.total.item(), loss.weight) == (pytest.approx(LOSS, rel=1e-6), 4)
    sums = measure_of(task, Says(SPOKEN), masked_batch())
    assert sums.dtype == torch.float64
    assert task.scores((3 * sums).tolist()) == {
        "val_loss": pytest.approx(LOSS / 4, rel=1e-6),
        "perplexity": pytest.approx(math.exp(LOSS / 4), rel=1e-6),
        "masked_accuracy": 0.5,
        "target_tokens": 12,
    }


def test_the_head_is_applied_to_what_is_hidden_alone():
    options = TransformerOptions(layers=1, width=16, heads=2, context=12)
    model = MaskedLanguageModel(options, 50)
    model.initialise(1)
    seen: list[torch.Size] = []
    model.head.register_forward_pre_hook(lambda *_: pytest.fail("all positions went through the head"))
    features = model.head.features
    model.head.features = lambda hidden: (seen.append(hidden.shape), features(hidden))[1]
    tokens, places = torch.arange(24).view(2, 12), torch.tensor([1, 7, 15])
    loss = loss_of(
        MaskedText(MaskedTextOptions()), model, MaskedBatch(tokens, torch.tensor([12, 9]), places, places, 3)
    )
    assert seen == [(3, 16)]
    hidden = model(tokens, torch.tensor([12, 9])).flatten(0, 1)[places]
    logits = torch.nn.functional.linear(features(hidden), model.head.weight, model.head.bias)
    expected = torch.nn.functional.cross_entropy(logits, places, reduction="sum")
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


# --- pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_label_smoothing_of_pairs(share: float):
    loss = loss_of(SequenceToSequence(Seq2SeqOptions(label_smoothing=share)), Says(SPOKEN), pairs_batch())
    rows = [(SURE, 0), (LEANS, 1), (LEANS, 0), (EVEN, 3)]
    assert loss.total.item() == pytest.approx(sum(smoothed(*row, share) for row in rows), rel=1e-6)
    assert loss.weight == 4


def test_scores_of_pairs_know_no_smoothing():
    """0 is right where SURE, 1 is where LEANS; wrong are 0 where LEANS, and 3 where EVEN."""
    task = SequenceToSequence(Seq2SeqOptions(label_smoothing=0.5))
    sums = measure_of(task, Says(SPOKEN), pairs_batch())
    assert sums.dtype == torch.float64
    assert task.scores((3 * sums).tolist()) == {
        "val_loss": pytest.approx(LOSS / 4, rel=1e-6),
        "perplexity": pytest.approx(math.exp(LOSS / 4), rel=1e-6),
        "token_accuracy": 0.5,
        "target_tokens": 12,
    }


# --- labels ------------------------------------------------------------------------------------------------------


def certain(labels: list[int], classes: int = 4) -> list[list[float]]:
    """0.7 for each of ``labels``, the rest for the others alike."""
    return [[0.7 if number == label else 0.3 / (classes - 1) for number in range(classes)] for label in labels]


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_label_smoothing_of_labels(share: float):
    batch = labels_batch([0, 1, IGNORE])
    loss = loss_of(Classification(ClassifyOptions(label_smoothing=share)), Says([SURE, SURE, LEANS]), batch)
    assert loss.total.item() == pytest.approx(smoothed(SURE, 0, share) + smoothed(SURE, 1, share), rel=1e-6)
    assert loss.weight == 2


def test_accuracy_and_f1():
    """Three of the four labels are seen, one of them never guessed right:

    truth    0 0 0 | 1 1 | 2          label   right  true  guessed   F1 = 2 right / (true + guessed)
    guess    0 0 1 | 1 0 | 0            0       2      3      4      4/7
                                        1       1      2      2      1/2
                                        2       0      1      0      0
                                        3       0      0      0      left out: there is nothing to find
    """
    task = Classification(ClassifyOptions(label_smoothing=0.5))
    truth, guess = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    sums = [measure_of(task, Says(certain(guess[cut])), labels_batch(truth[cut])) for cut in (slice(0, 2), slice(2, 6))]
    sums.append(measure_of(task, Says(certain([3])), labels_batch([IGNORE])))  # of a rank without a row
    assert {part.dtype for part in sums} == {torch.float64}
    assert task.scores(sum(sums).tolist()) == {
        "val_loss": pytest.approx((-3 * math.log(0.7) - 3 * math.log(0.1)) / 6, rel=1e-6),
        "accuracy": 0.5,
        "macro_f1": pytest.approx((4 / 7 + 1 / 2 + 0) / 3),
        "matthews": pytest.approx((3 * 6 - 3 * 4 - 2 * 2) / math.sqrt((36 - 14) * (36 - 20))),
        "rows": 6,
    }


def test_a_label_that_is_guessed_but_never_true_lowers_f1():
    task = Classification(ClassifyOptions())
    scores = task.scores(measure_of(task, Says(certain([0, 1, 3])), labels_batch([0, 1, 1])).tolist())
    assert (scores["accuracy"], scores["macro_f1"]) == (pytest.approx(2 / 3), pytest.approx((1 + 2 / 3 + 0) / 3))


# --- bf16 --------------------------------------------------------------------------------------------------------


def windows_batch() -> SpanBatch:
    """A question of one token in a paragraph of one, and another of two windows."""
    questions = [Question("q", "a", ("a",)), Question("r", "bc", ())]
    chars = [np.array([[0, 1]]), np.array([[0, 1], [1, 2]])]
    asked = AskedQuestions([0, 1], [0, 1, 3], questions, np.array([[1, 0], [1, 0], [1, 1]]), chars, 2, 3, True)
    tokens, spans = torch.zeros(3, 3, dtype=torch.int64), torch.tensor([[1, 1], [0, 0], [0, 0]])
    return SpanBatch(tokens, torch.full((3,), 3), torch.tensor([[0, 1, 1]] * 3), spans, 6, asked)


BATCHES = {
    "lm": Batch(TOKENS, TARGETS, 4),
    "mlm": masked_batch(),
    "seq2seq": pairs_batch(),
    "classify": labels_batch([0, 1]),
    "span_qa": windows_batch(),
}
SAYS = {"classify": [SURE, LEANS], "span_qa": [[[0.7, 0.2], [0.1, 0.4], [0.2, 0.4]]] * 3}


@pytest.mark.parametrize("name", TASKS)
def test_sums_are_exact_where_the_logits_are_bf16(name: str):
    """Autocast hands the logits over in bf16, whose 8 bits would lose the end of any sum over a batch."""
    probabilities = SAYS.get(name, SPOKEN)
    task = make_task(TaskOptions.model_validate({"name": name, "seq2seq": {"label_smoothing": 0.0}}))
    model = Says(probabilities, torch.bfloat16)
    exact = Says(probabilities)
    exact.answer = model.answer.double()
    exact.head.double()
    loss, expected = (loss_of(task, m, BATCHES[name]).total for m in (model, exact))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert measure_of(task, model, BATCHES[name])[0].item() == pytest.approx(loss.item(), rel=1e-6)
