"""Microbatches on the way to the model: the right tokens, the proof of their order, every target of a split once.

And the thread that makes them: ahead of the loop, but never into what the loop still reads, and gone when it is.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import until
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, random_tokens, stream_of, write_data

from hvdtrain.data.batch import IGNORE
from hvdtrain.data.loader import BUFFERS, Feed, Step, TrainLoader
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import WindowSource, eval_windows
from hvdtrain.errors import DataError

GLOBAL_BATCH, CONTEXT = 12, 5
WAIT_S = 10  # for a thread that is about to end


class Line:
    """Stands in for a TokenStream: one array."""

    dtype = np.dtype(np.uint16)

    def __init__(self, tokens: np.ndarray):
        self.tokens = np.asarray(tokens, np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.tokens[starts[:, None] + np.arange(length)]

    def slice(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "hvdtrain-loader":
            thread.join(WAIT_S)
            assert not thread.is_alive()


def source_of(
    stream, rank: int = 0, size: int = 1, microbatch: int = 0, steps_per_block: int = 2, sampler=None
) -> WindowSource:
    sampler = sampler or WindowSampler(len(stream), CONTEXT, seed=4)
    source = WindowSource(stream, sampler, Feed(CONTEXT, 4, GLOBAL_BATCH, microbatch, rank, size))
    source.steps_per_block = steps_per_block
    return source


def loader_of(*args, **options) -> TrainLoader:
    return TrainLoader(source_of(*args, **options), CPU)


def train(stream, size: int, microbatch: int, steps: int = 5) -> tuple[list[list], int]:
    """Rows of each step over all ranks, and the sum of the ranks' fingerprints."""
    loaders = [loader_of(stream, rank, size, microbatch) for rank in range(size)]
    rows = [[row for r in loaders for batch in r.next_step() for row in batch.tokens.tolist()] for _ in range(steps)]
    for loader in loaders:
        loader.close()
    return rows, sum(r.fingerprint for r in loaders) % (1 << 64)


def rows_of(batches) -> tuple[list, list]:
    return torch.cat([b.tokens for b in batches]).tolist(), torch.cat([b.targets for b in batches]).tolist()


# --- the right tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_per_block", [None, 1, 4])
def test_batches_are_slices_of_the_text(tmp_path: Path, steps_per_block: int | None):
    tokens = random_tokens(200)
    sampler = WindowSampler(200, CONTEXT, seed=4)
    source = WindowSource(stream_of(tmp_path, tokens), sampler, Feed(CONTEXT, 4, GLOBAL_BATCH, 3, rank=1, size=2))
    source.steps_per_block = steps_per_block or source.steps_per_block
    with closing(TrainLoader(source, CPU)) as loader:
        for step in range(20):
            batches = loader.next_step()
            starts = sampler.starts(step * 12 + 6, 6)
            assert [batch.tokens.shape for batch in batches] == [(3, CONTEXT)] * 2
            assert torch.cat([b.tokens for b in batches]).tolist() == [tokens[s : s + 5].tolist() for s in starts]
            assert torch.cat([b.targets for b in batches]).tolist() == [tokens[s + 1 : s + 6].tolist() for s in starts]
            kinds = {(b.tokens.dtype, b.targets.dtype, b.target_tokens) for b in batches}
            assert kinds == {(torch.int64, torch.int64, 15)}
        assert loader.rows_consumed == 240
        assert loader.epoch == 240 // sampler.rows_per_epoch == 6


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("microbatch", [0, 1])
def test_the_rank_count_never_changes_the_data(size: int, microbatch: int):
    stream = Line(random_tokens(200))
    assert train(stream, size, microbatch) == train(stream, 1, 0)


def test_accumulation_never_changes_the_data():
    stream = Line(random_tokens(200))
    assert len({train(stream, 2, microbatch)[1] for microbatch in (0, 1, 2, 3, 6)}) == 1


@settings(max_examples=40)
@given(st.integers(0, 199), st.integers(1, 49))
def test_the_fingerprint_sees_every_token(position: int, change: int):
    tokens = random_tokens(200)
    expected = train(Line(tokens), 2, 0)[1]  # 60 rows are more than an epoch of 39
    tokens[position] = (tokens[position] + change) % 50
    sampler = WindowSampler(200, CONTEXT, seed=4)
    starts = sampler.starts(0, 60)
    was_read = bool(((starts <= position) & (position <= starts + CONTEXT)).any())
    assert (train(Line(tokens), 2, 0)[1] != expected) == was_read


