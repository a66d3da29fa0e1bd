"""The encoder and the classifier on it: what they may see, how they start, that they learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from hvdtrain.models.encoder import Classifier, Encoder
from hvdtrain.models.options import TransformerOptions

KINDS = [
    {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    {"preset": "bert"},
    {"preset": "t5", "init": "normal", "relative_buckets": 8, "relative_distance": 10},
]
NAMES = ["learned", "rotary", "bert", "t5"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32: a longer row is added up in another order
LENGTHS = torch.tensor([6, 1, 4])


def tiny_classifier(seed: int = 0, classes: int = 3, **options) -> Classifier:
    small = {"layers": 2, "heads": 2, "width": 16, "context": 12, "ff_ratio": 2.0}
    model = Classifier(TransformerOptions(**{**small, **options}), 50, classes)
    model.initialise(seed)
    return model


@pytest.fixture(params=KINDS, ids=NAMES)
def model(request: pytest.FixtureRequest) -> Classifier:
    # Weights of the size that training gives them: at the start attention is nearly even, and would hide much.
    model = tiny_classifier(**request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


def tokens_of(rows: int, positions: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 50, (rows, positions), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_shapes(model: Classifier):
    assert model.encoder(tokens_of(3, 6), LENGTHS).shape == (3, 6, 16)
    assert model(tokens_of(3, 6), LENGTHS).shape == (3, 3)
    assert model(tokens_of(1, 12), torch.tensor([12])).shape == (1, 3)
    assert tiny_classifier(vocab_multiple=64).encoder.embedding.weight.shape == (64, 16)
    with pytest.raises(AssertionError, match="13 positions in a context of 12"):
        model(tokens_of(1, 13), torch.tensor([13]))


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(model: Classifier):
    tokens, others = tokens_of(3, 6), tokens_of(3, 6, seed=6)
    is_token = torch.arange(6) < LENGTHS[:, None]
    changed = torch.where(is_token, tokens, others)
    assert not torch.equal(changed, tokens)
    assert torch.equal(model.encoder(changed, LENGTHS)[is_token], model.encoder(tokens, LENGTHS)[is_token])
    assert torch.equal(model(changed, LENGTHS), model(tokens, LENGTHS))


@torch.no_grad()
def test_how_much_padding_there_is_does_not_matter(model: Classifier):
    tokens = tokens_of(3, 12)
    for padded in range(6, 13):
        torch.testing.assert_close(model(tokens[:, :padded], LENGTHS), model(tokens[:, :6], LENGTHS), **CLOSE)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(tokens[row : row + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(model(tokens, LENGTHS)[row : row + 1], alone, **CLOSE)


@torch.no_grad()
def test_the_order_of_rows_does_not_matter(model: Classifier):
    tokens, order = tokens_of(3, 6), torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(tokens[order], LENGTHS[order]), model(tokens, LENGTHS)[order], **CLOSE)


@torch.no_grad()
def test_every_position_sees_every_token(model: Classifier):
    tokens, lengths = tokens_of(1, 6), torch.tensor([5])
    hidden = model.encoder(tokens, lengths)
    for position in range(5):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        moved = ~torch.isclose(model.encoder(changed, lengths), hidden).all(-1)
        assert moved[0, :5].all()


@torch.no_grad()
def test_the_order_of_tokens_matters(model: Classifier):
    tokens, lengths = tokens_of(1, 6), torch.tensor([6])
    swapped = tokens[:, [0, 2, 1, 3, 4, 5]]
    assert not torch.isclose(model(swapped, lengths), model(tokens, lengths), atol=1e-4).all()


def test_an_empty_row_is_finite(model: Classifier):
    """A rank that is one row short fills its batch with one, of weight 0; 0 * NaN would be NaN."""
    logits = model(tokens_of(2, 6), torch.tensor([6, 0]))
    assert logits.isfinite().all()
    (logits * torch.tensor([[1.0], [0.0]])).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_the_pooler_is_berts():
    """Dense and tanh on the first position, then the linear head."""
    model = tiny_classifier().eval()
    first = model.encoder(tokens_of(3, 6), LENGTHS)[:, 0]
    pooled = torch.tanh(first @ model.pooler.weight.T + model.pooler.bias)
    expected = pooled @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(tokens_of(3, 6), LENGTHS), expected)


def test_dropout_works_in_training_only():
    model, tokens = tiny_classifier(dropout=0.5), tokens_of(3, 6)
    assert not torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS))
    model.encoder.eval()
    assert not torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS))  # the head's own
    model.eval()
    assert torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS))


def test_the_start():
    """N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 layers)), from the seed alone; a guess's loss."""
    model = tiny_classifier(layers=8, heads=4, width=128)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name
            continue
        deviation = 0.02 / 4 if name.endswith(("attention.out.weight", "feed_forward.out.weight")) else 0.02
        spread = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a standard deviation
        assert parameter.std().item() == pytest.approx(deviation, rel=spread), name
    states = [tiny_classifier(seed).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    loss = F.cross_entropy(tiny_classifier()(tokens_of(3, 6), LENGTHS), torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(math.log(3), abs=0.05)


def test_gradients_reach_every_parameter(model: Classifier):
    F.cross_entropy(model(tokens_of(3, 6), LENGTHS), torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_an_encoder_alone_starts_by_its_seed():
    options = TransformerOptions(layers=1, width=16, context=12)
    encoders = [Encoder(options, 50) for _ in range(2)]
    for encoder in encoders:
        encoder.initialise(3)
    outs = [encoder(tokens_of(3, 6), LENGTHS) for encoder in encoders]
    assert torch.equal(*outs)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_it_learns_whether_a_token_occurs(positions: str):
    """One of token 7's places in a row of 2 to 10 makes it class 1; after the row's end it counts for nothing."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_classifier(classes=2, positions=positions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        tokens = torch.randint(0, 30, (32, 10), generator=generator)
        lengths = torch.randint(2, 11, (32,), generator=generator)
        tokens[torch.rand(32, 10, generator=generator) < 0.1] = 7
        classes = ((tokens == 7) & (torch.arange(10) < lengths[:, None])).any(1).long()
        loss = F.cross_entropy(model(tokens, lengths), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert sum(losses[-10:]) / 10 < 0.05  # guessing: 0.69


@torch.no_grad()
def test_what_goes_into_the_first_block_of_bert():
    """The norm of the sum of token, kind and position; an embedding may be scaled before it is added to."""
    encoder = tiny_classifier(preset="bert", embedding_scale=True).eval().encoder
    for parameter in encoder.parameters():
        parameter.normal_()
    tokens, types = tokens_of(3, 6), tokens_of(3, 6, seed=1) % 2
    total = encoder.embedding.weight[tokens] * 4 + encoder.token_type.weight[types] + encoder.position.weight[:6]
    norm = encoder.embedding_norm
    expected = F.layer_norm(total, (16,), norm.weight, norm.bias, 1e-12)
    torch.testing.assert_close(encoder.embed(tokens, types_BT=types), expected, rtol=1e-5, atol=1e-5)


def test_each_of_several_classes_begins_rare():
    """From 1 / 2 a classifier of 28 labels, most of them rare, ended at the same answer for every text."""
    for several, probability in ((True, 1 / 28), (False, 0.5)):
        model = Classifier(TransformerOptions(layers=1, heads=2, width=8, context=4), 10, 28, several)
        model.initialise(1)
        assert model.head.bias.sigmoid().tolist() == pytest.approx([probability] * 28)


@torch.no_grad()
@pytest.mark.parametrize("kinds", [0, 1])
def test_a_model_that_knows_one_kind_of_tokens_takes_a_second_text_for_the_same(kinds: int):
    encoder = Encoder(TransformerOptions(layers=1, width=16, heads=2, token_types=kinds), 50).eval()
    encoder.initialise(1)
    tokens, lengths = tokens_of(3, 6), torch.tensor([6, 4, 2])
    assert torch.equal(encoder(tokens, lengths, torch.ones_like(tokens)), encoder(tokens, lengths))
