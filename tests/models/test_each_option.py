"""Every option of a Transformer changes what it computes, of itself; what has no use for one refuses it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier, Encoder, MaskedLanguageModel, SpanModel
from hvdtrain.models.options import RotaryOptions, TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

SIZES = {"layers": 2, "heads": 2, "width": 16, "context": 12, "ff_ratio": 2.0}
TOKENS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(5))
TYPES = (torch.arange(12) > 6).long().expand(3, 12)
LENGTHS = torch.tensor([12, 1, 8])

ROTARY = {"positions": "rotary"}
RELATIVE = {"positions": "relative", "relative_buckets": 8, "relative_distance": 10}
LONGER = {"factor": 4.0, "original_context": 8}
# (what is common to both, what one of them has)
ONE_MORE = [
    ({}, {"kv_heads": 1}),
    ({}, {"head_width": 6}),
    ({}, {"ff_width": 20}),
    ({}, {"positions": "none"}),
    ({}, {"positions": "rotary"}),
    ({}, {"positions": "sinusoidal"}),
    ({"positions": "sinusoidal"}, {"positions": "sinusoidal_halves"}),
    ({"positions": "sinusoidal"}, {"position_offset": 2}),
    (ROTARY, {"rotary": {"base": 100.0}}),
    (ROTARY, {"rotary": {"scaling": "linear", "factor": 2.0}}),
    (ROTARY, {"rotary": {"scaling": "llama3", **LONGER}}),
    (ROTARY, {"rotary": {"scaling": "yarn", **LONGER}}),
    ({"positions": "none"}, {**RELATIVE}),
    (RELATIVE, {"relative_buckets": 4}),
    (RELATIVE, {"relative_distance": 5}),
    ({}, {"embedding_scale": True}),
    ({}, {"embedding_norm": True}),
    ({}, {"norm": "rmsnorm"}),
    ({}, {"norm_first": False}),
    ({}, {"norm_eps": 1e-2}),
    ({}, {"attention_scale": False}),
    ({}, {"bias": False}),
    ({"bias": False}, {"qkv_bias": "yes"}),
    ({}, {"qkv_bias": "no"}),
    *(({}, {"activation": name}) for name in ("gelu_tanh", "relu", "silu", "swiglu", "geglu_tanh")),
]


def made(kind: Callable[..., nn.Module], options: dict, *more: int) -> nn.Module:
    """Each tensor large, and drawn by its name alone: two models differ by what their options do with them."""
    model = kind(TransformerOptions(**{**SIZES, **options}), 50, *more).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.5, generator=generator))
    return model


def apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    """By more than rounding; the two GELUs differ by 1e-4."""
    return not torch.allclose(one, other, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("common", "more"), ONE_MORE, ids=str)
def test_it_changes_every_model(common: dict, more: dict):
    for kind, inputs in (
        (Decoder, (TOKENS,)),
        (Encoder, (TOKENS, LENGTHS)),
        (Seq2Seq, (TOKENS, LENGTHS, TOKENS.flip(1))),
    ):
        assert apart(made(kind, common)(*inputs), made(kind, {**common, **more})(*inputs))


@torch.no_grad()
def test_learned_positions_of_an_offset_are_other_rows():
    plain, later = made(Decoder, {}), made(Decoder, {"position_offset": 2})
    assert later.position.weight.shape == (14, 16)
    later.position.weight[2:] = plain.position.weight
    assert torch.equal(later(TOKENS), plain(TOKENS))


@torch.no_grad()
def test_an_encoders_own_positions_are_its_alone():
    model = made(Seq2Seq, {"separate_positions": True})
    target = model.embed(TOKENS)
    memory = model.encode(TOKENS, LENGTHS)
    model.encoder_position.weight.normal_()
    assert torch.equal(model.embed(TOKENS), target)
    assert apart(model.encode(TOKENS, LENGTHS), memory)
    assert "encoder_position.weight" not in dict(made(Seq2Seq, {}).named_parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "more"), [(Encoder, ()), (Classifier, (3,)), (MaskedLanguageModel, ()), (SpanModel, ())]
)
def test_token_types(kind: Callable[..., nn.Module], more: tuple):
    model = made(kind, {"token_types": 2}, *more)
    assert torch.equal(model(TOKENS, LENGTHS), model(TOKENS, LENGTHS, torch.zeros_like(TYPES)))
    assert apart(model(TOKENS, LENGTHS), model(TOKENS, LENGTHS, TYPES))


def test_post_norm_blocks_need_no_norm_behind_them():
    for kind, norms in ((Decoder, {"norm"}), (Encoder, {"norm"}), (Seq2Seq, {"norm", "encoder_norm"})):
        names = [dict(made(kind, {"norm_first": first}).named_parameters()) for first in (True, False)]
        assert {*names[0]} - {*names[1]} == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Decoder, {"token_types": 2}, "model.token_types=2 is not for a decoder; set it to 0"),
        (Seq2Seq, {"token_types": 2}, "model.token_types=2 is not for an encoder-decoder; set it to 0"),
        (Decoder, {"separate_positions": True}, "model.separate_positions=true is not for a decoder; set it to false"),
        (SpanModel, {"separate_positions": True}, "separate_positions=true is not for an encoder alone"),
    ],
)
def test_what_a_model_has_no_use_for(kind: Callable[..., nn.Module], options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        made(kind, options)


def test_every_option_is_tried():
    """Here or, as for those that are named, elsewhere in this folder."""
    tried = {name for _, more in ONE_MORE for name in more}
    here = {"position_offset", "separate_positions", "token_types", "rotary"}
    sizes = {"layers", "encoder_layers", "heads", "width", "context", "ff_ratio", "window", "dropout", "vocab_multiple"}
    elsewhere = {"preset", "init", "tied", "head_bias", "head_scale"}
    assert tried | here | sizes | elsewhere == set(TransformerOptions.model_fields)
    scalings = {"base", *(name for _, more in ONE_MORE for name in more.get("rotary", {}))}
    by_formula = {"low_factor", "high_factor", "fast_turns", "slow_turns", "attention_factor"}  # test_positions.py
    assert scalings | by_formula == set(RotaryOptions.model_fields)
