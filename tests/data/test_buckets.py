"""Batches of like length: the budget holds, an epoch is each row once, and any batch is at hand for any rank count."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.data.buckets import BucketSampler, bucket_edges
from hvdtrain.data.sampler import even_parts
from hvdtrain.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=80)


# --- buckets -----------------------------------------------------------------------------------------------------


def test_edges():
    assert bucket_edges(24) == [8, 16, 24]
    assert bucket_edges(200)[7:] == [64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 176, 192, 200]
    assert [bucket_edges(n) for n in (1, 7, 8, 9)] == [[1], [7], [8], [8, 9]]
    assert len(bucket_edges(1024)) == 35


@given(st.integers(1, 100_000))
def test_edges_bound_the_padding(max_length: int):
    edges = bucket_edges(max_length)
    assert edges[-1] == max_length
    assert all(edge % 8 == 0 for edge in edges[:-1])
    for below, edge in zip([0, *edges], edges, strict=False):
        padding = edge - (below + 1)  # of the bucket's shortest row
        assert padding >= 0
        assert padding < 8 or padding < edge / 9


def test_the_picture():
    """48 tokens: batches of 6, 3 and 2 rows; buckets of 6, 6 and 5 rows make 1, 2 and 3 batches."""
    lengths = np.array([1, 8, 3, 2, 2, 2, 9, 16, 10, 10, 12, 11, 17, 24, 20, 20, 21])
    sampler = BucketSampler(lengths, 48, seed=1, max_length=24)
    batches = sampler.batches(0, 6)
    assert sampler.batches_per_epoch == 6
    assert sorted(len(batch) for batch in batches) == [1, 2, 2, 3, 3, 6]
    for batch in batches:
        assert len(set((lengths[batch] - 1) // 8)) == 1
    assert sampler.padding == 1 - lengths.sum() / (6 * 8 + 6 * 16 + 5 * 24)


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 300), st.integers(1, 70), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_is_each_row_once_within_the_budget(
    lengths: list[int], batch_tokens: int, max_length: int, epoch: int, seed: int
):
    kept = [row for row, length in enumerate(lengths) if length <= max_length]
    if not kept:
        with pytest.raises(DataError):
            BucketSampler(np.array(lengths), batch_tokens, seed, max_length)
        return
    sampler = BucketSampler(np.array(lengths), batch_tokens, seed, max_length)
    batches = sampler.batches(epoch * sampler.batches_per_epoch, sampler.batches_per_epoch)
    assert sorted(np.concatenate(batches).tolist()) == kept
    assert (sampler.rows_per_epoch, sampler.dropped) == (len(kept), len(lengths) - len(kept))
    edges = bucket_edges(max_length)
    padded = 0
    for batch in batches:
        assert batch.dtype == np.int64
        buckets = {int(np.searchsorted(edges, lengths[row])) for row in batch}
        assert len(buckets) == 1
        width = edges[buckets.pop()]
        assert len(batch) == 1 or len(batch) * width <= batch_tokens
        padded += len(batch) * width
    assert sampler.padding == pytest.approx(1 - sum(lengths[row] for row in kept) / padded)
    assert 0 <= sampler.padding < 8 / 9


def test_pairs_count_as_their_longer_side():
    lengths = np.array([[3, 8], [30, 2], [2, 30], [31, 29], [5, 100], [100, 5]])
    sampler = BucketSampler(lengths, 96, seed=0, max_length=40)
    assert sampler.dropped == 2
    assert sorted(sorted(batch.tolist()) for batch in sampler.batches(0, 2)) == [[0], [1, 2, 3]]
    assert sampler.padding == 1 - (11 + 32 + 32 + 60) / (2 * 8 + 2 * 3 * 32)
    columns = BucketSampler(lengths.max(axis=1), 96, seed=0, max_length=40)
    assert all(np.array_equal(a, b) for a, b in zip(sampler.batches(5, 9), columns.batches(5, 9), strict=True))


def test_small_integers_and_empty_rows():
    lengths = np.array([0, 200, 255, 8, 9], np.uint8)
    sampler = BucketSampler(lengths, 1024, seed=0, max_length=1000)
    assert sampler.dropped == 0
    assert sorted(np.concatenate(sampler.batches(0, sampler.batches_per_epoch))) == [0, 1, 2, 3, 4]
    assert BucketSampler(lengths, 1024, seed=0, max_length=254).dropped == 1


# --- the order ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 300), st.integers(0, 10**7), st.integers(0, 40))
def test_batches_do_not_depend_on_how_they_are_asked_for(lengths: list[int], batch_tokens: int, first: int, count: int):
    sampler = BucketSampler(np.array(lengths), batch_tokens, seed=7, max_length=70)
    together = sampler.batches(first, count)
    assert len(together) == count
    for number, batch in enumerate(together):
        assert np.array_equal(batch, sampler.batch(first + number))


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 64), st.integers(1, 8), st.integers(0, 10**7))
def test_a_batch_is_the_same_for_every_rank_count_and_accumulation(
    lengths: list[int], size: int, accumulation: int, number: int
):
    sampler = BucketSampler(np.array(lengths), 600, seed=3, max_length=70)
    batch = sampler.batch(number)
    parts = []
    for first, count in even_parts(len(batch), size):
        mine = sampler.batch(number)[first : first + count]  # may be empty
        parts += [mine[a : a + n] for a, n in even_parts(count, accumulation)]
    assert len(parts) == size * accumulation
    assert np.array_equal(np.concatenate(parts), batch)


def test_epochs_and_seeds_draw_other_batches_in_another_order():
    lengths = np.random.default_rng(1).integers(1, 65, 4000)
    samplers = [BucketSampler(lengths, 512, seed, 64) for seed in (0, 1)]
    per_epoch = samplers[0].batches_per_epoch
    epochs = [sampler.batches(epoch * per_epoch, per_epoch) for sampler in samplers for epoch in range(2)]
    bucket_order = [[(lengths[batch[0]] - 1) // 8 for batch in epoch] for epoch in epochs]
    for number, (epoch, order) in enumerate(zip(epochs, bucket_order, strict=True)):
        assert order not in bucket_order[:number]
        widths = np.array([lengths[batch].max() for batch in epoch])
        assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 4 / per_epoch**0.5  # buckets are mixed
        for other in epochs[:number]:
            assert not {frozenset(batch.tolist()) for batch in epoch if len(batch) > 3} & {
                frozenset(batch.tolist()) for batch in other
            }


def test_the_batches_never_change_between_versions():
    """Written down once. A change makes every saved run resume on other rows: raise checkpoint's FORMAT_VERSION."""
    sampler = BucketSampler(np.arange(1, 30), 48, seed=1, max_length=24)
    assert [batch.tolist() for batch in sampler.batches(8, 4)] == [[9, 12, 13], [18, 23], [3, 7, 5, 4, 0, 1], [21, 20]]


def test_resume_at_batch_10_million_is_arithmetic():
    lengths = np.random.default_rng(0).integers(1, 200, 10**6)
    sampler = BucketSampler(lengths, 16_384, seed=1, max_length=256)
    assert sampler._order.nbytes == 4 * len(lengths)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        sampler.batch(10_000_000)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.05  # under 1 ms measured


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "rows"), [([], 0), ([9, 10], 2), ([[1, 9]], 1)])
def test_nothing_left_is_refused(lengths: list, rows: int):
    with pytest.raises(DataError, match=f"none of the {rows} rows has at most 8 tokens"):
        BucketSampler(np.array(lengths, np.int64), 100, seed=0, max_length=8)


def test_impossible_values_are_refused():
    with pytest.raises(DataError, match="row 1 has a length of -1"):
        BucketSampler(np.array([[3, 4], [5, -1]]), 100, seed=0, max_length=8)
    for batch_tokens, max_length in ((0, 8), (8, 0)):
        with pytest.raises(ConfigError, match=f"a batch of {batch_tokens} tokens, of rows of at most {max_length},"):
            BucketSampler(np.array([3]), batch_tokens, seed=0, max_length=max_length)
