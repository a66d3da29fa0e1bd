"""Microbatches on the way to the model: the right tokens, the proof of their order, every target of a split once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, random_tokens, stream_of, write_data

from hvdtrain.data.batch import IGNORE
from hvdtrain.data.loader import TrainLoader, eval_batches
from hvdtrain.data.sampler import WindowSampler, share_of
from hvdtrain.data.shards import TokenStream

GLOBAL_BATCH, CONTEXT = 12, 5


class Line:
    """Stands in for a TokenStream: one array."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = np.asarray(tokens, np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return np.stack([self.tokens[start : start + length] for start in starts])


def loader_of(stream, rank: int = 0, size: int = 1, microbatch: int = 0) -> TrainLoader:
    sampler = WindowSampler(len(stream), CONTEXT, seed=4)
    return TrainLoader(stream, sampler, share_of(GLOBAL_BATCH, microbatch, rank, size), GLOBAL_BATCH, CPU)


def train(stream, size: int, microbatch: int, steps: int = 5) -> tuple[list[list], int]:
    """Rows of each step over all ranks, and the sum of the ranks' fingerprints."""
    loaders = [loader_of(stream, rank, size, microbatch) for rank in range(size)]
    rows = [[row for r in loaders for batch in r.next_step() for row in batch.tokens.tolist()] for _ in range(steps)]
    return rows, sum(r.fingerprint for r in loaders) % (1 << 64)


def test_batches_are_slices_of_the_text(tmp_path: Path):
    tokens = random_tokens(200)
    stream = stream_of(tmp_path, tokens)
    loader = loader_of(stream, rank=1, size=2, microbatch=3)
    sampler = WindowSampler(200, CONTEXT, seed=4)
    for step in range(20):
        batches = loader.next_step()
        starts = sampler.starts(step * 12 + 6, 6)
        assert [batch.tokens.shape for batch in batches] == [(3, CONTEXT)] * 2
        assert torch.cat([b.tokens for b in batches]).tolist() == [tokens[s : s + 5].tolist() for s in starts]
        assert torch.cat([b.targets for b in batches]).tolist() == [tokens[s + 1 : s + 6].tolist() for s in starts]
        assert {(b.tokens.dtype, b.targets.dtype, b.target_tokens) for b in batches} == {(torch.int64, torch.int64, 15)}
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
        def starts(self, first: int, count: int) -> np.ndarray:
            starts = super().starts(first, count)
            starts[[2, 7]] = starts[[7, 2]]
            return starts

    prints = []
    for kind in (WindowSampler, Swapped):
        loader = TrainLoader(Line(tokens), kind(200, CONTEXT, 4), share_of(12, 0, 0, 1), 12, CPU)
        loader.next_step()
        prints.append(loader.fingerprint)
    assert prints[0] != prints[1]


def test_the_fingerprint_never_changes_between_versions():
    """Written down once: summaries of different versions may be compared."""
    assert f"{train(Line(np.arange(200)), 1, 0)[1]:016x}" == "6faa92db97a32638"


def test_to_go_on_is_to_know_how_many_rows_went_before():
    stream = Line(random_tokens(300))
    whole, part = loader_of(stream), loader_of(stream)
    for _ in range(7):
        whole.next_step()
    part.rows_consumed = whole.rows_consumed
    before = whole.fingerprint
    for _ in range(5):
        assert [b.tokens.tolist() for b in whole.next_step()] == [b.tokens.tolist() for b in part.next_step()]
    assert (before + part.fingerprint) % (1 << 64) == whole.fingerprint


# --- evaluation --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 5), st.integers(1, 7))
def test_every_target_is_scored_once(tokens: int, context: int, rows: int, size: int):
    """For any number of ranks, more than there are windows too; the last window is filled up with IGNORE."""
    stream = Line(np.arange(tokens))
    batches = [batch for rank in range(size) for batch in eval_batches(stream, context, rows, rank, size, CPU)]
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
    batches = list(eval_batches(Line(np.arange(10, 19)), 5, 4, 0, 1, CPU))
    assert [batch.tokens.tolist() for batch in batches] == [[[10, 11, 12, 13, 14]], [[15, 16, 17, 0, 0]]]
    assert [batch.targets.tolist() for batch in batches] == [[[11, 12, 13, 14, 15]], [[16, 17, 18, IGNORE, IGNORE]]]


def test_evaluation_crosses_shards(tmp_path: Path):
    stream = TokenStream(tmp_path, write_data(tmp_path, val=[range(7), range(7, 9), range(9, 23)]), "val")
    targets = torch.cat([batch.targets.flatten() for batch in eval_batches(stream, 4, 2, 0, 1, CPU)])
    assert targets[targets != IGNORE].tolist() == list(range(1, 23))
