"""Positions against their formulas, written out slowly."""

import math

import pytest
import torch

from hvdtrain.models.options import RotaryOptions, TransformerOptions
from hvdtrain.models.positions import RelativeBias, relative_buckets, rotary_table, rotate, sinusoids

PLAIN = RotaryOptions()

# --- added to the embeddings --------------------------------------------------------------------------------------


def test_sinusoids_are_the_papers():
    """PE(t, 2i) = sin(t / 10000^(2i / D)), PE(t, 2i + 1) = cos(the same); Vaswani et al. 2017, 3.5."""
    table, halves = sinusoids(9, 6, halves=False), sinusoids(9, 6, halves=True)
    for t in range(9):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            expected = pytest.approx((math.sin(angle), math.cos(angle)), abs=1e-7)
            assert (table[t, 2 * i].item(), table[t, 2 * i + 1].item()) == expected
            assert (halves[t, i].item(), halves[t, 3 + i].item()) == expected


# --- rotary -------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(rotate(x, rotary_table(positions, width, PLAIN)), expected, rtol=1e-6, atol=1e-6)


def test_rows_may_have_their_own_positions():
    torch.manual_seed(0)
    table, x = rotary_table(9, 8, PLAIN), torch.randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 0, 1]])
    together = rotate(x, table[:, positions].unsqueeze(2))
    for row in range(2):
        assert torch.equal(together[row], rotate(x[row], table[:, positions[row]]))


def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    table = rotary_table(64, 16, PLAIN)
    q, k = (torch.randn(16).expand(1, 1, 64, 16) for _ in range(2))
    scores = (rotate(q, table) @ rotate(k, table).transpose(2, 3))[0, 0]
    for distance in (0, 1, 5, 30):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not math.isclose(scores[5, 0], scores[0, 0], rel_tol=0.01)


def frequencies_of(head_width: int, **options) -> tuple[list[float], float]:
    """Radians a position of each pair, read from the first positions of the table; and what it is multiplied by."""
    cos, sin = rotary_table(2, head_width, RotaryOptions(**options)).double()
    assert torch.equal(sin[0], torch.zeros(head_width // 2).double())
    return torch.atan2(sin[1], cos[1]).tolist(), cos[0, 0].item()


def test_linear_scaling_divides_every_frequency():
    slowed, factor = frequencies_of(16, scaling="linear", factor=4.0, base=500.0)
    assert slowed == pytest.approx([500 ** (-k / 8) / 4 for k in range(8)], rel=1e-6)
    assert factor == 1


def test_llama3_slows_long_waves_alone():
    """Llama 3.1: by the length of a turn in tokens, between old context / 4 and old context / 1 in proportion."""
    old, low, high, factor = 64, 1.0, 4.0, 8.0
    options = {"scaling": "llama3", "factor": factor, "original_context": old, "low_factor": low, "high_factor": high}
    found, times = frequencies_of(32, base=1000.0, **options)
    kinds = set()
    for k, one in enumerate(found):
        plain = 1000 ** (-k / 16)
        wave = 2 * math.pi / plain
        smooth = (old / wave - low) / (high - low)
        kind = "kept" if wave < old / high else "slowed" if wave > old / low else "between"
        expected = {"kept": plain, "slowed": plain / factor, "between": (1 - smooth) * plain / factor + smooth * plain}
        assert one == pytest.approx(expected[kind], rel=1e-6)
        kinds.add(kind)
    assert (kinds, times) == ({"kept", "slowed", "between"}, 1)


def test_yarn_slows_by_turns():
    """Peng et al. 2023, eq. 19 to 22; from the pair with fast_turns in the old context to the one with slow_turns."""
    old, fast, slow, factor = 512, 20.0, 2.0, 4.0
    found, times = frequencies_of(
        64, scaling="yarn", base=1e4, factor=factor, original_context=old, fast_turns=fast, slow_turns=slow
    )
    plain = [1e4 ** (-k / 32) for k in range(32)]
    turns = [old * one / (2 * math.pi) for one in plain]
    first = max(k for k in range(32) if turns[k] >= fast)  # the whole pair at or before the border, and the one behind
    last = min(k for k in range(32) if turns[k] <= slow)
    assert 0 < first < last < 31
    for k, one in enumerate(found):
        ramp = min(max((k - first) / (last - first), 0), 1)
        assert one == pytest.approx(plain[k] / factor * ramp + plain[k] * (1 - ramp), rel=1e-6)
    assert times == pytest.approx(0.1 * math.log(4) + 1)
    given = frequencies_of(64, scaling="yarn", factor=factor, original_context=old, attention_factor=1.25)
    assert given[1] == 1.25


# --- relative -----------------------------------------------------------------------------------------------------


def bucket_of(distance: int, causal: bool, buckets: int, most: int) -> int:
    """Raffel et al. 2020, 2.1, as the code of T5 has it."""
    bucket = 0
    if not causal:
        buckets //= 2
        bucket = buckets if distance > 0 else 0
    away = max(-distance, 0) if causal else abs(distance)
    near = buckets // 2
    if away < near:
        return bucket + away
    return bucket + min(near + int(math.log(away / near) / math.log(most / near) * (buckets - near)), buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (4, 3)])
def test_buckets_are_t5s(causal: bool, buckets: int, most: int):
    distances = torch.arange(-300, 301)
    found = relative_buckets(distances, causal, buckets, most)
    assert found.tolist() == [bucket_of(one, causal, buckets, most) for one in distances.tolist()]
    assert set(found.tolist()) <= set(range(buckets))
    assert len(set(found.tolist())) == buckets - (not causal)  # no key stands behind a query at a distance of 0


def bias_of(window: int = 0, causal: bool = True) -> RelativeBias:
    torch.manual_seed(0)
    options = TransformerOptions(positions="relative", relative_buckets=8, relative_distance=10, window=window, heads=2)
    return RelativeBias(options, causal)


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 3), (False, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_bias_of_whole_rows(causal: bool, window: int, masked: bool):
    bias, positions = bias_of(window, causal), 17
    sees = torch.arange(positions) < torch.tensor([17, 4])[:, None] if masked else torch.ones(1, positions).bool()
    found = bias(positions, sees[:, None, None] if masked else None)
    assert found.shape == (2 if masked else 1, 2, positions, positions)
    for query in range(positions):
        for key in range(positions):
            far = causal and (key > query or (window and query - key >= window))
            number = bias.weight[bucket_of(key - query, causal, 8, 10)]
            for row, out in enumerate(found):
                hidden = far or not sees[row, key]
                assert torch.equal(out[:, query, key], torch.full_like(number, -math.inf) if hidden else number)


def test_gradients_of_the_bias_are_sums_over_pairs():
    """Of pairs that are seen: each bucket gets as many as it has."""
    bias = bias_of(window=3)
    bias(5).where(bias(5).isfinite(), 0).sum().backward()
    assert bias.weight.grad.tolist() == [[5.0] * 2, [4.0] * 2, [3.0] * 2, *[[0.0] * 2] * 5]
