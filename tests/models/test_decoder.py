"""The decoder: what it may see, how it starts, how large it is."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny import tiny_decoder

from hvdtrain.config import load_config
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.options import TransformerOptions

KINDS = [
    {"positions": positions, "norm": norm, "activation": activation, "bias": bias}
    for (positions, norm, activation), bias in zip(
        product(["learned", "rotary"], ["layernorm", "rmsnorm"], ["gelu", "swiglu"]), [True, False] * 4, strict=True
    )
]
KINDS += [
    {"preset": "t5", "init": "normal", "relative_buckets": 8, "relative_distance": 10},
    {"preset": "vaswani", "init": "normal", "head_width": 6},
]


@pytest.fixture(params=KINDS, ids=["-".join(map(str, kind.values())) for kind in KINDS])
def model(request: pytest.FixtureRequest) -> Decoder:
    return tiny_decoder(**request.param, context=12).eval()


def tokens_of(rows: int, positions: int, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, positions), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_shapes(model: Decoder):
    hidden = model(tokens_of(3, 7))
    assert hidden.shape == (3, 7, 16)
    assert model.logits(hidden).shape == (3, 7, 50)
    assert model(tokens_of(1, 1)).shape == (1, 1, 16)
    assert model(tokens_of(1, 12)).shape == (1, 12, 16)


@torch.no_grad()
def test_no_position_sees_a_later_one(model: Decoder):
    tokens = tokens_of(2, 12)
    hidden = model(tokens)
    for position in range(12):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        other = model(changed)
        assert torch.equal(other[:, :position], hidden[:, :position])
        assert not torch.isclose(other[:, position:], hidden[:, position:]).all(-1).any()  # all later ones do


@torch.no_grad()
def test_rows_do_not_see_one_another(model: Decoder):
    tokens = tokens_of(3, 12)
    torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 5, 12])
def test_decoding_with_the_cache_is_the_full_forward(model: Decoder, prefix: int):
    tokens = tokens_of(2, 12)
    cache = model.new_cache()
    pieces = [model.decode(tokens[:, :prefix], cache)]
    pieces += [model.decode(tokens[:, t : t + 1], cache) for t in range(prefix, 12)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-5, atol=1e-6)
    assert cache.length == 12


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_positions_are_told_apart(positions: str):
    """Without positions causal attention over one repeated token would give the same state everywhere."""
    hidden = tiny_decoder(positions=positions, vocab_size=3).eval()(torch.tensor([[1, 2, 1, 2, 1, 2]]))
    assert not torch.isclose(hidden[0, 2:], hidden[0, :-2]).all(-1).any()


def test_the_tied_matrix_is_one(model: Decoder):
    assert model.head.weight is model.embedding.weight
    assert sum(name.startswith(("head", "embedding")) for name, _ in model.named_parameters()) == 1
    untied = tiny_decoder(tied=False)
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (tiny_decoder(), untied)]
    assert sizes[1] - sizes[0] == 50 * 16


def test_parameters_keep_their_names_and_order():
    """Checkpoints go by the names; the start of the weights and the gradients' order on the wire by the order."""
    block = [
        *("attention_norm.weight", "attention_norm.bias"),
        *(f"attention.{part}.{kind}" for part in ("qkv", "out") for kind in ("weight", "bias")),
        *("feed_forward_norm.weight", "feed_forward_norm.bias"),
        *(f"feed_forward.{part}.{kind}" for part in ("up", "out") for kind in ("weight", "bias")),
    ]
    blocks = [f"blocks.{number}.{name}" for number in range(2) for name in block]
    names = ["embedding.weight", "position.weight", *blocks, "norm.weight", "norm.bias"]
    assert [name for name, _ in tiny_decoder().named_parameters()] == names
    assert list(tiny_decoder().state_dict()) == [*names, "head.weight"]
    rotary = [name for name, _ in tiny_decoder(positions="rotary", tied=False).named_parameters()]
    assert rotary == [*(name for name in names if name != "position.weight"), "head.weight"]


def test_more_tokens_than_positions_are_a_mistake(model: Decoder):
    with pytest.raises(AssertionError, match="13 positions in a context of 12"):
        model(tokens_of(1, 13))


def test_the_first_loss_is_that_of_a_guess(model: Decoder):
    tokens, targets = tokens_of(20, 12), tokens_of(20, 13)[:, 1:]
    loss = F.cross_entropy(model.logits(model(tokens)).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(50), abs=0.05)


def test_the_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = tiny_decoder(seed=3).state_dict()
    torch.manual_seed(2)
    again, other = tiny_decoder(seed=3).state_dict(), tiny_decoder(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [name for name in first if torch.equal(first[name], other[name])] == [
        name for name in first if first[name].dim() < 2
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_the_start_is_gpt2s(tied: bool):
    """N(0, 0.02); residual projections N(0, 0.02 / sqrt(2 layers)); biases 0, norms 1."""
    model = tiny_decoder(layers=8, heads=4, width=128, vocab_size=500, context=64, tied=tied)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name
            continue
        deviation = 0.02 / 4 if name.endswith(("attention.out.weight", "feed_forward.out.weight")) else 0.02
        spread = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a standard deviation
        assert parameter.std().item() == pytest.approx(deviation, rel=spread), name
        assert abs(parameter.mean().item()) < 4 * deviation / math.sqrt(parameter.numel()), name


def test_gpt2_has_124_million_parameters():
    """nanoGPT's count for the same model: 124.37 million, 123.59 million without the positions."""
    with torch.device("meta"):
        model = Decoder(load_config("gpt2-124m").model, 50_257)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    block = 2 * 768 + 4 * 768 * 768 + 2 * 4 * 768 * 768
    assert sum(sizes.values()) == 50_304 * 768 + 1024 * 768 + 12 * block + 768 == 124_373_760
    assert sum(sizes.values()) - sizes["position.weight"] == 123_587_328


@torch.no_grad()
def test_the_vocabulary_is_padded():
    model = tiny_decoder(vocab_size=50, vocab_multiple=64)
    assert model.logits(model(tokens_of(1, 3))).shape == (1, 3, 64)
    assert model.vocab_size == 50
    assert tiny_decoder(vocab_size=64, vocab_multiple=64).embedding.weight.shape == (64, 16)


def test_dropout_works_in_training_only():
    model, tokens = tiny_decoder(dropout=0.5), tokens_of(1, 8)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3, "width": 16}, "heads=3 does not divide width=16"),
        ({"heads": 4, "width": 12, "positions": "rotary"}, "rotary positions need an even head width"),
        ({"width": -16}, "greater than or equal to 1"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"encoder_layers": -1}, "greater than or equal to 0"),
        ({"context": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"ff_ratio": 0.0}, "greater than 0"),
        ({"positions": "absolute"}, "'learned', 'rotary'"),
        ({"depth": 3}, "not permitted"),
    ],
)
def test_impossible_options(options: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        TransformerOptions(**options)
