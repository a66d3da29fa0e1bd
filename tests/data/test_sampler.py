"""Which rows make step k: exact values, bijections, and the same rows in the same order for every rank count."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.data import sampler as sampler_module
from hvdtrain.data.sampler import (
    Share,
    WindowSampler,
    concat_ranges,
    derive,
    derive_each,
    even_parts,
    mix,
    permute,
    permute_each,
    share_of,
)
from hvdtrain.errors import ConfigError, DataError

KEYS = st.integers(0, (1 << 63) - 1)


# --- the order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 1, derive(1337, 5)])
def test_permute_is_a_bijection_of_every_small_size(key: int):
    for size in range(1, 301):
        assert sorted(permute(np.arange(size), size, key)) == list(range(size)), size


@settings(max_examples=40)
@given(st.integers(1, 20_000), KEYS)
def test_permute_is_a_bijection(size: int, key: int):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(st.integers(1, 1 << 45), KEYS, st.data())
def test_permute_of_sizes_too_large_to_list(size: int, key: int, data: st.DataObject):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=50)))
    out = permute(indices, size, key)
    assert out.dtype == np.int64
    assert len(set(out.tolist())) == len(indices)
    assert 0 <= out.min() <= out.max() < size


@settings(max_examples=40)
@given(st.integers(1, 5000), KEYS, st.integers(2, 5))
def test_permute_does_not_look_at_the_neighbours(size: int, key: int, parts: int):
    """Any piece may be asked for by itself: that is how a rank finds its rows, and how a run resumes."""
    whole = permute(np.arange(size), size, key)
    pieces = [permute(np.arange(first, first + n), size, key) for first, n in even_parts(size, parts)]
    assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("size", [1000, 4096, 4097, 30_000])
@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_the_order_is_a_good_shuffle(size: int, seed: int):
    """Each figure within about four standard deviations of a uniformly random permutation's."""
    order, indices = permute(np.arange(size), size, derive(seed, 0, 0)), np.arange(size)
    displacement = np.abs(order - indices)
    assert displacement.mean() == pytest.approx(size / 3, abs=4 * 0.236 * size / size**0.5)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / size**0.5  # a row says nothing of the next
    assert abs(np.corrcoef(order, indices)[0, 1]) < 4 / size**0.5
    assert (np.diff(order) == 1).sum() <= 8  # neighbours that stayed neighbours: 1 expected
    assert (displacement == 0).sum() <= 8  # rows that stayed: 1 expected
    tenths, _, _ = np.histogram2d(indices, order, bins=10)
    expected = size / 100
    assert ((tenths - expected) ** 2 / expected).sum() < 81 + 5 * (2 * 81) ** 0.5  # chi squared, 81 degrees


SIZES = [1000, 4096, 4097, 30_000, 1 << 16, 100_003, 10**6 + 3, 1 << 24, 10**9 + 7, 10**12]


