"""Attention by every way of attention.py against the formula, written out with each query's keys in full.

Tolerances: fp32, where sums of a few dozen terms are added in another order.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F

from hvdtrain.models import attention, products
from hvdtrain.models.attention import Runs, attend, document_runs, row_runs, runs_fit
from hvdtrain.models.layers import Attention, CrossAttention
from hvdtrain.models.masks import packed_mask, window_mask
from hvdtrain.models.options import TransformerOptions

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CPU = torch.device("cpu")
SEGMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 5, [0] * 18 + [-1] * 1, [0] + [1] * 12 + [-1] * 6])


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(K)) V, the heads of keys repeated for those of queries that share them."""
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return (scores if sees is None else scores.masked_fill(~sees, -torch.inf)).softmax(-1) @ v


def inputs_of(
    rows: int, positions: int, keys: int, kv_heads: int, heads: int = 4, width: int = 6
) -> list[torch.Tensor]:
    """Laid out in memory as a linear layer leaves them: a position's heads together."""
    generator = torch.Generator().manual_seed(rows * positions + keys)
    shapes = [
        (rows, length, count, width) for length, count in ((positions, heads), (keys, kv_heads), (keys, kv_heads))
    ]
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


def assert_same(way: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], inputs: list[torch.Tensor]):
    """Outputs and gradients."""
    found, expected = way(*inputs), reference(*inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_heads_that_share_keys(kv_heads: int, causal: bool):
    sees = torch.ones(7, 7).tril().bool() if causal else None
    assert_same(lambda *qkv: attend(*qkv, causal=causal), lambda *qkv: plain(*qkv, sees), inputs_of(3, 7, 7, kv_heads))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (3, 1, 7, 5)], ids=["keys alike for all queries", "each its own"])
def test_masks_over_shared_keys(kv_heads: int, shape: tuple[int, ...]):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    assert_same(lambda *qkv: attend(*qkv, mask), lambda *qkv: plain(*qkv, mask), inputs_of(3, 7, 5, kv_heads))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 15, 16, 17, 40])
def test_windows(kv_heads: int, window: int):
    """16 positions: windows that divide them and that do not; those above are no window."""
    distance = torch.arange(16)[:, None] - torch.arange(16)
    sees = (distance >= 0) & (distance < window)
    way = lambda *qkv: attend(*qkv, causal=True, window=window)  # noqa: E731
    assert_same(way, lambda *qkv: plain(*qkv, sees), inputs_of(2, 16, 16, kv_heads))


def test_a_narrow_window_makes_no_square(monkeypatch: pytest.MonkeyPatch):
    """64 positions, a window of 8: never more than 8 x 16 scores a block."""
    sizes, sdpa = [], attention._sdpa

    def spy(q: torch.Tensor, k: torch.Tensor, *more) -> torch.Tensor:
        sizes.append((q.shape[2], k.shape[2]))
        return sdpa(q, k, *more)

    monkeypatch.setattr(attention, "_sdpa", spy)
    attend(*inputs_of(2, 64, 64, 2), causal=True, window=8)
    assert sizes == [(8, 8), (8, 16)]
    sizes.clear()
    attend(*inputs_of(2, 64, 64, 2), causal=True, window=60)  # here blocks would be more work than the square
    assert sizes == [(64, 64)]


def test_the_picture_of_a_window():
    expected = ["x....", "xx...", "xxx..", ".xxx.", "..xxx"]
    assert ["".join(".x"[sees] for sees in row) for row in window_mask(5, 3, CPU).tolist()] == expected


def test_where_runs_begin():
    offsets = document_runs(torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0], [0, 1, 1, 1]]), CPU).offsets
    assert offsets.tolist() == [0, 2, 3, 4, 8, 9, 12]  # a row ends a run, also where the number goes on
    assert offsets.dtype == torch.int32
    assert row_runs(torch.zeros(3, 4)).offsets.tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window", [0, 1, 3, 30])
