"""Packing: the plan in the picture, no token lost or doubled, as tight as the textbook's loops, any row at once."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.data.packing import PackSampler, plan_rows
from hvdtrain.errors import ConfigError, DataError

DOCUMENTS = st.lists(st.integers(0, 60), min_size=1, max_size=60).filter(any)


def strategies(lengths: list[int], context: int) -> list[tuple[int, list[int]]]:
    """The plan written out: (copies, the lengths in a row)."""
    plan = plan_rows(np.bincount(lengths, minlength=context + 1), context)
    rows = [np.repeat(plan.lengths, np.where(plan.strategy == s, plan.repeats, 0)) for s in range(len(plan.copies))]
    return [(int(copies), row.tolist()) for copies, row in zip(plan.copies, rows, strict=True)]


def one_by_one(lengths: list[int], context: int, best: bool) -> list[int]:
    """Best fit (else first fit) decreasing as the textbook has it: the free positions of each row."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row, room in enumerate(free) if room >= length]
        if not fits:
            fits = [len(free)]
            free.append(context)
        free[min(fits, key=lambda row: free[row]) if best else fits[0]] -= length
    return sorted(free)


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_picture():
    assert strategies([5, 5, 5, 3, 3, 3, 2, 2], 8) == [(3, [5, 3]), (1, [2, 2])]


@pytest.mark.parametrize(
    ("lengths", "plan"),
    [
        ([8, 8], [(2, [8])]),
        ([1] * 20, [(2, [1] * 8), (1, [1] * 4)]),  # the last row is not full
        ([6, 6, 6, 2], [(1, [6, 2]), (2, [6])]),  # alike rows part where the pieces run out
        ([4, 4, 4, 1, 1, 1], [(1, [4, 4]), (1, [4, 1, 1, 1])]),
        ([6, 5, 1, 1], [(1, [6, 1, 1]), (1, [5])]),  # the second 1 goes where the first one made it tighter still
    ],
)
def test_small_plans(lengths: list[int], plan: list):
    assert strategies(lengths, 8) == plan


@settings(max_examples=300)
@given(st.integers(1, 40), st.data())
def test_the_plan_is_best_fit_decreasing_row_for_row(context: int, data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(1, context), min_size=1, max_size=80))
    plan = strategies(lengths, context)
    free = sorted(context - sum(row) for copies, row in plan for _ in range(copies))
    assert free == one_by_one(lengths, context, best=True)
    assert sorted(n for copies, row in plan for _ in range(copies) for n in row) == sorted(lengths)
    assert len(plan) <= 2 * len(set(lengths))  # whatever the number of pieces
    # Neither of best fit and first fit is never worse; of a few rows, one may be more than 2 %.
    first_fit = len(one_by_one(lengths, context, best=False))
    assert len(free) <= max(first_fit + 1, 1.02 * first_fit)


@pytest.mark.parametrize("median", [10, 40, 100])
def test_no_more_rows_than_first_fit_decreasing(median: int):
    rng = np.random.default_rng(5)
    lengths = np.clip(rng.lognormal(np.log(median), 1, 2000), 1, 128).astype(int).tolist()
    rows = sum(copies for copies, _ in strategies(lengths, 128))
    assert rows <= len(one_by_one(lengths, 128, best=False))


def test_the_plan_does_not_grow_with_the_pieces():
    """A million times as many pieces: alike rows by the million, and hardly more kinds of them."""
    counts = np.bincount(np.random.default_rng(1).integers(1, 65, 300), minlength=65)
    few, many = plan_rows(counts, 64), plan_rows(counts * 10**6, 64)
    assert len(many.copies) <= 2 * 64
    assert many.copies.sum() <= few.copies.sum() * 10**6
    assert (many.copies[many.strategy] * many.repeats).sum() == counts.sum() * 10**6