@pytest.mark.parametrize("size", SIZES)
def test_neighbours_are_spread_evenly(size: int):
    """Where 6,400 neighbours go, and how far apart two of them: chi squared over 64 cells of the range.

    Five standard deviations above what a uniformly random permutation has, 63 on average: 63 + 5 * (2 * 63)**0.5.
    The measured maximum is 93.
    """
    bound = 63 + 5 * (2 * 63) ** 0.5
    edges = [-(-size * cell // 64) for cell in range(65)]
    share = np.diff(edges) / size
    for key in range(8):
        for first in (0, size // 3):
            numbers = np.arange(first, first + min(6400, size - first))
            order = permute(numbers, size, derive(key, 3, 0))
            for places in (order, np.diff(order) % size):
                expected = len(places) * share
                cells, _ = np.histogram(places, bins=edges)
                assert ((cells - expected) ** 2 / expected).sum() < bound, (key, first)


def test_a_bad_shuffle_is_seen_as_one():
    """The bound above can fail: a rotation keeps neighbours together, a stride keeps them equally far apart."""
    numbers = np.arange(6400)
    for order in ((numbers + 777) % 100_003, numbers * 31_337 % 100_003):
        cells, _ = np.histogram(np.diff(order) % 100_003, bins=64, range=(0, 100_003))
        assert ((cells - 100) ** 2 / 100).sum() > 10_000


def test_other_seeds_and_epochs_give_other_orders():
    orders = [permute(np.arange(1000), 1000, derive(seed, epoch, 0)) for seed in range(4) for epoch in range(4)]
    for number, order in enumerate(orders):
        assert all((order == other).sum() <= 10 for other in orders[:number])


def test_derived_seeds_are_distinct():
    seeds = [derive(a, b, c) for a in range(20) for b in range(20) for c in range(5)]
    seeds += [derive(a, b) for a in range(20) for b in range(20)] + [derive(a) for a in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derive(-1) == derive((1 << 64) - 1)


@given(st.lists(st.tuples(st.integers(1, 1 << 45), st.integers(0, (1 << 63) - 1)), min_size=1, max_size=20), st.data())
def test_many_keys_at_once_are_the_same_as_one_by_one(of_each: list[tuple[int, int]], data: st.DataObject):
    sizes, keys = (np.array(column) for column in zip(*of_each, strict=True))
    indices = np.array([data.draw(st.integers(0, size - 1)) for size, _ in of_each])
    expected = [permute(index[None], size, key)[0] for index, (size, key) in zip(indices, of_each, strict=True)]
    assert permute_each(indices, sizes, keys).tolist() == expected
    size, key = int(sizes.max()), int(keys[0])
    assert np.array_equal(permute_each(indices, size, key), permute(indices, size, key))


@given(st.integers(-5, 1 << 63), st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=9), st.integers(0, 9))
def test_many_derived_seeds_at_once_are_the_same_as_one_by_one(seed: int, parts: list[int], last: int):
    derived = derive_each(seed, np.array(parts, np.int64), last)
    assert derived.dtype == np.uint64
    assert derived.tolist() == [derive(seed, part, last) for part in parts]


def test_mix_moves_half_of_the_bits():
    values = np.arange(200, dtype=np.uint64)
    for bit in range(64):
        changed = mix(values, 0) ^ mix(values ^ np.uint64(1 << bit), 0)
        assert np.bitwise_count(changed).mean() == pytest.approx(32, abs=2), bit


def test_the_order_never_changes_between_versions():
    """Written down once. A change makes every saved run resume on other rows: raise checkpoint's FORMAT_VERSION."""
    sampler = WindowSampler(1000, 10, seed=1)
    assert sampler.rows_per_epoch == 99
    assert sampler.starts(0, 6).tolist() == [59, 309, 629, 129, 979, 689]
    assert sampler.starts(98, 4).tolist() == [859, 716, 526, 746]
    assert mix(np.array([0, 1]), 2).tolist() == [3047811371739217279, 6939979669235187218]
    assert WindowSampler(10**10, 1024, 1).starts(10**10, 3).tolist() == [8805183611, 3000315003, 4566796411]
    assert derive(1, 2, 3) == 2494043823753745243
    assert permute(np.arange(5), 1000, derive(1, 2)).tolist() == [219, 686, 535, 436, 998]
    assert permute(np.arange(3), 1 << 31, derive(1, 2)).tolist() == [1467005953, 631360346, 773404289]
    assert permute(np.arange(3), 10**12, derive(1, 2)).tolist() == [637245422202, 21742389972, 487358901870]


# --- windows -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 500), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_is_every_window_once(context: int, more: int, seed: int, epoch: int):
    tokens = context + 1 + more
    sampler = WindowSampler(tokens, context, seed)
    rows = sampler.rows_per_epoch
    starts = np.sort(sampler.starts(epoch * rows, rows))
    assert (np.diff(starts) == context).all()  # they tile: what one window ends with is the next one's first input
    assert starts[0] >= 0
    assert starts[-1] + context + 1 <= tokens
    left_out = tokens - 1 - rows * context  # targets before the first cut and after the last
    assert 0 <= left_out < 2 * context


def test_epochs_cut_at_other_places():
    sampler = WindowSampler(10_000, 64, seed=3)
    shifts = {int(sampler.starts(epoch * sampler.rows_per_epoch, 1)[0]) % 64 for epoch in range(40)}
    assert len(shifts) > 20


def test_epochs_draw_the_windows_in_other_orders():
    sampler = WindowSampler(10_000, 64, seed=3)
    rows = sampler.rows_per_epoch
    orders = [sampler.starts(epoch * rows, rows) // 64 for epoch in range(4)]
    for number, order in enumerate(orders):
        assert all((order == other).mean() < 0.1 for other in orders[:number])


@settings(max_examples=25)
@given(st.integers(1, 30), st.integers(0, 200), st.lists(st.integers(0, 120), max_size=8))
def test_rows_do_not_depend_on_how_they_are_asked_for(context: int, more: int, cuts: list[int]):
    sampler = WindowSampler(context + 1 + more, context, seed=7)
    edges = [0, *sorted(cuts), 120]  # many epochs of a short text
    pieces = [sampler.starts(a, b - a) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(pieces), sampler.starts(0, 120))


def test_far_rows_are_reached_at_once():
    sampler = WindowSampler(10**12, 1024, seed=1)
    starts = sampler.starts(10**15, 8)
    assert 0 <= starts.min() <= starts.max() < 10**12 - 1024


@pytest.mark.parametrize("tokens", [10**6, 10**10, 10**12, 10**14])
def test_resume_at_step_10_million_is_arithmetic(tokens: int):
    """No replay: a global batch of 512 rows there within 50 ms, its epoch's tables included (about 2 ms measured)."""
    first, seconds, starts = 10_000_000 * 512, [], []
    for _ in range(5):
        sampler_module._round_tables.cache_clear()
        began = time.perf_counter()
        starts.append(WindowSampler(tokens, 1024, seed=1).starts(first, 512))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.05
    before_and_after = WindowSampler(tokens, 1024, seed=1).starts(first - 700, 2000)
    assert np.array_equal(starts[0], before_and_after[700:1212])


def test_a_text_shorter_than_a_window_is_refused():
    assert WindowSampler(11, 10, 0).starts(0, 3).tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"has 10 tokens.*model.context=10 needs 11"):
        WindowSampler(10, 10, 0)


# --- sharing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_all_ranks_together_read_the_global_batch_in_order(microbatches: int):
    """The promise: one rank or 64, accumulating or not, the same rows in the same order."""
    sampler = WindowSampler(5000, 16, seed=11)
    for size in range(1, 65):
        count = 6
        global_batch = size * count
        step = 5 + size
        rows = []
        for rank in range(size):
            share = share_of(global_batch, count // microbatches, rank, size)
            assert (share.count, share.microbatch) == (count, count // microbatches)
            rows += [step * global_batch + share.first + row for row in range(count)]
        assert rows == list(range(step * global_batch, (step + 1) * global_batch)), size
        if size in (1, 2, 3, 4, 64):
            starts = [sampler.starts(row, count // microbatches) for row in rows[:: count // microbatches]]
            assert np.array_equal(np.concatenate(starts), sampler.starts(step * global_batch, global_batch)), size


@settings(max_examples=60)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 3), st.integers(0, 10**7), st.integers(60, 5000))
def test_a_step_is_the_same_for_every_rank_count_and_accumulation(
    size: int, accumulation: int, microbatch: int, step: int, tokens: int
):
    sampler = WindowSampler(tokens, 16, seed=11)
    global_batch = size * accumulation * microbatch
    whole = sampler.starts(step * global_batch, global_batch)
    shares = [share_of(global_batch, microbatch, rank, size) for rank in range(size)]
    parts = [
        sampler.starts(step * global_batch + share.first + cut, share.microbatch)
        for share in shares
        for cut in range(0, share.count, share.microbatch)
    ]
    assert len(parts) == size * accumulation
    assert np.array_equal(np.concatenate(parts), whole)


@settings(max_examples=60)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(60, 3000), st.integers(0, 3))
def test_steps_cover_each_window_of_an_epoch_once(size: int, accumulation: int, tokens: int, epoch: int):
    """Also where an epoch ends within a step: its first rows are of this epoch, its last ones of the next."""
    sampler = WindowSampler(tokens, 16, seed=3)
    rows, global_batch = sampler.rows_per_epoch, size * accumulation
    first_step, last_step = epoch * rows // global_batch, ((epoch + 1) * rows - 1) // global_batch
    steps = [sampler.starts(step * global_batch, global_batch) for step in range(first_step, last_step + 1)]
    before = epoch * rows - first_step * global_batch
    starts = np.sort(np.concatenate(steps)[before : before + rows])
    assert np.array_equal(starts, starts[0] + 16 * np.arange(rows))


@given(st.integers(1, 600), st.integers(1, 64), st.integers(0, 40))
def test_a_share_is_even_or_refused(global_batch: int, size: int, microbatch: int):
    try:
        shares = [share_of(global_batch, microbatch, rank, size) for rank in range(size)]
    except ConfigError:
        count = global_batch // size
        assert global_batch % size or count % min(microbatch or count, count)
        return
    assert [share.first for share in shares] == [rank * global_batch // size for rank in range(size)]
    assert {share.count * size for share in shares} == {global_batch}
    assert all(share.microbatch >= 1 and share.count % share.microbatch == 0 for share in shares)


def test_microbatch_0_or_too_large_is_all_at_once():
    assert share_of(12, 0, 1, 2) == share_of(12, 100, 1, 2) == Share(first=6, count=6, microbatch=6)


@pytest.mark.parametrize(
    ("global_batch", "size", "advice"),
    [
        (12, 5, "set train.global_batch=10 or 15, or start 4 ranks"),
        (2, 5, "set train.global_batch=5, or start 2 ranks"),
        (7, 4, "set train.global_batch=4 or 8, or start 1 ranks"),
    ],
)
def test_an_uneven_batch_names_the_ways_out(global_batch: int, size: int, advice: str):
    with pytest.raises(ConfigError, match=f"train.global_batch={global_batch} .*{advice}"):
        share_of(global_batch, 0, 0, size)


def test_a_microbatch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"train.microbatch=4 does not divide the 6 sequences of each rank"):
        share_of(12, 4, 0, 2)


@given(st.integers(0, 1000), st.integers(1, 70))
def test_even_parts_tile(count: int, parts: int):
    pieces = even_parts(count, parts)
    assert [i for first, n in pieces for i in range(first, first + n)] == list(range(count))
    assert max(n for _, n in pieces) - min(n for _, n in pieces) <= 1


def test_ranges_in_one_line():
    owner, numbers = concat_ranges(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert numbers.tolist() == [5, 6, 9, 10, 11]
