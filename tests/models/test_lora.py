"""Adapters: what they add, where they lie in fused matrices, and what is left when they are merged."""

from collections.abc import Sequence

import pytest
import torch
from tiny import Held, tiny_decoder
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.initial import fill
from hvdtrain.models.lora import AdaptedLinear, LoraOptions, Merged, adapt, initial_adapters, is_adapter, parts_of
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.slices import Rect

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
GATED = {"activation": "swiglu", "norm": "rmsnorm", "positions": "rotary", "kv_heads": 1, "bias": False}


class HeldWhole(Held):
    """Of which nobody asks for a part: an adapter is added to a whole weight."""

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        assert places is None
        return super().read(name)


def adapted(options: LoraOptions, seed: int = 3, random: bool = True, **shape) -> nn.Module:
    """A decoder with adapters; random: as if they had learned something."""
    model = tiny_decoder(seed=1, **shape)
    adapt(model, model.options, options)
    fill(model, initial_adapters(model, seed))
    if random:
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS))


@pytest.mark.parametrize("shape", [{}, GATED], ids=["plain", "gated, shared keys"])
def test_an_adapted_model_begins_as_it_was(shape: dict):
    assert torch.equal(
        logits(adapted(LoraOptions(targets="all"), random=False, **shape)), logits(tiny_decoder(1, **shape))
    )


def test_a_layer_adds_each_adapters_product_to_its_own_rows():
    linear, options = nn.Linear(5, 7), LoraOptions(rank=2, alpha=6.0)
    layer = AdaptedLinear(linear, {"q": 4, "k": 2, "v": 1}, ["q", "v"], options)
    for parameter in layer.lora.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5)
    expected = linear(x).clone()
    expected[:, :4] += 3.0 * x @ layer.lora["q"].a.T @ layer.lora["q"].b.T
    expected[:, 6:] += 3.0 * x @ layer.lora["v"].a.T @ layer.lora["v"].b.T
    torch.testing.assert_close(layer(x), expected)


def test_dropout_is_of_what_goes_into_the_adapters_alone():
    linear = nn.Linear(5, 4)
    layer = AdaptedLinear(linear, {"out": 4}, ["out"], LoraOptions(dropout=0.5))
    nn.init.normal_(layer.lora["out"].a)  # else what memory held before, which may be no number
    nn.init.zeros_(layer.lora["out"].b)
    x = torch.randn(3, 5)
    assert torch.equal(layer.train()(x), linear(x))
    nn.init.ones_(layer.lora["out"].b)
    nn.init.ones_(layer.lora["out"].a)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("shape", [{}, GATED], ids=["plain", "gated, shared keys"])
@pytest.mark.parametrize("targets", ["q,v", "k,out,down", "all"])
def test_merged_weights_compute_what_the_adapters_did(shape: dict, targets: str):
    options = LoraOptions(rank=3, targets=targets)
    model = adapted(options, **shape)
    merged = Merged(held := HeldWhole(model), held.names, model.options, options)
    plain = tiny_decoder(seed=9, **shape)
    assert merged.names == [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged.read(name))
    assert (logits(model) - logits(tiny_decoder(1, **shape))).abs().max() > 1e-3
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=2e-6)  # sums in another order


def test_pieces_of_merged_weights_are_those_of_the_whole():
    options = LoraOptions()
    model = adapted(options)
    merged = Merged(held := HeldWhole(model), held.names, model.options, options)
    whole = merged.read("blocks.0.attention.qkv.weight")
    pieces = merged.read("blocks.0.attention.qkv.weight", [Rect((2, 0), (3, 16)), Rect((40, 0), (1, 16))])
    assert torch.equal(pieces, torch.cat([whole[2:5], whole[40:41]]))
    with pytest.raises(KeyError):
        merged.whole("blocks.0.attention.qkv.lora.q.a")


def test_adapters_follow_from_the_seed_and_their_names():
    some, same, other = (adapted(LoraOptions(), seed, random=False) for seed in (3, 3, 4))
    first, again, third = (
        {n: p for n, p in model.named_parameters() if n.endswith("lora.q.a")} for model in (some, same, other)
    )
    assert len(first) == 2
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], third[name]) for name in first)
    assert not torch.equal(*first.values())
    wide = adapted(LoraOptions(targets="all"), 3, random=False)
    assert torch.equal(dict(wide.named_parameters())["blocks.1.attention.qkv.lora.q.a"], list(first.values())[1])


def test_cross_attention_has_adapters_of_its_own():
    shape = TransformerOptions(layers=1, heads=2, width=8, context=4)
    model = Seq2Seq(shape, 10)
    adapt(model, shape, LoraOptions(targets="k"))
    assert [name for name, _ in model.named_parameters() if is_adapter(name) and name.endswith("b")] == [
        "encoder_blocks.0.attention.qkv.lora.k.b",
        "blocks.0.attention.qkv.lora.k.b",
        "blocks.0.cross_attention.kv.lora.k.b",
    ]


def test_no_other_layer_has_parts():
    assert parts_of("pooler", TransformerOptions()) == parts_of("head.dense", TransformerOptions()) == {}


def test_an_unknown_target_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"the model has no 'gate'; it has: q, k, v, out, up, down, all"):
        adapt(model := tiny_decoder(), model.options, LoraOptions(targets="q,gate"))