def test_the_fingerprint_sees_a_swap_of_two_rows():
    tokens = random_tokens(200)

    class Swapped(WindowSampler):
        def starts_of(self, numbers: np.ndarray) -> np.ndarray:
            starts = super().starts_of(numbers)
            starts[[2, 7]] = starts[[7, 2]]
            return starts

    prints = []
    for kind in (WindowSampler, Swapped):
        with closing(loader_of(Line(tokens), sampler=kind(200, CONTEXT, 4))) as loader:
            loader.next_step()
            prints.append(loader.fingerprint)
    assert prints[0] != prints[1]


def test_the_fingerprint_never_changes_between_versions():
    """Written down once: summaries of different versions may be compared."""
    assert f"{train(Line(np.arange(200)), 1, 0)[1]:016x}" == "6faa92db97a32638"


def test_to_go_on_is_to_know_how_many_rows_went_before():
    stream = Line(random_tokens(300))
    with closing(loader_of(stream)) as whole, closing(loader_of(stream)) as part:
        for _ in range(7):
            whole.next_step()
        part.rows_consumed = whole.rows_consumed
        before = whole.fingerprint
        for _ in range(5):
            assert [b.tokens.tolist() for b in whole.next_step()] == [b.tokens.tolist() for b in part.next_step()]
        assert (before + part.fingerprint) % (1 << 64) == whole.fingerprint


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4))
def test_a_run_begins_at_any_row(first_row: int, steps_per_block: int, rank: int, steps: int):
    """Not only after a step of this batch size, and whatever the blocks are cut into."""
    tokens = random_tokens(300)
    sampler = WindowSampler(300, CONTEXT, seed=4)
    with closing(loader_of(Line(tokens), rank, 4, steps_per_block=steps_per_block)) as loader:
        loader.rows_consumed = first_row
        for step in range(steps):
            starts = sampler.starts(first_row + step * GLOBAL_BATCH + rank * 3, 3)
            assert rows_of(loader.next_step())[0] == [tokens[s : s + CONTEXT].tolist() for s in starts]
        assert loader.epoch == loader.rows_consumed // sampler.rows_per_epoch


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_blocks_of_several_steps_are_the_same_steps(cut: int):
    """Also where a run is resumed within what was a block: the fingerprint after each step is the same."""
    stream, seen = Line(random_tokens(300)), []
    for steps_per_block in (1, 2, 3, 100):
        with closing(loader_of(stream, 1, 2, 3, steps_per_block)) as loader:
            loader.rows_consumed = cut * GLOBAL_BATCH
            seen.append([(*rows_of(loader.next_step()), loader.fingerprint) for _ in range(8)])
    assert seen[1:] == seen[:1] * 3


# --- the thread --------------------------------------------------------------------------------------------------


class Ring:
    """A source that writes each block into one of BUFFERS buffers, as page-locked memory is used, and counts."""

    rows_per_step, rows_per_epoch = 10, 100

    def __init__(self, steps_per_block: int = 1, pause_s: Callable[[], float] = lambda: 0.0, fails_at: int = -1):
        self.steps_per_block, self._pause_s, self._fails_at = steps_per_block, pause_s, fails_at
        self.buffers = [np.full(steps_per_block, -1) for _ in range(BUFFERS)]
        self.made = 0

    def block(self, first_row: int, steps: int, number: int) -> list[Step]:
        if number == self._fails_at:
            raise DataError(f"block {number} cannot be made")
        buffer = self.buffers[number % BUFFERS]
        for step in range(steps):  # half written for a while
            buffer[step] = first_row + step * self.rows_per_step
            time.sleep(self._pause_s())
        self.made += 1
        return [Step((buffer, step), 1, self.rows_per_step) for step in range(steps)]

    def batches(self, content: Any, device: torch.device) -> Any:
        return content


def test_the_cpu_gets_every_step_in_the_same_memory():
    """It stays in the cache; so whoever keeps a step must copy it."""
    with closing(loader_of(Line(random_tokens(300)), microbatch=4)) as loader:
        kept = [list(loader.next_step()) for _ in range(9)]  # all at once: no memory is free to be had again
    places = [[(batch.tokens.data_ptr(), batch.targets.data_ptr()) for batch in step] for step in kept]
    assert places[1:] == places[:1] * 8


