"""The parts of a Transformer block against their formulas, written out slowly."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.models.layers import Attention, Block, CrossAttention, CrossBlock, FeedForward, make_norm
from hvdtrain.models.options import TransformerOptions


def options_of(width: int, heads: int = 1, **more) -> TransformerOptions:
    return TransformerOptions(width=width, heads=heads, **more)


def slow_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, sees: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(K)) V for each head, hidden where ``sees`` is False; heads are neighbouring columns."""
    columns = q.shape[2] // heads
    outs = []
    for head in range(heads):
        part = slice(head * columns, (head + 1) * columns)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(columns)
        outs.append(scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v[..., part])
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_the_formula(causal: bool, masked: bool):
    """A mask, where given, says alone who sees whom."""
    torch.manual_seed(0)
    rows, positions, width, heads = 2, 5, 12, 3
    attention = Attention(options_of(width, heads), causal)
    x = torch.randn(rows, positions, width)
    everything = torch.ones(rows, positions, positions, dtype=torch.bool)
    mask = (torch.rand(rows, positions, positions) < 0.5) | torch.eye(positions, dtype=torch.bool)
    sees = mask if masked else everything.tril() if causal else everything
    expected = attention.out(slow_attention(*attention.qkv(x).split(width, dim=2), heads, sees))
    out = attention(x, mask=mask[:, None] if masked else None)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_cross_attention_is_the_formula():
    """Queries from one side, keys and values from the other, whose padding is hidden."""
    torch.manual_seed(0)
    width, heads = 12, 3
    attention = CrossAttention(options_of(width, heads))
    x, memory = torch.randn(2, 4, width), torch.randn(2, 6, width)
    sees = torch.arange(6) < torch.tensor([6, 2])[:, None]
    k, v = attention.kv(memory).split(width, dim=2)
    expected = attention.out(slow_attention(attention.q(x), k, v, heads, sees[:, None]))
    out = attention(x, attention.keys_values(memory), sees[:, None, None])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_heads_of_another_width_and_numbers_added_to_the_scores(scaled: bool):
    """Unscaled, as T5 has it: softmax(Q K^T + numbers) V. Queries, keys and values may have biases of their own."""
    torch.manual_seed(0)
    rows, positions, width, heads, columns = 2, 5, 12, 3, 6
    options = options_of(width, heads, head_width=columns, bias=False, qkv_bias="yes", attention_scale=scaled)
    attention, cross = Attention(options), CrossAttention(options)
    x, memory = torch.randn(rows, positions, width), torch.randn(rows, 4, width)
    numbers = torch.randn(1, heads, positions, positions)
    numbers[..., 2, 3] = -torch.inf

    def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(2, (heads, columns)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(2, 3) / (math.sqrt(columns) if scaled else 1) + added
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    qkv = (x @ attention.qkv.weight.T + attention.qkv.bias).split(heads * columns, dim=2)
    expected = slow(*qkv, numbers) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, mask=numbers), expected, rtol=1e-5, atol=1e-6)
    kv = (memory @ cross.kv.weight.T + cross.kv.bias).split(heads * columns, dim=2)
    expected = slow(x @ cross.q.weight.T + cross.q.bias, *kv, torch.zeros(())) @ cross.out.weight.T
    torch.testing.assert_close(cross(x, cross.keys_values(memory)), expected, rtol=1e-5, atol=1e-6)
    assert attention.out.bias is cross.out.bias is None


def test_dropout_of_attention_works_in_training_only():
    torch.manual_seed(0)
    options, x = options_of(8, 2, bias=False, dropout=0.5), torch.randn(1, 6, 8)
    attention, cross = Attention(options), CrossAttention(options)
    keys_values = cross.keys_values(x)
    assert not torch.equal(attention(x), attention(x))
    assert not torch.equal(cross(x, keys_values), cross(x, keys_values))
    attention.eval()
    cross.eval()
    assert torch.equal(attention(x), attention(x))
    assert torch.equal(cross(x, keys_values), cross(x, keys_values))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norms(bias: bool, eps: float):
    torch.manual_seed(0)
    x = torch.randn(4, 32) * 3 + 1
    options = {"bias": bias, "norm_eps": eps}
    root_mean_square = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(make_norm(options_of(32, norm="rmsnorm", **options))(x), root_mean_square)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    norm = make_norm(options_of(32, **options))
    torch.testing.assert_close(norm(x), expected)
    assert (norm.bias is not None) == bias


