"""The parts of a Transformer block against their formulas, written out slowly."""

import math

import pytest
import torch
import torch.nn.functional as F

from hvdtrain.models.layers import Attention, CrossAttention, FeedForward, make_norm
from hvdtrain.models.options import RotaryOptions, TransformerOptions
from hvdtrain.models.positions import rotary_table, rotate


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


def test_rotation_is_a_complex_turn():
    """Pair (x[k], x[k + K/2]) at position t is turned by t / 10000^(2k/K)."""
    torch.manual_seed(0)
    positions, width = 7, 8
    x = torch.randn(2, 3, positions, width, dtype=torch.float64)
    angles = [[t / 10_000 ** (2 * k / width) for k in range(width // 2)] for t in range(positions)]
    turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(
        torch.ones(positions, width // 2, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64)
    )
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(
        rotate(x, rotary_table(positions, width, RotaryOptions())), expected, rtol=1e-6, atol=1e-6
    )


def test_rows_may_have_their_own_positions():
    torch.manual_seed(0)
    table, x = rotary_table(9, 8, RotaryOptions()), torch.randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 0, 1]])
    together = rotate(x, table[:, positions].unsqueeze(2))
    for row in range(2):
        assert torch.equal(together[row], rotate(x[row], table[:, positions[row]]))


def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    table = rotary_table(64, 16, RotaryOptions())
    q, k = (torch.randn(16).expand(1, 1, 64, 16) for _ in range(2))
    scores = (rotate(q, table) @ rotate(k, table).transpose(2, 3))[0, 0]
    for distance in (0, 1, 5, 30):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not math.isclose(scores[5, 0], scores[0, 0], rel_tol=0.01)


@pytest.mark.parametrize("bias", [True, False])
def test_norms(bias: bool):
    torch.manual_seed(0)
    x = torch.randn(4, 32) * 3 + 1
    root_mean_square = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(make_norm(options_of(32, norm="rmsnorm", bias=bias))(x), root_mean_square)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    norm = make_norm(options_of(32, bias=bias))
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


@pytest.mark.parametrize("width", [24, 128, 256, 768, 1000])
def test_swiglu_has_about_as_many_parameters(width: int):
    plain, gated = (FeedForward(options_of(width, activation=kind, bias=False)) for kind in ("gelu", "swiglu"))
    assert gated.out.in_features % 8 == 0
    sizes = [sum(p.numel() for p in part.parameters()) for part in (plain, gated)]
    assert sizes[0] <= sizes[1] <= sizes[0] + 3 * 8 * width
