"""Ranks that share a batch unequally, in different numbers of microbatches, are still one process."""

import pytest
from learner import Recipe, furthest
from threads import ThreadGroup, on_ranks
from uneven import Uneven

from hvdtrain.sync import SyncOptions
from hvdtrain.sync.allreduce import AllReduceOptions
from hvdtrain.sync.parameter_server import ParameterServerOptions
from hvdtrain.sync.zero import ZeroOptions

STEPS = 20
# Of each tensor's norm, fp32: the same products are added in another order, for 20 steps.
TOLERANCE = 1e-5
SMALL = 4e-3  # MiB: several buckets

SYNCS = {
    "allreduce": SyncOptions(allreduce=AllReduceOptions(bucket_mib=SMALL)),
    "zero 1": SyncOptions(name="zero", zero=ZeroOptions(stage=1, bucket_mib=SMALL)),
    "zero 2": SyncOptions(name="zero", zero=ZeroOptions(stage=2, bucket_mib=SMALL)),
    "server": SyncOptions(name="parameter_server", parameter_server=ParameterServerOptions(servers=1)),
}


def weights(ranks: int, **recipe) -> list[dict]:
    def work(group: ThreadGroup) -> dict:
        learner = Uneven(group, Recipe(**recipe)).train(STEPS)
        found = learner.weights()
        learner.engine.close()
        return found

    return on_ranks(ranks, work)


@pytest.fixture(scope="module")
def alone() -> dict:
    return weights(1)[0]


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_after_20_steps_are_those_of_one_process(alone: dict, ranks: int, sync: str):
    for found in weights(ranks, sync=SYNCS[sync]):
        assert furthest(found, alone) <= TOLERANCE
