"""A parameter server over MPI's messages: after twenty steps the weights of one process, with dedicated servers or not.

Of one rank there is nobody to serve, and a server of its own would leave none to train.
"""

import pytest
from learner import Learner, Recipe, furthest

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import ConfigError
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.parameter_server import ParameterServerOptions

STEPS = 20
MOST = 1e-5  # of a tensor's norm: fp32 sums in another order, over 20 steps


@pytest.mark.parametrize("servers", [0, 1, 2])
def test_weights_after_20_steps_are_those_of_one_process(horovod: HorovodGroup, servers: int):
    options = ParameterServerOptions(servers=servers, bucket_mib=4e-3)
    if servers >= horovod.size:
        with pytest.raises(ConfigError, match="to train; start"):
            options.workers_of(horovod.size)
        return
    sync = SyncOptions(name="parameter_server", parameter_server=options)
    learner = Learner(horovod, Recipe(sync=sync)).train(STEPS)
    learner.engine.check(STEPS)
    alone = Learner(LocalGroup(), Recipe()).train(STEPS)
    assert furthest(learner.weights(), alone.weights()) <= MOST
    assert learner.state_bytes() < alone.state_bytes() or horovod.size == 1 or servers == 1
    learner.engine.close()
