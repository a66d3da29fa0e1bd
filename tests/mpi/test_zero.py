"""ZeRO over Horovod: dropout and all, the weights of all-reduce; and a run that goes on on fewer ranks."""

from pathlib import Path

import pytest
from checkpoints import tensors_in
from learner import Learner, Recipe, furthest
from threads import on_ranks

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.zero import ZeroOptions

# Of each tensor's norm, fp32: the same products are added in another order, for 20 steps.
TOLERANCE = 1e-5


def zero(stage: int) -> SyncOptions:
    return SyncOptions(name="zero", zero=ZeroOptions(stage=stage, bucket_mib=4e-3))


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_weights_after_20_steps_are_those_of_allreduce(group: HorovodGroup, name: str):
    """Replicas draw their own dropout, and the same as with all-reduce. Each has its share of the state."""
    common = {"optim": OptimOptions(name=name, lr=0.01, eps=1e-5), "model": {"dropout": 0.1}, "microbatches": 2}
    whole = Learner(group, Recipe(**common)).train(20)
    expected = whole.weights()
    whole.engine.close()
    for stage in (1, 2):
        learner = Learner(group, Recipe(**common, sync=zero(stage))).train(20)
        assert furthest(learner.weights(), expected) <= TOLERANCE
        assert max(group.all_gather_object(learner.state_bytes())) <= whole.state_bytes() / group.size * 1.05
        learner.engine.close()


def test_a_run_goes_on_alone_and_in_another_stage(group: HorovodGroup, folder: Path):
    """What all ranks have saved, one rank loads without ZeRO; and all load it into the other stage."""
    common = {"optim": OptimOptions(name="lamb", lr=0.01, eps=1e-5)}
    learner = Learner(group, Recipe(**common, sync=zero(2))).train(3)
    saved = learner.save(folder / "first")
    learner.engine.close()
    other = Learner(group, Recipe(**common, sync=zero(1)), saved).train(3)
    found = tensors_in(other.save(folder / "second"))
    other.engine.close()
    if group.rank == 0:
        (alone,) = on_ranks(1, lambda one: Learner(one, Recipe(**common), saved).train(3).save(folder / "alone"))
        expected = tensors_in(alone)
        assert found.keys() == expected.keys()
        models = [{n: t for n, t in one.items() if n.startswith("model.")} for one in (found, expected)]
        assert furthest(*models) <= TOLERANCE
    group.barrier()


def test_with_a_tensor_axis(group: HorovodGroup):
    """Two replicas of two ranks each; at other rank counts there is no such mesh, and nothing is run."""
    if group.size != 4:
        return
    common = {"optim": OptimOptions(name="lamb", lr=0.01, eps=1e-5), "mesh": MeshOptions(tensor=2)}
    whole = Learner(group, Recipe(**common)).train(5)
    learner = Learner(group, Recipe(**common, sync=zero(2))).train(5)
    assert furthest(learner.weights(), whole.weights()) <= TOLERANCE
    whole.engine.close()
    learner.engine.close()