# --- the rows ----------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(DOCUMENTS, st.integers(1, 25), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_is_every_token_once(lengths: list[int], context: int, seed: int, epoch: int):
    sampler = PackSampler(np.array(lengths), context, seed)
    row, start, length = sampler.rows(epoch * sampler.rows_per_epoch, sampler.rows_per_epoch)
    assert len(row) == sampler.pieces
    tokens = [t for s, n in zip(start.tolist(), length.tolist(), strict=True) for t in range(s, s + n)]
    assert sorted(tokens) == list(range(sum(lengths)))

    assert np.array_equal(np.unique(row), np.arange(sampler.rows_per_epoch))  # no row is empty
    assert (np.diff(row) >= 0).all()
    assert np.bincount(row, length).max() <= context
    assert sampler.efficiency == sum(lengths) / (sampler.rows_per_epoch * context)

    ends = np.cumsum(lengths)
    document = np.searchsorted(ends, start, side="right")
    assert (start + length <= ends[document]).all()  # a piece is of one document
    offset = start - (ends - lengths)[document]
    assert (offset % context == 0).all()  # cut into full rows and a rest, nowhere else
    assert ((length == context) | (start + length == ends[document])).all()


@settings(max_examples=60)
@given(DOCUMENTS, st.integers(1, 70), st.lists(st.integers(0, 60), max_size=6))
def test_rows_do_not_depend_on_how_they_are_asked_for(lengths: list[int], context: int, cuts: list[int]):
    sampler = PackSampler(np.array(lengths), context, seed=7)
    edges = [0, *sorted(cuts), 60]  # often many epochs
    parts = [(a, sampler.rows(a, b - a)) for a, b in pairwise(edges)]
    whole = sampler.rows(0, 60)
    assert np.array_equal(np.concatenate([a + part.row for a, part in parts]), whole.row)
    assert np.array_equal(np.concatenate([part.start for _, part in parts]), whole.start)
    assert np.array_equal(np.concatenate([part.length for _, part in parts]), whole.length)
    again = PackSampler(np.array(lengths, np.uint8), context, seed=7).rows(60, 3)  # small integers hold no sum
    assert all(np.array_equal(a, b) for a, b in zip(again, sampler.rows(60, 3), strict=True))


def test_an_epoch_puts_other_documents_together_in_another_order():
    lengths = np.random.default_rng(2).integers(1, 100, 3000)
    sampler = PackSampler(lengths, 128, seed=1)
    rows, together = sampler.rows_per_epoch, []
    for epoch in range(3):
        row, start, _ = sampler.rows(epoch * rows, rows)
        together.append({(a, b) for a, b, same in zip(start[:-1], start[1:], np.diff(row) == 0, strict=True) if same})
    assert len(together[0]) > 1000
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(together[a] & together[b]) < 0.1 * len(together[a])  # a rare length has few pieces to choose from
    fullness = [np.bincount(*sampler.rows(epoch * rows, rows)[::2], rows) for epoch in range(2)]
    assert not np.array_equal(*fullness)
    assert np.array_equal(*np.sort(fullness))  # the same plan each epoch
    other = PackSampler(lengths, 128, seed=2).rows(0, rows)
    assert not np.array_equal(other.start, sampler.rows(0, rows).start)


def test_the_rows_never_change_between_versions():
    """Written down once. A change makes every saved run resume on other rows: raise checkpoint's FORMAT_VERSION."""
    sampler = PackSampler(np.array([3, 20, 0, 5, 2, 8, 1, 6]), 8, seed=1)
    row, start, length = sampler.rows(4, 5)
    assert (sampler.rows_per_epoch, sampler.pieces) == (6, 9)
    assert row.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4]
    assert start.tolist() == [23, 0, 39, 28, 23, 0, 3, 19, 38]
    assert length.tolist() == [5, 3, 6, 2, 5, 3, 8, 4, 1]


def test_a_large_corpus_is_packed_tightly_and_any_row_is_at_hand():
    """A million documents as text has them. Bounds of time are ten times what was measured, and more."""
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1, 10**6).astype(np.int64)
    sampler = PackSampler(lengths, 1024, seed=1)
    assert sampler.efficiency >= 0.99
    assert sampler._starts.nbytes == 8 * sampler.pieces
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        sampler.rows(10_000_000 * 512, 512)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.05


# --- refusals ----------------------------------------------------------------------------------------------------


def test_text_without_a_token_is_refused():
    for lengths in ([], [0, 0]):
        with pytest.raises(DataError, match=f"the {len(lengths)} documents to pack have no token"):
            PackSampler(np.array(lengths), 8, seed=0)


def test_impossible_lengths_are_refused():
    with pytest.raises(DataError, match="document 1 has -2 tokens"):
        PackSampler(np.array([3, -2]), 8, seed=0)
    with pytest.raises(ConfigError, match=r"model\.context=0"):
        PackSampler(np.array([3]), 0, seed=0)
