"""The gradient of N ranks is that of one process: sums, then one division, then one clip."""

import hashlib

import pytest
import torch
from in_halves import InHalves
from replicas import (
    ONE_BUCKET,
    ROWS,
    TINY_BUCKETS,
    distance,
    global_batch,
    gradients,
    make_plan,
    norm,
    one_process,
    rows_of,
    share,
    sync_options,
)
from tiny import tiny_decoder
from torch import nn

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.models.draws import Draws
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.tasks.lm import LanguageModel
from hvdtrain.tasks.task import LossSum, Task

# Of the whole gradient, fp32: the same products are added in another order. Seen: 2.4e-7.
TOLERANCE = 1e-6
TASK = LanguageModel()


@pytest.mark.parametrize("bucket_mib", [ONE_BUCKET, TINY_BUCKETS])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_gradients_equal_one_process(group: HorovodGroup, passes: int, bucket_mib: float):
    model, plan = make_plan(group, bucket_mib)
    optimizer = make_optimizer(model.parameters(), OptimOptions(lr=0.01))
    for step in range(1, 3):  # the second finds what the first left in the buckets
        batch = global_batch(seed=step)
        loss, expected = one_process(model, batch)
        plan.forward_backward(share(batch, group, passes), TASK, step)
        sums = plan.finish(max_norm=0)
        assert sums.weight.item() == batch.target_tokens
        assert sums.loss.item() == pytest.approx(loss, rel=TOLERANCE)
        assert sums.grad_norm.item() == pytest.approx(norm(list(expected.values())), rel=TOLERANCE)
        assert distance(gradients(model), expected) < TOLERANCE
        plan.step(optimizer, lr=0.01)


def test_the_ranks_weights_differ_so_that_a_mean_of_means_would_be_seen(group: HorovodGroup):
    """Holds the tests above to their purpose: the mean of four ranks' own means is far outside the tolerance."""
    model, batch = tiny_decoder(), global_batch(seed=1)
    _, expected = one_process(model, batch)
    means = [one_process(model, rows_of(batch, row, ROWS // 4))[1] for row in range(0, ROWS, ROWS // 4)]
    mean_of_means = {name: sum(mean[name] for mean in means) / len(means) for name in expected}
    assert distance(mean_of_means, expected) > 1e5 * TOLERANCE


@pytest.mark.parametrize("last_rank", ["has no target that counts", "has no microbatch at all"])
def test_a_rank_with_nothing_to_say_takes_part(group: HorovodGroup, last_rank: str):
    batch = global_batch()
    if group.size > 1:
        idle_rows = ROWS // group.size
        targets = batch.targets.clone()
        targets[-idle_rows:] = IGNORE
        batch = Batch(batch.tokens, targets, int((targets != IGNORE).sum()))
    model, plan = make_plan(group)
    _, expected = one_process(model, batch)
    mine = share(batch, group, passes=1)
    if last_rank == "has no microbatch at all" and 1 < group.size == group.rank + 1:
        mine = []
    plan.forward_backward(mine, TASK, step=1)
    assert plan.finish(max_norm=0).weight.item() == batch.target_tokens
    assert distance(gradients(model), expected) < TOLERANCE


@pytest.mark.parametrize("fraction", [0.25, 0.999, 1.001, 4.0])
def test_clipping_is_on_the_norm_of_the_global_gradient(group: HorovodGroup, fraction: float):
    """A limit just below and just above the norm: that of one rank, or of a sum not yet divided, would miss it."""
    batch = global_batch()
    model, plan = make_plan(group, TINY_BUCKETS)
    _, expected = one_process(model, batch)
    whole = norm(list(expected.values()))
    plan.forward_backward(share(batch, group, passes=2), TASK, step=1)
    sums = plan.finish(max_norm=fraction * whole)
    assert sums.grad_norm.item() == pytest.approx(whole, rel=TOLERANCE)  # before clipping
    clipped = {name: gradient * min(1.0, fraction) for name, gradient in expected.items()}
    # torch's formula adds 1e-6 to the norm.
    assert distance(gradients(model), clipped) < TOLERANCE + 1e-6 / whole


class _Rare(nn.Module):
    """``common`` is used by every rank, ``rare`` by the last alone, ``never`` by none."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.rare, self.never = (nn.Parameter(torch.full((2, 2), value)) for value in (1.0, 2.0, 3.0))
        self.draws = Draws()

    def forward(self) -> torch.Tensor:
        return torch.stack([self.common.sum(), (self.rare * self.rare).sum()])


class _RareTask(Task):
    def __init__(self, uses_rare: bool):
        self._uses_rare = uses_rare

    def inputs(self, batch: Batch) -> tuple[()]:
        return ()

    def loss(self, model: nn.Module, output: torch.Tensor, batch: Batch) -> LossSum:
        total = output[0] * batch.target_tokens
        return LossSum(total + output[1] if self._uses_rare else total, batch.target_tokens)


@pytest.mark.parametrize("bucket_mib", [ONE_BUCKET, TINY_BUCKETS])
def test_parameters_that_some_or_no_ranks_use(group: HorovodGroup, bucket_mib: float):
    """Zero gradients instead of none would let AdamW decay what nobody used; that of one rank alone is global too."""
    model = _Rare()
    plan = InHalves(model, group, sync_options(bucket_mib), "fp32", seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    batch, task = global_batch(), _RareTask(uses_rare=group.rank == group.size - 1)
    for step in range(1, 4):
        rare = model.rare.detach().clone()
        plan.forward_backward(share(batch, group, passes=2), task, step)
        plan.finish(max_norm=0)
        passes = min(2, ROWS // group.size)
        torch.testing.assert_close(model.common.grad, torch.ones(2, 2))
        torch.testing.assert_close(model.rare.grad, passes * 2 * rare / batch.target_tokens)
        assert model.never.grad is None
        plan.step(optimizer, lr=0.01)
        assert torch.equal(model.never, torch.full((2, 2), 3.0))
        assert not torch.equal(model.rare, rare)
    assert len(set(group.all_gather_object(_digest(model)))) == 1


@pytest.mark.parametrize("bucket_mib", [ONE_BUCKET, TINY_BUCKETS])
def test_replicas_are_bit_equal_after_50_steps(group: HorovodGroup, bucket_mib: float):
    """They begin with other parameters on each rank, of which rank 0's are taken, and draw other dropout."""
    model = tiny_decoder(seed=group.rank, dropout=0.1).train()
    before = tiny_decoder(seed=0, dropout=0.1)
    plan = InHalves(model, group, sync_options(bucket_mib), "fp32", seed=1)
    assert _digest(model) == _digest(before)
    optimizer = make_optimizer(model.parameters(), OptimOptions(lr=0.01))
    for step in range(1, 51):
        plan.forward_backward(share(global_batch(step), group, passes=1), TASK, step)
        plan.finish(max_norm=1.0)
        plan.step(optimizer, lr=0.01)
    assert len(set(group.all_gather_object(_digest(model)))) == 1
    assert _digest(model) != _digest(before)


def _digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
