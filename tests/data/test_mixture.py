"""Mixing corpora: exact counts in every block, no row left out, and row 10**12 as near as row 0."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.data.mixture import BLOCK, Mixture, quotas
from hvdtrain.errors import ConfigError

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "block", "rows"),
    [
        ([2, 1, 1], 8, [4, 2, 2]),
        ([1, 1, 1], 8, [3, 3, 2]),  # equal remainders: the first ones
        ([5, 3, 2], 4, [2, 1, 1]),  # 2.0, 1.2, 0.8
        ([1000, 1, 1], 8, [6, 1, 1]),  # at least one
        ([6.5, 1.5, 1e-9], 9, [7, 1, 1]),  # one for the smallest; of the 8 left, 6.5 and 1.5
        ([1e308, 1e308, 5e-324], 5, [2, 2, 1]),  # the sum is above what a float holds
        ([3.0], 8, [8]),
        ([1] * 8, 8, [1] * 8),
    ],
)
def test_quotas(weights: list[float], block: int, rows: list[int]):
    assert quotas(weights, block) == rows


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=50))
def test_quotas_are_whole_and_in_proportion(weights: list[float]):
    rows = quotas(weights, BLOCK)
    assert sum(rows) == BLOCK
    assert min(rows) >= 1
    order = np.argsort(weights, kind="stable")
    assert all(rows[a] <= rows[b] for a, b in pairwise(order) if weights[a] < weights[b])
    share = np.array(weights) / max(weights)
    exact = BLOCK * share / share.sum()
    if exact.min() >= 1:
        assert np.abs(rows - exact).max() < 1 + 1e-6


def test_shares_are_those_realised():
    mixture = Mixture([0.7, 0.2, 0.1], seed=3)
    assert mixture.share == (2867 / 4096, 819 / 4096, 410 / 4096)
    assert sum(mixture.share) == 1
    assert sum(Mixture([1.0] * BLOCK, seed=0).share) == 1


# --- rows --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(WEIGHTS, st.integers(0, 5), st.integers(0, 10**9))
def test_every_block_is_exact(weights: list[float], seed: int, block: int):
    mixture = Mixture(weights, seed)
    corpus, row = mixture.place(block * BLOCK, BLOCK)
    counts = np.bincount(corpus, minlength=len(weights))
    assert tuple(counts / BLOCK) == mixture.share
    for number, count in enumerate(counts.tolist()):  # in order, and where the block before ended
        assert np.array_equal(row[corpus == number], np.arange(block * count, (block + 1) * count))


@settings(max_examples=40)
@given(WEIGHTS, st.integers(1, 3 * BLOCK))
def test_no_row_of_a_corpus_is_left_out(weights: list[float], count: int):
    corpus, row = Mixture(weights, seed=1).place(0, count)
    assert corpus.dtype == row.dtype == np.int64
    for number in range(len(weights)):
        mine = row[corpus == number]
        assert np.array_equal(mine, np.arange(len(mine)))


@settings(max_examples=40)
@given(WEIGHTS, st.integers(0, 10**12), st.lists(st.integers(0, 10_000), max_size=6))
def test_rows_do_not_depend_on_how_they_are_asked_for(weights: list[float], first: int, cuts: list[int]):
    mixture = Mixture(weights, seed=7)
    edges = [0, *sorted(cuts), 10_000]
    parts = [mixture.place(first + a, b - a) for a, b in pairwise(edges)]
    corpus, row = mixture.place(first, 10_000)
    assert np.array_equal(np.concatenate([part[0] for part in parts]), corpus)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), row)


def test_blocks_and_seeds_draw_other_orders_that_mix_well():
    mixtures = [Mixture([1, 1], seed) for seed in range(2)]
    orders = [mixture.place(block * BLOCK, BLOCK)[0] for mixture in mixtures for block in range(3)]
    for number, order in enumerate(orders):
        assert (order[1:] == order[:-1]).mean() == pytest.approx(0.5, abs=4 * 0.5 / BLOCK**0.5)  # 4 deviations
        for other in orders[:number]:
            assert (order == other).mean() == pytest.approx(0.5, abs=4 * 0.5 / BLOCK**0.5)


def test_the_order_never_changes_between_versions():
    """Written down once. A change makes every saved run resume on other rows: raise checkpoint's FORMAT_VERSION."""
    corpus, row = Mixture([2, 1, 1], seed=1).place(10**6, 8)
    assert corpus.tolist() == [2, 2, 2, 0, 0, 0, 1, 2]
    assert row.tolist() == [249983, 249984, 249985, 500008, 500009, 500010, 250009, 249986]


def test_row_10_to_the_12_is_as_near_as_row_0():
    mixture = Mixture([0.7, 0.2, 0.1], seed=1)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        corpus, row = mixture.place(10**12, 512)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.05  # about 0.1 ms measured
    assert np.abs(row - 10**12 * np.array(mixture.share)[corpus]).max() < BLOCK


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float):
    with pytest.raises(ConfigError, match=f"corpus 1 of the mixture has the weight {weight}"):
        Mixture([1.0, weight], seed=0)


@pytest.mark.parametrize("corpora", [0, 4097])
def test_too_few_or_too_many_corpora_are_refused(corpora: int):
    with pytest.raises(ConfigError, match=f"a mixture of {corpora} corpora; give a weight to each of 1 to 4096"):
        Mixture([1.0] * corpora, seed=0)