@pytest.mark.parametrize("steps_per_block", [1, 3])
@pytest.mark.parametrize(("producer_s", "consumer_s"), [(0.0, 0.003), (0.002, 0.0), (0.002, 0.002)])
def test_a_step_is_whole_until_the_next_is_asked_for(steps_per_block: int, producer_s: float, consumer_s: float):
    """However fast one of the two is. The content is looked at last thing before the next step."""
    chance = random.Random(1)
    ring = Ring(steps_per_block, lambda: chance.random() * producer_s)
    with closing(TrainLoader(ring, CPU)) as loader:
        loader.rows_consumed = 30
        places = set()
        for step in range(40):
            buffer, at = loader.next_step()
            time.sleep(chance.random() * consumer_s)
            assert buffer[at] == 30 + 10 * step
            places.add(buffer.ctypes.data)
    assert len(places) == BUFFERS


def test_windows_are_right_for_a_slow_loop_too():
    tokens = random_tokens(300)
    sampler = WindowSampler(300, CONTEXT, seed=4)
    with closing(loader_of(Line(tokens), steps_per_block=1)) as loader:
        for step in range(20):
            batches = loader.next_step()
            time.sleep(0.002)
            starts = sampler.starts(step * GLOBAL_BATCH, GLOBAL_BATCH)
            assert rows_of(batches)[1] == [tokens[s + 1 : s + 1 + CONTEXT].tolist() for s in starts]


def test_the_first_block_is_one_step():
    """Of ten thousand shards, a block of a million tokens opens thousands: the first step took ten times as long."""
    asked = []

    class Recorded(Ring):
        def block(self, first_row: int, steps: int, number: int) -> list[Step]:
            asked.append((first_row, steps, number))
            return super().block(first_row, steps, number)

    with closing(TrainLoader(Recorded(steps_per_block=5), CPU)) as loader:
        for _ in range(1 + 2 + 4 + 5):
            loader.next_step()
    assert asked[:5] == [(0, 1, 0), (10, 2, 1), (30, 4, 2), (70, 5, 3), (120, 5, 4)]


def test_only_two_blocks_are_made_ahead():
    """One waits, one is filled: a loop that stands still does not fill the memory."""
    ring = Ring()
    with closing(TrainLoader(ring, CPU)) as loader:
        for taken in range(1, 6):
            loader.next_step()
            until(lambda: ring.made >= taken + 2, "two blocks ahead", WAIT_S)  # noqa: B023
            time.sleep(0.02)
            assert ring.made == taken + 2


