"""Replicas that are equal pass; one bit of one rank is found by all ranks alike."""

import pytest
import torch
from checkpoints import tensors_of
from in_halves import InHalves
from replicas import global_batch, share, sync_options
from tiny import tiny_decoder

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.errors import ReplicaError
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.sync.replicas import ReplicaCheck
from hvdtrain.tasks.lm import LanguageModel


@pytest.mark.parametrize("precision", ["fp32", "bf16-weights"])
def test_one_bit_on_one_rank(group: HorovodGroup, precision: str):
    model = tiny_decoder(seed=group.rank).train()  # the plan makes them equal
    plan = InHalves(model, group, sync_options(), precision, seed=1)
    optimizer, check, last = (
        make_optimizer(model.parameters(), OptimOptions(lr=0.01)),
        ReplicaCheck(group, group.rank),
        group.size - 1,
    )
    for step in (1, 2):
        plan.forward_backward(share(global_batch(step), group, passes=2), LanguageModel(), step)
        plan.finish(max_norm=1.0)
        plan.step(optimizer, lr=0.01)
        check.check(tensors_of(plan.model, optimizer), step)
    compared = {
        "a weight": (tensors_of(plan.model), torch.int32),
        "a weight that computes": (tensors_of(plan.compute), torch.int16 if precision != "fp32" else torch.int32),
        "optimizer state": (tensors_of(plan.model, optimizer), torch.int32),
    }
    for what, (tensors, integers) in compared.items():
        check.check(tensors, 2)
        name = [name for name in tensors if ("exp_avg_sq" in name) == (what == "optimizer state")][5]
        bits = tensors[name].detach().view(-1).view(integers)
        if group.rank == last:
            bits[-1] ^= 1
        if group.size == 1:
            check.check(tensors, 2)
        else:
            with pytest.raises(ReplicaError) as caught:
                check.check(tensors, 2)
            assert f"first in {name} (1 of {len(tensors)} tensors)" in str(caught.value)
            words = "and rank 1 on" if group.size == 2 else f"the replica of rank {last} on"
            assert words in str(caught.value)
            assert len(set(group.all_gather_object(str(caught.value)))) == 1
        if group.rank == last:
            bits[-1] ^= 1
    plan.sync.close()
