"""The parts of a Transformer block against their formulas, written out slowly."""

import math

import pytest
import torch
import torch.nn.functional as F

from hvdtrain.models.layers import Attention, FeedForward, KVCache, make_norm, rotary_table, rotate


def test_attention_is_the_formula():
    """softmax(Q K^T / sqrt(K)) V for each head, later positions hidden; heads are neighbouring columns."""
    torch.manual_seed(0)
    rows, positions, width, heads = 2, 5, 12, 3
    attention = Attention(width, heads, bias=True, dropout=0.0)
    x = torch.randn(rows, positions, width)
    q, k, v = attention.qkv(x).split(width, dim=2)
    columns = width // heads
    outs = []
    for head in range(heads):
        part = slice(head * columns, (head + 1) * columns)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(columns)
        scores = scores.masked_fill(torch.ones(positions, positions).triu(1).bool(), -torch.inf)
        outs.append(scores.softmax(-1) @ v[..., part])
    expected = attention.out(torch.cat(outs, dim=2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


def test_dropout_of_attention_works_in_training_only():
    torch.manual_seed(0)
    attention, x = Attention(8, 2, bias=False, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


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
    torch.testing.assert_close(rotate(x, rotary_table(positions, width)), expected, rtol=1e-6, atol=1e-6)


def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    table = rotary_table(64, 16)
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
    torch.testing.assert_close(make_norm("rmsnorm", 32, bias)(x), root_mean_square)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    norm = make_norm("layernorm", 32, bias)
    torch.testing.assert_close(norm(x), expected)
    assert (norm.bias is not None) == bias


def test_feed_forward_is_the_formula():
    torch.manual_seed(0)
    x = torch.randn(3, 24)
    plain = FeedForward(24, 4.0, "gelu", bias=True)
    torch.testing.assert_close(plain(x), F.linear(F.gelu(plain.up(x)), plain.out.weight, plain.out.bias))
    gated = FeedForward(24, 4.0, "swiglu", bias=False)
    gate, value = gated.up.weight.split(64)
    torch.testing.assert_close(gated(x), (F.silu(x @ gate.T) * (x @ value.T)) @ gated.out.weight.T)


@pytest.mark.parametrize("width", [24, 128, 256, 768, 1000])
def test_swiglu_has_about_as_many_parameters(width: int):
    plain, gated = (FeedForward(width, 4.0, kind, bias=False) for kind in ("gelu", "swiglu"))
    assert gated.out.in_features % 8 == 0
    sizes = [sum(p.numel() for p in part.parameters()) for part in (plain, gated)]
    assert sizes[0] <= sizes[1] <= sizes[0] + 3 * 8 * width


def test_the_cache_grows_by_what_is_appended():
    cache = KVCache(1, 2, 4, 3, torch.zeros(1))
    first, second = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 1, 3)
    cache.append(first, -first)
    keys, values = cache.append(second, -second)
    assert torch.equal(keys, torch.cat([first, second], dim=2))
    assert torch.equal(values, -keys)
    assert cache.length == 4
