"""Horovod's own DistributedOptimizer, used as its traps allow, as a reference for AllReduceSync.

It averages the ranks' mean gradients, which is right only where all ranks have as many targets, and knows no
accumulation that divides: so equal weights, one microbatch. Its clipping comes between synchronize() and a step() that
must not reduce again. It is wrapped before the first step, and every parameter is used.
"""

import pytest
import torch
from replicas import ONE_BUCKET, TINY_BUCKETS, make_plan
from tiny import loss_of, tiny_decoder

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.data.batch import Batch
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.tasks.lm import LanguageModel

STEPS, LR = 3, 0.01
# AdamW divides each gradient by its own size, also where that is only rounding (1e-9, as of the keys' bias, whose true
# gradient is 0): a larger eps keeps such noise from becoming a full step.
OPTIM = OptimOptions(eps=1e-5)
TOLERANCE = 1e-5  # of what the parameters moved by. Seen: 1.3e-6.


def _batch(rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * rank + step)
    windows = torch.randint(50, (3, 9), generator=generator)
    return Batch.from_windows(windows.numpy())


def _groups(model: torch.nn.Module) -> list[dict]:
    """Which parameters decay, and by how much."""
    return make_optimizer(model.parameters(), OPTIM).param_groups


def _reference(rank: int, clip_norm: float) -> list[torch.Tensor]:
    import horovod.torch as hvd

    model, task = tiny_decoder(), LanguageModel()
    decayed = [{name: group[name] for name in ("params", "weight_decay")} for group in _groups(model)]
    theirs = torch.optim.AdamW(decayed, lr=LR, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    optimizer = hvd.DistributedOptimizer(theirs, named_parameters=model.named_parameters(), op=hvd.Average)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(task, model, _batch(rank, step))
        (loss.total / loss.weight).backward()
        optimizer.synchronize()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        with optimizer.skip_synchronize():
            optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("bucket_mib", [ONE_BUCKET, TINY_BUCKETS])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_parameters_after_three_steps(group: HorovodGroup, clip_norm: float, bucket_mib: float):
    model, plan = make_plan(group, bucket_mib)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model.parameters(), OPTIM)
    for step in range(1, STEPS + 1):
        plan.forward_backward([_batch(group.rank, step)], LanguageModel(), step)
        sums = plan.finish(clip_norm)
        assert sums.grad_norm > 0.1  # so the clip_norm of 0.1 clips
        plan.step(optimizer, LR)
    expected = _reference(group.rank, clip_norm)
    moved = torch.cat([(a - b).flatten() for a, b in zip(expected, start, strict=True)])
    apart = torch.cat([(a - b.detach()).flatten() for a, b in zip(expected, model.parameters(), strict=True)])
    assert apart.norm() < TOLERANCE * moved.norm()
