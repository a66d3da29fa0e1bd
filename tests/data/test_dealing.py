"""Rows dealt by speed: whole rows, one at least, and nobody could end sooner."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.data.dealing import dealt
from hvdtrain.data.loader import Feed
from hvdtrain.data.ramp import Ramp

speeds_of = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


def longest(counts: list[int], speeds: list[float]) -> float:
    return max(count / speed for count, speed in zip(counts, speeds, strict=True))


def test_by_exact_values():
    assert dealt(64, [2, 2, 2, 1]) == [19, 18, 18, 9]
    assert dealt(64, [1, 1, 1, 1]) == [16, 16, 16, 16]
    assert dealt(6, [1, 1, 1, 1]) == [2, 2, 1, 1]
    assert dealt(12, [1, 1e-9]) == [11, 1]
    assert dealt(2, [1e-9, 1e9]) == [1, 1]
    assert dealt(1_000_000, [3, 1]) == [750_000, 250_000]


@given(speeds_of, st.integers(0, 300))
def test_every_row_is_dealt_and_everybody_has_one(speeds: list[float], more: int):
    counts = dealt(len(speeds) + more, speeds)
    assert sum(counts) == len(speeds) + more
    assert min(counts) >= 1


@given(speeds_of, st.integers(0, 300))
def test_who_is_faster_has_no_fewer(speeds: list[float], more: int):
    counts = dealt(len(speeds) + more, speeds)
    in_order = [count for _, count in sorted(zip(speeds, counts, strict=True))]
    assert in_order == sorted(in_order)


@given(speeds_of, st.integers(0, 300))
def test_of_more_rows_nobody_has_fewer(speeds: list[float], more: int):
    """So a batch that grows within a run never has a larger share on its way than at its full size."""
    few, many = dealt(len(speeds) + more, speeds), dealt(len(speeds) + more + 1, speeds)
    assert all(one <= other for one, other in zip(few, many, strict=True))


@given(speeds_of, st.integers(0, 300), st.integers(-8, 8))
def test_the_unit_of_speed_does_not_matter(speeds: list[float], more: int, power: int):
    rows = len(speeds) + more
    assert dealt(rows, [speed * 2.0**power for speed in speeds]) == dealt(rows, speeds)


@given(st.integers(1, 9), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_ranks_that_are_alike_have_equal_parts(ranks: int, rows: int, speed: float):
    assert dealt(ranks * rows, [speed] * ranks) == [rows] * ranks


@settings(max_examples=60)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.integers(0, 6))
def test_no_other_deal_ends_sooner(speeds: list[float], more: int):
    rows = len(speeds) + more
    every = [counts for counts in product(range(1, rows + 1), repeat=len(speeds)) if sum(counts) == rows]
    assert longest(dealt(rows, speeds), speeds) <= min(longest(list(counts), speeds) for counts in every) * (1 + 1e-9)


def test_the_shares_of_a_batch_that_grows():
    """Each size is dealt by the same speeds, and the ranks' parts follow one another."""
    ramp, speeds = Ramp(4, 4, 48, 12), (2.0, 1.0)
    feeds = [Feed(8, 1, 12, 3, rank, 2, ramp=ramp, speeds=speeds) for rank in range(2)]
    for row, (first, second) in {0: (3, 1), 24: (6, 2), 48: (8, 4)}.items():
        shares = [feed.run_at(row, 1)[1] for feed in feeds]
        assert [(share.first, share.count) for share in shares] == [(0, first), (first, second)]
        assert [share.microbatch for share in shares] == [min(3, first), min(3, second)]