def test_runs_are_the_mask_of_documents(kv_heads: int, window: int):
    runs, sees = document_runs(SEGMENTS, CPU), packed_mask(SEGMENTS)
    if window:
        sees = sees & window_mask(19, window, CPU)
    way = lambda *qkv: attend(*qkv, runs, causal=True, window=window)  # noqa: E731
    assert_same(way, lambda *qkv: plain(*qkv, sees), inputs_of(3, 19, 19, kv_heads))


@pytest.mark.parametrize(("kv_heads", "shares"), [(2, True), (2, False), (4, True)])
@pytest.mark.parametrize("window", [0, 1, 3, 30])
def test_runs_through_varlen_attn(kv_heads: int, shares: bool, window: int, monkeypatch: pytest.MonkeyPatch):
    """What flash attention is asked for, by a stand-in that does what torch's documentation of varlen_attn says.

    shares: does this torch's know of keys that heads share?
    """
    monkeypatch.setattr(attention, "_VARLEN_SHARES", shares)
    read_heads = kv_heads if shares else 4

    def varlen(q, k, v, offsets, offsets_of_keys, longest, longest_of_keys, *, window_size, enable_gqa=False):
        assert q.shape == (57, 4, 6)
        assert k.shape == v.shape == (57, read_heads, 6)
        assert offsets.dtype == offsets_of_keys.dtype == torch.int32
        assert longest == longest_of_keys >= offsets.diff().max()
        assert enable_gqa == (read_heads != 4)
        before, after = window_size
        outs = []
        for begin, end in offsets.view(-1).unfold(0, 2, 1).tolist():
            distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            sees = (distance >= -after) & ((distance <= before) | (before == -1))
            outs.append(plain(*(x[begin:end].transpose(0, 1)[None] for x in (q, k, v)), sees)[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    offsets = document_runs(SEGMENTS, CPU).offsets
    sees = packed_mask(SEGMENTS)
    if window:
        sees = sees & window_mask(19, window, CPU)
    way = lambda *qkv: attention._attend_runs_flash(*qkv, offsets, window, 0.0)  # noqa: E731
    assert_same(way, lambda *qkv: plain(*qkv, sees), inputs_of(3, 19, 19, kv_heads))


def test_varlen_attn_takes_what_it_is_given():
    """The real one without a GPU: shapes and types, forward and backward, as torch itself states them."""
    q, k, v = (torch.empty(3, heads, 19, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    for x in (q, k, v):
        x.requires_grad_()
    out = attention._attend_runs_flash(q, k, v, torch.empty(8, dtype=torch.int32, device="meta"), 4, 0.0)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_where_runs_fit(monkeypatch: pytest.MonkeyPatch):
    """Everywhere on the CPU; on CUDA where flash attention does."""
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert runs_fit(CPU, torch.float32, 5, dropout=0.5)
    for major, dtype, width, dropout, fits in [
        (9, half, 64, 0.0, True),
        (8, torch.float16, 256, 0.0, True),
        (7, half, 64, 0.0, False),
        (9, torch.float32, 64, 0.0, False),
        (9, half, 60, 0.0, False),
        (9, half, 264, 0.0, False),
        (9, half, 64, 0.1, False),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, m=major: type("P", (), {"major": m}))
        assert runs_fit(cuda, dtype, width, dropout) == fits
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not runs_fit(cuda, half, 64, 0.0)


@pytest.mark.parametrize("sight", ["causal", "window", "mask", "runs"])
def test_dropout_reaches_every_way(sight: str):
    """With most weights dropped, and the others made larger, the mean over many draws is the value without."""
    qkv = [x.detach() for x in inputs_of(3, 19, 19, 2)]
    more = {
        "causal": {"causal": True},
        "window": {"causal": True, "window": 4},
        "mask": {"sight": torch.ones(1, 1, 1, 19, dtype=torch.bool)},
        "runs": {"sight": document_runs(SEGMENTS, CPU), "causal": True, "window": 4},
    }[sight]
    torch.manual_seed(0)
    draws = torch.stack([attend(*qkv, **more, dropout=0.5) for _ in range(2000)])
    assert (draws.std(0) > 0).all()  # of every query
    error = draws.std(0) / math.sqrt(2000)
    assert ((draws.mean(0) - attend(*qkv, **more)).abs() < 6 * error + 1e-6).all()


@pytest.mark.parametrize("packed", [True, False])
def test_under_bf16_autocast(packed: bool):
    """Half the digits: 2^-8 for each of a handful of roundings."""
    torch.manual_seed(0)
    layer, x = Attention(TransformerOptions(width=16, kv_heads=2, window=4)), torch.randn(3, 19, 16)
    mask = Runs(document_runs(SEGMENTS, CPU).offsets) if packed else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, mask=mask), rtol=0.05, atol=0.02)


def test_parameters_of_shared_heads():
    """Queries keep their width; keys and values have 2 of 8 heads."""
    options = TransformerOptions(width=32, heads=8, kv_heads=2)
    layer, cross = Attention(options), CrossAttention(options)
    assert layer.qkv.weight.shape == (32 + 2 * 8, 32)
    assert cross.kv.weight.shape == (2 * 8, 32)
    assert cross.keys_values(torch.zeros(3, 5, 32)).shape == (2, 3, 2, 5, 4)
    assert Attention(TransformerOptions(width=32, heads=8)).qkv.weight.shape == (96, 32)


# --- products on a CPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("positions", [1, 5, 8, 9, 21])
def test_short_rows_as_products(positions: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    """One block (up to 8 positions), and blocks of 4 queries, of which the last may have fewer."""
    monkeypatch.setattr(products, "_WHOLE", 8)
    monkeypatch.setattr(products, "_BLOCK", {torch.float32: 4})
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # not to be called
    sees = torch.ones(positions, positions).tril().bool()
    inputs = inputs_of(3, positions, positions, kv_heads)
    assert_same(lambda *qkv: attend(*qkv, causal=True), lambda *qkv: plain(*qkv, sees), inputs)


def test_products_in_bf16_are_as_exact_as_their_type():
    """Scores and probabilities are rounded to 8 bits; flash attention's error is two thirds of this one's."""
    q, k, v = (x.detach() for x in inputs_of(2, 300, 300, 4, width=32))
    narrow = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    found = attend(*narrow, causal=True)
    expected = plain(*wide, torch.ones(300, 300).tril().bool())
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    pairs = [(found, expected), *zip(*(
        torch.autograd.grad(out, inputs, upstream.to(out.dtype)) for out, inputs in ((found, narrow), (expected, wide))
    ), strict=True)]  # fmt: skip
    for a, b in pairs:
        assert torch.linalg.norm(a.double() - b) < 6e-3 * torch.linalg.norm(b)


@pytest.mark.parametrize("flash", [True, False], ids=["flash switched on", "flash switched off"])
def test_long_rows_keep_no_square(flash: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "MOST_POSITIONS", 16)
    kept: list[int] = []
    before = torch.backends.cuda.flash_sdp_enabled()  # of CPUs too
    torch.backends.cuda.enable_flash_sdp(flash)
    try:
        for positions in (16, 17):
            inputs = inputs_of(1, positions, positions, 4)
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                attend(*inputs, causal=True)
            assert (max(kept) >= 4 * positions**2) == (positions == 16)
            kept.clear()
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def test_dropout_and_masks_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "attend_by_products", None)
    monkeypatch.setattr(attention, "attend_by_flash", None)
    q, k, v = inputs_of(1, 8, 8, 4)
    attend(q, k, v, causal=True, dropout=0.1)
    attend(q, k, v, torch.ones(8, 8).tril().bool())
    attend(q, k, v)
    with products.no_products():
        attend(q, k, v, causal=True)