def test_feed_forward_is_the_formula():
    torch.manual_seed(0)
    x = torch.randn(3, 24)
    plain = FeedForward(options_of(24))
    torch.testing.assert_close(plain(x), F.linear(F.gelu(plain.up(x)), plain.out.weight, plain.out.bias))
    gated = FeedForward(options_of(24, activation="swiglu", bias=False))
    gate, value = gated.up.weight.split(64)
    torch.testing.assert_close(gated(x), (F.silu(x @ gate.T) * (x @ value.T)) @ gated.out.weight.T)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """As GPT-2's code has it."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_tanh", tanh_gelu),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("geglu_tanh", tanh_gelu),
    ],
)
def test_activations(name: str, activation: Callable[[torch.Tensor], torch.Tensor]):
    torch.manual_seed(0)
    x = torch.randn(3, 8) * 3
    part = FeedForward(options_of(8, activation=name, ff_width=20, bias=False))
    up = x @ part.up.weight.T
    hidden = activation(up[:, :20]) * up[:, 20:] if name == "geglu_tanh" else activation(up)
    assert hidden.shape == (3, 20)
    torch.testing.assert_close(part(x), hidden @ part.out.weight.T)


@pytest.mark.parametrize("width", [24, 128, 256, 768, 1000])
def test_swiglu_has_about_as_many_parameters(width: int):
    plain, gated = (FeedForward(options_of(width, activation=kind, bias=False)) for kind in ("gelu", "swiglu"))
    assert gated.out.in_features % 8 == 0
    sizes = [sum(p.numel() for p in part.parameters()) for part in (plain, gated)]
    assert sizes[0] <= sizes[1] <= sizes[0] + 3 * 8 * width


# --- whole blocks, against torch's --------------------------------------------------------------------------------


def torchs(kind: type[nn.Module], norm_first: bool) -> nn.Module:
    """A layer of width 16 with numbers everywhere; ours take them over by ``copied``."""
    torch.manual_seed(0)
    layer = kind(16, 2, 40, 0.0, "relu", layer_norm_eps=1e-3, batch_first=True, norm_first=norm_first)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.5, 0.5)
    return layer


def copied(ours: nn.Module, layer: nn.Module, norms: list[str]) -> None:
    """``norms``: the names of ours, in torch's order."""
    theirs = {
        "attention.qkv.weight": layer.self_attn.in_proj_weight,
        "attention.qkv.bias": layer.self_attn.in_proj_bias,
        **{f"attention.out.{name}": value for name, value in layer.self_attn.out_proj.named_parameters()},
        **{f"feed_forward.up.{name}": value for name, value in layer.linear1.named_parameters()},
        **{f"feed_forward.out.{name}": value for name, value in layer.linear2.named_parameters()},
    }
    if isinstance(layer, nn.TransformerDecoderLayer):
        cross = layer.multihead_attn
        for name, value in (("weight", cross.in_proj_weight), ("bias", cross.in_proj_bias)):
            theirs[f"cross_attention.q.{name}"], theirs[f"cross_attention.kv.{name}"] = value.split([16, 32])
        theirs |= {f"cross_attention.out.{name}": value for name, value in cross.out_proj.named_parameters()}
    for number, norm in enumerate(norms, start=1):
        theirs |= {f"{norm}.{name}": v for name, v in getattr(layer, f"norm{number}").named_parameters()}
    ours.load_state_dict(theirs)


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
def test_blocks_are_torchs(norm_first: bool):
    """Pre-norm and post-norm, of an encoder and of an encoder-decoder's decoder."""
    options = options_of(16, 2, activation="relu", ff_width=40, norm_eps=1e-3, norm_first=norm_first)
    x, memory = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    sees = torch.arange(7) < torch.tensor([7, 2, 4])[:, None]
    reads = torch.arange(5) < torch.tensor([3, 5, 1])[:, None]
    layer, block = torchs(nn.TransformerEncoderLayer, norm_first), Block(options, causal=False)
    copied(block, layer, ["attention_norm", "feed_forward_norm"])
    expected = layer.train()(x, src_key_padding_mask=~sees)  # in eval torch would take another way
    torch.testing.assert_close(block(x, mask=sees[:, None, None]), expected, rtol=1e-4, atol=1e-4)

    layer, block = torchs(nn.TransformerDecoderLayer, norm_first), CrossBlock(options)
    copied(block, layer, ["attention_norm", "cross_attention_norm", "feed_forward_norm"])
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    expected = layer(x, memory, tgt_mask=causal, memory_key_padding_mask=~reads, tgt_is_causal=True)
    found = block(x, None, None, None, memory, reads[:, None, None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
