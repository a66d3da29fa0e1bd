"""What a step says of its parts: the ranks' own gradients, or alone those of the first microbatch."""

import pytest
import torch
from in_halves import InHalves
from replicas import global_batch, share, sync_options
from tiny import loss_of, tiny_decoder

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.tasks.lm import LanguageModel

TASK = LanguageModel()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parts_of_a_step(group: HorovodGroup, precision: str):
    model = tiny_decoder(seed=0).train()
    batch = global_batch()
    parts = share(batch, group, passes=2)
    plan = InHalves(model, group, sync_options(16.0), precision, seed=1)
    plan.forward_backward(parts, TASK, step=1)
    sums = plan.finish(max_norm=0.1)  # clipped, which changes nothing here

    alone = tiny_decoder(seed=0).train()
    mine = parts if group.size > 1 else parts[:1]
    loss = [loss_of(TASK, alone, part) for part in mine]
    sum(one.total for one in loss).backward()
    weight = sum(one.weight for one in loss)
    square = sum(p.grad.double().square().sum() for p in alone.parameters()) / weight**2
    everyone = group.all_gather_object((float(square), 1 / weight))
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    expected_square, expected_inverse = (sum(column) / len(everyone) for column in zip(*everyone, strict=True))
    assert sums.part_square.item() == pytest.approx(expected_square, rel=tolerance)
    assert sums.part_inverse.item() == pytest.approx(expected_inverse)
    plan.sync.close()


def test_one_part_says_nothing(group: HorovodGroup):
    plan = InHalves(tiny_decoder(seed=0).train(), group, sync_options(16.0), "fp32", seed=1)
    plan.forward_backward(share(global_batch(), group, passes=1), TASK, step=1)
    assert bool(torch.isnan(plan.finish(max_norm=0).part_square)) == (group.size == 1)
    plan.sync.close()
