"""A step that is bad on one rank is left out by all of them, and they stay equal."""

import itertools
import math

import pytest
import torch
from in_halves import InHalves
from replicas import global_batch, share, sync_options
from tiny import tiny_decoder

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.optim.guard import GuardOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.tasks.lm import LanguageModel
from hvdtrain.tasks.task import LossSum


class _Poisoned(LanguageModel):
    """nan on the last rank at step 2."""

    def __init__(self, group: HorovodGroup):
        super().__init__()
        self._last, self.step = group.rank == group.size - 1, 0

    def loss(self, model: torch.nn.Module, output: torch.Tensor, batch) -> LossSum:
        loss = super().loss(model, output, batch)
        return LossSum(loss.total * math.nan, loss.weight) if self._last and self.step == 2 else loss


@pytest.mark.parametrize("precision", ["fp32", "bf16-weights"])
def test_all_ranks_leave_out_the_same_step(group: HorovodGroup, precision: str):
    model = tiny_decoder(seed=0).train()
    guard = GuardOptions(policy="skip", backoff=0.5)
    plan = InHalves(model, group, sync_options(), precision, seed=1, guard=guard)
    optimizer, task = make_optimizer(model.parameters(), OptimOptions(lr=0.01)), _Poisoned(group)
    weights = []
    for task.step in range(1, 5):
        plan.forward_backward(share(global_batch(task.step), group, passes=2), task, task.step)
        plan.finish(max_norm=1.0)
        plan.step(optimizer, lr=0.01)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert len({tuple(w.tolist()) for w in group.all_gather_object(weights[-1])}) == 1
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [True, False, False]
    assert plan.guard.check(4)[0] == 1
    assert 0.5 < plan.guard.factor.item() < 0.51
    assert optimizer.state_dict()["state"][0]["step"].item() == 3  # bias correction knows nothing of it
    assert all(p.isfinite().all() for p in model.parameters())
    plan.sync.close()
