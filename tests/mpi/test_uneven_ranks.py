"""Unequal shares over Horovod: one process's weights, and the rows change hands after what all ranks were told."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from learner import Learner, Recipe, furthest
from threads import on_ranks
from tiny import CPU, random_tokens, stream_of
from uneven import Uneven

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.windows import WindowSource
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.zero import ZeroOptions
from hvdtrain.watch.balance import Balance, BalanceOptions
from hvdtrain.watch.meter import StepTimes

TOLERANCE = 1e-5  # see tests/sync/test_uneven_shares.py
CONTEXT, ROWS, EVERY = 8, 24, 4


@pytest.mark.parametrize("sync", [SyncOptions(), SyncOptions(name="zero", zero=ZeroOptions(stage=2, bucket_mib=4e-3))])
def test_weights_after_20_steps_are_those_of_one_process(group: HorovodGroup, sync: SyncOptions):
    learner = Uneven(group, Recipe(sync=sync)).train(20)
    found = learner.weights()
    learner.engine.close()
    (alone,) = on_ranks(1, lambda one: Uneven(one, Recipe()).train(20).weights())
    assert furthest(found, alone) <= TOLERANCE


def test_a_slow_rank_gets_fewer_rows_and_no_row_is_lost(group: HorovodGroup, folder: Path):
    """The last rank says that a row takes it twice as long. What it says travels with the sums of an engine's step."""
    stream = stream_of(folder / str(group.rank), random_tokens(CONTEXT * 200))

    def loader(rank: int, size: int) -> TrainLoader:
        feed = Feed(CONTEXT, 1, ROWS, 3 if size > 1 else 0, rank, size)
        return TrainLoader(WindowSource(stream, WindowSampler(len(stream), CONTEXT, 1), feed), CPU)

    learner = Learner(group, Recipe(model={"layers": 1}))
    balance = Balance(BalanceOptions(every=EVERY), group.rank, group.size, CPU)
    with closing(loader(0, 1)) as alone, closing(loader(group.rank, group.size)) as mine:
        counts = []
        for step in range(1, 3 * EVERY):
            batches = mine.next_step()
            tokens = torch.cat([batch.tokens for batch in batches])
            everyone = group.all_gather_object(tokens.numpy().tolist())
            assert [row for rows in everyone for row in rows] == alone.next_step()[0].tokens.tolist()
            counts.append([len(rows) for rows in everyone])
            learner.engine.forward_backward(batches, learner.task, step)
            learner.engine.finish(more=balance.told(step))
            learner.engine.step(0.01, step)
            balance.note(StepTimes(compute=len(tokens) * (2.0 if group.rank == group.size - 1 else 1.0)))
            if balance.decide(mine.rows_of_step):
                mine.deal(balance.speeds)
        assert sum(group.all_gather_object(mine.fingerprint)) % (1 << 64) == alone.fingerprint
    learner.engine.close()
    even, fewer = {1: ([24], [24]), 2: ([12, 12], [16, 8]), 4: ([6] * 4, [7, 7, 7, 3])}[group.size]
    assert counts == [even] * EVERY + [fewer] * (2 * EVERY - 1)
