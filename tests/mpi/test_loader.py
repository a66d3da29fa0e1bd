"""N ranks together read what one process reads, and can prove it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, random_tokens, stream_of

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.data.loader import TrainLoader
from hvdtrain.data.sampler import WindowSampler, share_of
from hvdtrain.data.shards import TokenStream

GLOBAL_BATCH, CONTEXT = 12, 8


def _loader(stream: TokenStream, rank: int, size: int, microbatch: int = 0, seed: int = 1) -> TrainLoader:
    sampler = WindowSampler(len(stream), CONTEXT, seed)
    return TrainLoader(stream, sampler, share_of(GLOBAL_BATCH, microbatch, rank, size), GLOBAL_BATCH, CPU)


@pytest.mark.parametrize("microbatch", [0, 1, 3])
def test_rows_and_fingerprint_equal_one_process(group: HorovodGroup, folder: Path, microbatch: int):
    """Over 5 steps of 12 rows with 25 rows an epoch: the third step and the fifth cross into a new one."""
    stream = stream_of(folder / str(group.rank), random_tokens(CONTEXT * 26))
    alone, mine = _loader(stream, 0, 1), _loader(stream, group.rank, group.size, microbatch)
    for _ in range(5):
        rows = torch.cat([batch.tokens for batch in mine.next_step()])
        everyone = np.concatenate(group.all_gather_object(rows.numpy()))
        assert np.array_equal(everyone, torch.cat([batch.tokens for batch in alone.next_step()]).numpy())
        total = sum(group.all_gather_object(mine.fingerprint)) % (1 << 64)
        assert total == alone.fingerprint
    assert (mine.rows_consumed, mine.epoch) == (alone.rows_consumed, alone.epoch) == (60, 2)


def test_the_fingerprint_sees_another_seed_and_another_rank_order(group: HorovodGroup, folder: Path):
    stream = stream_of(folder / str(group.rank), random_tokens(CONTEXT * 26))
    alone = _loader(stream, 0, 1)
    alone.next_step()
    other_seed = _loader(stream, group.rank, group.size, seed=2)
    other_seed.next_step()
    assert sum(group.all_gather_object(other_seed.fingerprint)) % (1 << 64) != alone.fingerprint
    # The right rows, but each rank says those of its neighbour: only the turns differ.
    share = share_of(GLOBAL_BATCH, 0, group.rank, group.size)
    wrong = share_of(GLOBAL_BATCH, 0, (group.rank + 1) % group.size, group.size)
    loader = _loader(stream, group.rank, group.size)
    starts = WindowSampler(len(stream), CONTEXT, 1).starts(wrong.first, wrong.count)
    loader._add_fingerprint(stream.windows(starts, CONTEXT + 1), share.first)
    swapped = sum(group.all_gather_object(loader.fingerprint)) % (1 << 64)
    assert (swapped == alone.fingerprint) == (group.size == 1)
