"""A vocabulary whose rows are spread over parts, against the whole one: losses, both gradients, scores and guesses."""

from dataclasses import replace

import pytest
import torch
from parts import on_parts
from torch import nn

from hvdtrain.comm.axis import Axis
from hvdtrain.cut.crossings import parts_of
from hvdtrain.cut.vocabulary import SpreadEmbedding, SpreadHead, Words
from hvdtrain.models import losses
from hvdtrain.models.heads import OutputHead
from hvdtrain.models.losses import LossTerms
from hvdtrain.models.options import TransformerOptions

WORDS, WIDTH, TARGETS = 51, 16, 70  # words: neither 2 nor 4 divides them
IGNORE = -100


@pytest.fixture
def head() -> OutputHead:
    torch.manual_seed(0)
    head = OutputHead(TransformerOptions(width=WIDTH, head_bias=True, tied=False), nn.Embedding(WORDS, WIDTH))
    nn.init.normal_(head.weight)
    return head


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(TARGETS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> torch.Tensor:
    targets = torch.randint(WORDS, (TARGETS,), generator=torch.Generator().manual_seed(2))
    targets[::9] = IGNORE
    targets[1], targets[2] = 0, WORDS - 1
    return targets


def part_of(head: OutputHead, axis: Axis) -> SpreadHead:
    words = Words(parts_of(axis), WORDS)
    own = slice(words.first, words.first + words.count)
    part = OutputHead(TransformerOptions(width=WIDTH, head_bias=True, tied=False), nn.Embedding(words.count, WIDTH))
    part.weight, part.bias = nn.Parameter(head.weight[own].detach()), nn.Parameter(head.bias[own].detach())
    part.__class__, part.words = SpreadHead, words
    return part


def scored(head: OutputHead, features: torch.Tensor, targets: torch.Tensor, terms: LossTerms, scale: float = 1.0):
    """The loss, and its gradients by features, weight and bias."""
    features = features.clone().requires_grad_()
    loss = head.cross_entropy(features, targets, terms)
    (loss * scale).backward()
    return loss.detach(), features.grad, head.weight.grad, head.bias.grad


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "terms",
    [LossTerms(), LossTerms(label_smoothing=0.1), LossTerms(z_loss=0.01), LossTerms(0.2, 0.01)],
    ids=["plain", "smoothed", "z", "both"],
)
@pytest.mark.parametrize("chunk", [32, 1000])
def test_cross_entropy(head, features, targets, terms: LossTerms, parts: int, chunk: int, monkeypatch):
    """In chunks of another number of targets than the whole head's, too: what the parts agree on is theirs."""
    monkeypatch.setattr(losses, "_MIN_ROWS", chunk)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", {"cpu": 1})
    terms = replace(terms, ignore=IGNORE)
    expected = scored(head, features, targets, terms, scale=3.0)
    found = on_parts(parts, lambda axis: scored(part_of(head, axis), features, targets, terms, scale=3.0))
    for loss, by_features, _, _ in found:
        assert torch.equal(loss, found[0][0]) and torch.equal(by_features, found[0][1])
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
        assert apart(by_features, expected[1]) <= 1e-6
    assert apart(torch.cat([one[2] for one in found]), expected[2]) <= 1e-6
    assert apart(torch.cat([one[3] for one in found]), expected[3]) <= 1e-6


def test_no_part_sees_more_logits_than_its_own(head, features, targets):
    def work(axis: Axis):
        scored(part_of(head, axis), features, targets, LossTerms())
        return axis.calls

    assert on_parts(4, work)[0] == [
        "gather of [1, 4, 70] float32 along 0",
        "sum of [70, 16] float32",
    ]


def test_huge_logits_of_another_part_overflow_nothing(head, features, targets):
    with torch.no_grad():
        head.bias[40] += 500.0
    expected = scored(head, features, targets, LossTerms())
    for found in on_parts(2, lambda axis: scored(part_of(head, axis), features, targets, LossTerms())):
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
        assert apart(found[1], expected[1]) <= 1e-6


def test_bf16_products_are_scored_in_fp32(head, features, targets):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = head.cross_entropy(features, targets, LossTerms())

    def work(axis: Axis):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return part_of(head, axis).cross_entropy(features, targets, LossTerms())

    for found in on_parts(2, work):
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_logits_and_guesses_are_of_the_whole_vocabulary(head, features, parts: int):
    """Of equal scores the first word is told, as by the whole head."""
    with torch.no_grad():
        head.weight[49], head.bias[49] = head.weight[3], head.bias[3]
        features[5] = 9 * head.weight[3]
        expected, best = head(features), head.best(features)
    assert best[5] == 3

    def work(axis: Axis):
        part = part_of(head, axis)
        with torch.no_grad():
            return part(features.view(7, 10, WIDTH)), part.best(features), part.best(features[:0])

    for logits, guesses, none in on_parts(parts, work):
        torch.testing.assert_close(logits.view(TARGETS, WORDS), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(guesses, best)
        assert none.shape == (0,) and none.dtype == torch.int64


@pytest.mark.parametrize("parts", [2, 4])
def test_every_token_has_its_vector(parts: int):
    whole, tokens = nn.Embedding(WORDS, WIDTH), torch.arange(WORDS).view(3, 17)

    def work(axis: Axis):
        words = Words(parts_of(axis), WORDS)
        part = nn.Embedding.from_pretrained(whole.weight[words.first : words.first + words.count].detach())
        part.__class__, part.words = SpreadEmbedding, words
        return part(tokens)

    for found in on_parts(parts, work):
        assert torch.equal(found, whole(tokens))
