"""N ranks together read what one process reads, and can prove it."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, random_tokens, stream_of, write_data

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.data.corpora import DataOptions, check_corpora, open_corpora, stage
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.sampler import WindowSampler, share_of
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import Fingerprints, WindowSource
from hvdtrain.errors import RankError

GLOBAL_BATCH, CONTEXT = 12, 8


def _loader(stream: TokenStream, rank: int, size: int, microbatch: int = 0, seed: int = 1) -> TrainLoader:
    feed = Feed(CONTEXT, seed, GLOBAL_BATCH, microbatch, rank, size)
    return TrainLoader(WindowSource(stream, WindowSampler(len(stream), CONTEXT, seed), feed), CPU)


@pytest.mark.parametrize("microbatch", [0, 1, 3])
def test_rows_and_fingerprint_equal_one_process(group: HorovodGroup, folder: Path, microbatch: int):
    """Over 5 steps of 12 rows with 25 rows an epoch: the third step and the fifth cross into a new one."""
    stream = stream_of(folder / str(group.rank), random_tokens(CONTEXT * 26))
    with closing(_loader(stream, 0, 1)) as alone, closing(_loader(stream, group.rank, group.size, microbatch)) as mine:
        for _ in range(5):
            rows = torch.cat([batch.tokens for batch in mine.next_step()])
            everyone = np.concatenate(group.all_gather_object(rows.numpy()))
            assert np.array_equal(everyone, torch.cat([batch.tokens for batch in alone.next_step()]).numpy())
            total = sum(group.all_gather_object(mine.fingerprint)) % (1 << 64)
            assert total == alone.fingerprint
        assert (mine.rows_consumed, mine.epoch) == (alone.rows_consumed, alone.epoch) == (60, 2)


def test_the_fingerprint_sees_another_seed_and_another_rank_order(group: HorovodGroup, folder: Path):
    stream = stream_of(folder / str(group.rank), random_tokens(CONTEXT * 26))
    with closing(_loader(stream, 0, 1)) as alone:
        alone.next_step()
    with closing(_loader(stream, group.rank, group.size, seed=2)) as other_seed:
        other_seed.next_step()
    assert sum(group.all_gather_object(other_seed.fingerprint)) % (1 << 64) != alone.fingerprint

    # The right rows, but each rank says those of its neighbour: only the turns differ.
    def total(rank_of_rows: int) -> int:
        share = share_of(GLOBAL_BATCH, 0, group.rank, group.size)
        rows = share_of(GLOBAL_BATCH, 0, rank_of_rows, group.size)
        starts = WindowSampler(len(stream), CONTEXT, 1).starts(rows.first, rows.count)
        turns = np.arange(share.first, share.first + share.count)
        prints = Fingerprints(CONTEXT + 1).of_rows(stream.windows(starts, CONTEXT + 1), turns)
        return sum(group.all_gather_object(int(prints.sum(dtype=np.uint64)))) % (1 << 64)

    assert total(group.rank) == alone.fingerprint
    assert (total((group.rank + 1) % group.size) == alone.fingerprint) == (group.size == 1)


def test_one_rank_stages_for_all_and_damage_ends_all(group: HorovodGroup, folder: Path):
    """And where one rank alone finds a damaged shard, all are told."""
    data, disk = folder / "data", folder / "disk"
    if group.rank == 0:
        write_data(data, train=[random_tokens(100, seed=number) for number in range(5)])
    group.barrier()
    corpora = group.together(lambda: open_corpora(DataOptions(dir=str(data))))
    staged = stage(corpora, disk, group.rank == 0, group.together)
    assert [path for path, _ in staged.entries] == [disk / corpora.manifest.data_digest]
    group.together(lambda: check_corpora(staged, group.rank, group.size, 1))
    group.barrier()
    if group.rank == 0:
        path = staged.entries[0][0] / "train-00003.h5"
        *content, last = path.read_bytes()
        path.write_bytes(bytes([*content, last ^ 1]))
    group.barrier()
    with pytest.raises(RankError, match=r"train-00003\.h5 is damaged in block 0"):
        group.together(lambda: check_corpora(staged, group.rank, group.size, 1))
