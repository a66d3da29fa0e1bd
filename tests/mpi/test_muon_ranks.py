"""Muon over Horovod: ranks that share the work have the same bits, and those of ranks that each do all of it."""

import pytest
import torch
from learner import Learner, Recipe, furthest, held
from threads import on_ranks

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.zero import ZeroOptions

STEPS = 3
MODEL = {"activation": "swiglu", "qkv_bias": "no"}
TOLERANCE = 1e-4  # of each tensor's norm: gradients are added in another order


def muon(share: str = "always", precision: str = "fp32") -> OptimOptions:
    return OptimOptions(name="muon", lr=0.01, eps=1e-5, muon={"share": share, "precision": precision})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shared_is_what_each_would_make(group: HorovodGroup, precision: str):
    """``weights`` compares the replicas, bit by bit."""
    ends = []
    for share in ("always", "never"):
        learner = Learner(group, Recipe(optim=muon(share, precision), model=MODEL)).train(STEPS)
        ends.append(learner.weights())
        learner.engine.close()
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_pieces_are_made_as_wholes(group: HorovodGroup):
    """ZeRO, and a tensor axis where there are ranks for one: the weights of one process."""
    (alone,) = on_ranks(1, lambda one: Learner(one, Recipe(optim=muon(), model=MODEL)).train(STEPS))
    expected = held(alone)
    zero = SyncOptions(name="zero", zero=ZeroOptions(stage=1, bucket_mib=2e-3))
    ways = [{"sync": zero}, *([{"mesh": MeshOptions(tensor=2)}] if group.size > 1 else [])]
    for way in ways:
        learner = Learner(group, Recipe(optim=muon(), model=MODEL, **way)).train(STEPS)
        found = learner.weights()
        for piece in learner.engine.replica.slices:
            if piece.is_whole:
                assert furthest({"": found[piece.name]}, {"": expected[piece.name]}) <= TOLERANCE, piece.name
        learner.engine.close()