def test_a_buffer_waits_for_the_device_that_fetches_from_it(monkeypatch: pytest.MonkeyPatch):
    """A GPU copies later than it is told to: before a buffer is filled again, all copies from it must be through."""
    ordered, arrived = [], []

    class Event:
        def record(self) -> None:
            self._before = list(ordered)

        def synchronize(self) -> None:
            arrived[:] = self._before

    class Fetched(Ring):
        def block(self, first_row: int, steps: int, number: int) -> list[Step]:
            assert set(range(number - BUFFERS + 1)) <= set(arrived)
            return [Step(number, 0, self.rows_per_step) for _ in super().block(first_row, steps, number)]

        def batches(self, content: int, device: torch.device) -> int:
            ordered.append(content)
            return content

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with closing(TrainLoader(Fetched(steps_per_block=2), torch.device("cuda"))) as loader:
        assert [loader.next_step() for _ in range(20)] == [(step + 1) // 2 for step in range(20)]
        assert len(loader._thread._copied) <= BUFFERS


def test_close_ends_the_thread():
    loader = TrainLoader(Ring(), CPU)
    loader.close()  # before the first step there is none
    loader.next_step()
    thread = loader._thread
    assert thread.is_alive()
    assert thread.daemon
    time.sleep(0.02)  # by now it waits for room
    began = time.perf_counter()
    loader.close()
    assert not thread.is_alive()
    assert time.perf_counter() - began < 1
    loader.close()


def test_close_while_a_block_is_being_made():
    loader = TrainLoader(Ring(pause_s=lambda: 0.02), CPU)
    loader.next_step()
    thread = loader._thread
    loader.close()
    assert not thread.is_alive()


def test_a_closed_loader_goes_on_where_it_was():
    """Not needed by the loop; but to lose or to double a row in silence would be worse than to refuse."""
    with closing(TrainLoader(Ring(steps_per_block=3), CPU)) as loader:
        for step in range(12):
            buffer, at = loader.next_step()
            assert buffer[at] == 10 * step
            if step in (1, 4, 5, 8):  # within a block and at its end
                loader.close()


@pytest.mark.parametrize("dealt_after", [0, 1, 3, 4, 8])
def test_new_shares_begin_with_the_very_next_step(dealt_after: int):
    """Within a block and at its end, with blocks read ahead for the old shares, whose thread is gone."""

    class Dealt(Ring):
        speeds = ()

        def block(self, first_row: int, steps: int, number: int) -> list[Step]:
            return [Step((step.content, self.speeds), 1, 10) for step in super().block(first_row, steps, number)]

        def deal(self, speeds: tuple[float, ...]) -> None:
            self.speeds = speeds

    with closing(TrainLoader(Dealt(steps_per_block=3), CPU)) as loader:
        threads = set()
        for step in range(12):
            if step == dealt_after:
                loader.deal((1.0, 2.0))
            (buffer, at), speeds = loader.next_step()
            assert buffer[at] == 10 * step
            assert speeds == ((1.0, 2.0) if step >= dealt_after else ())
            threads.add(loader._thread)
        assert loader.rows_of_step == 10
        assert [thread.is_alive() for thread in threads].count(True) == 1
    assert loader.fingerprint == 12


def test_the_thread_of_a_dropped_loader_ends_by_itself():
    loader = TrainLoader(Ring(), CPU)
    loader.next_step()
    thread = loader._thread
    del loader
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("steps_per_block", [1, 2])
def test_an_error_of_the_source_reaches_the_loop(steps_per_block: int):
    """At its own step, as itself, and again for who asks again: the first version waited for ever then."""
    loader = TrainLoader(Ring(steps_per_block, fails_at=3), CPU)
    steps = {1: 1 + 1 + 1, 2: 1 + 2 + 2}[steps_per_block]
    for _ in range(steps):
        loader.next_step()
    for _ in range(3):
        with pytest.raises(DataError, match="block 3 cannot be made"):
            loader.next_step()
    assert loader.rows_consumed == 10 * steps
    loader._thread.join(WAIT_S)
    assert not loader._thread.is_alive()
    loader.close()


# --- evaluation --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 5), st.integers(1, 7))
def test_every_target_is_scored_once(tokens: int, context: int, rows: int, size: int):
    """For any number of ranks, more than there are windows too; the last window is filled up with IGNORE."""
    stream = Line(np.arange(tokens))
    batches = [batch for rank in range(size) for batch in eval_windows(stream, context, rows, rank, size)]
    counted = [batch.targets != IGNORE for batch in batches]
    targets = torch.cat([batch.targets[mask] for batch, mask in zip(batches, counted, strict=True)])
    inputs = torch.cat([batch.tokens[mask] for batch, mask in zip(batches, counted, strict=True)])
    assert targets.tolist() == list(range(1, tokens))
    assert inputs.tolist() == list(range(tokens - 1))
    assert [batch.target_tokens for batch in batches] == [int(mask.sum()) for mask in counted]
    assert sum(batch.target_tokens for batch in batches) == len(stream) - 1
    assert all(batch.tokens.shape[0] <= rows and batch.tokens.shape[1] == context for batch in batches)
    assert sum(not mask.all() for mask in counted) == bool((tokens - 1) % context)


def test_the_last_window_is_padded():
    batches = list(eval_windows(Line(np.arange(10, 19)), 5, 4, 0, 1))
    assert [batch.tokens.tolist() for batch in batches] == [[[10, 11, 12, 13, 14]], [[15, 16, 17, 0, 0]]]
    assert [batch.targets.tolist() for batch in batches] == [[[11, 12, 13, 14, 15]], [[16, 17, 18, IGNORE, IGNORE]]]


def test_evaluation_crosses_shards(tmp_path: Path):
    manifest = write_data(tmp_path, val=[range(7), range(7, 9), range(9, 23)])
    stream = TokenStream([(tmp_path, manifest)], "val")
    targets = torch.cat([batch.targets.flatten() for batch in eval_windows(stream, 4, 2, 0, 1)])
    assert targets[targets != IGNORE].tolist() == list(range(1, 23))
