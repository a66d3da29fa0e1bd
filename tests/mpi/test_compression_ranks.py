"""Compressed gradients over real ranks: replicas stay equal, a save is one state, and PowerSGD is one process."""

from pathlib import Path

import pytest
import torch
from learner import Learner, Recipe, furthest

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.powersgd import PowerSgdOptions
from hvdtrain.sync.topk import TopkOptions

ADAMW = OptimOptions(lr=0.01, eps=1e-6)
SGD = OptimOptions(name="sgd", lr=3e-3, momentum=0.0, clip_norm=0.0)
POWERSGD = Recipe(sync=SyncOptions(name="powersgd", powersgd=PowerSgdOptions(rank=2)), optim=ADAMW)
SIGN = Recipe(sync=SyncOptions(name="sign"), optim=SGD)
TOPK = Recipe(sync=SyncOptions(name="topk", topk=TopkOptions(share=0.05)), optim=ADAMW)


@pytest.mark.parametrize("recipe", [POWERSGD, SIGN, TOPK], ids=lambda recipe: recipe.sync.name)
def test_a_resumed_run_is_the_unbroken_one(group: HorovodGroup, recipe: Recipe, folder: Path):
    unbroken = Learner(group, recipe).train(3)  # signs go by turns
    saved = unbroken.save(folder)
    group.agree([piece.tensor.tolist() for piece in unbroken.sync.state()], "what is kept")
    resumed = Learner(group, recipe, saved).train(3)
    found, expected = resumed.weights(), unbroken.train(3).weights()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_powersgd_is_one_process(group: HorovodGroup):
    """1e-4 of each tensor's norm after 20 steps of AdamW: fp32 sums in another order."""
    found, expected = (Learner(ranks, POWERSGD).train(20).weights() for ranks in (group, LocalGroup()))
    assert furthest(found, expected) <= 1e-4
