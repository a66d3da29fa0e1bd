"""Replicas that step apart, over Horovod and MPI: one model at a save, and a resumed run is bit equal."""

import pytest
from apart import Training, assert_equal

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.average import AverageOptions
from hvdtrain.sync.gossip import GossipOptions
from hvdtrain.sync.local_sgd import LocalSgdOptions

MODES = {
    "diloco": SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(every=4, outer="nesterov")),
    "ring": SyncOptions(name="gossip", gossip=GossipOptions(topology="ring")),
    "push": SyncOptions(name="gossip", gossip=GossipOptions(push=True)),
    "soup": SyncOptions(name="average", average=AverageOptions(fuse="soup")),
}


@pytest.mark.parametrize("mode", MODES)
def test_stopped_and_resumed_is_bit_equal(group: HorovodGroup, mode: str):
    run = Training(group, MODES[mode]).to(11, save_at=6)
    end = run.save()
    for saved in (run.kept, end):
        for other in group.all_gather_object({name: value.numpy() for name, value in saved.items()}):
            assert all((saved[name].numpy() == value).all() for name, value in other.items())
    assert_equal(Training(group, MODES[mode], done=6, saved=run.kept).to(11).save(), end)
    report = run.sync.report()
    assert (report["sent_mib"] > 0) == (report["consensus_distance"] > 0) == (group.size > 1)
