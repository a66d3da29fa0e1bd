"""An asynchronous parameter server over MPI's messages: each row once, one model where all meet.

Of one rank there is nobody to serve; with two, one trains, and its weights are those of one process.
"""

import pytest
from dealt import Dealt, fingerprint, server
from learner import Learner, Recipe, furthest

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import ConfigError

STEPS = 12


@pytest.mark.parametrize("servers", [1, 2])
def test_each_row_is_consumed_once_and_all_meet_in_one_model(horovod: HorovodGroup, servers: int):
    if servers >= horovod.size:
        with pytest.raises(ConfigError, match="to train; start"):
            server(servers).workers_of(horovod.size)
        return
    workers = horovod.size - servers
    learner = Dealt(horovod, Recipe(sync=server(servers)), STEPS, pause_s=0.01 * (horovod.rank == 0))
    assert list(learner.walk(meetings=[6])) == [6, STEPS]
    proofs = horovod.all_gather_object(learner.loader.fingerprint)
    assert sum(proofs) % (1 << 64) == fingerprint(STEPS, workers)
    assert (learner.numbers["staleness_max"] > 0) == (workers > 1)
    if workers == 1:
        alone = Learner(LocalGroup(), Recipe()).train(STEPS)
        assert furthest(learner.weights(), alone.weights()) <= 1e-5  # fp32 sums in another order
    learner.engine.close()
