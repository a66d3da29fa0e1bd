"""Horovod's Adasum is the formula's, between real ranks."""

import pytest
import torch
from threads import adasum

from hvdtrain.comm.horovod_group import HorovodGroup


@pytest.mark.parametrize("alike", [0.0, 0.7, 1.0])
def test_adasum(group: HorovodGroup, alike: float):
    """From gradients that have nothing in common to such that are one, of several sizes, under way at once."""
    lengths = (1, 3, 1000, 65_537)
    of_ranks = []
    for rank in range(group.size):
        own, common = torch.Generator().manual_seed(rank + 1), torch.Generator().manual_seed(0)
        of_ranks.append(
            [
                alike * torch.randn(n, generator=common) + (1 - alike) * torch.randn(n, generator=own)
                for n in lengths
            ]
        )  # fmt: skip
    mine = [tensor.clone() for tensor in of_ranks[group.rank]]
    pending = [group.adasum_async(tensor, f"adasum.{number}") for number, tensor in enumerate(mine)]
    for one in reversed(pending):
        one.wait()
    for number, tensor in enumerate(mine):
        expected = adasum([tensors[number] for tensors in of_ranks])
        assert (tensor - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert group.all_gather_object([tensor.tolist() for tensor in mine[:3]])[0] == [one.tolist() for one in mine[:3]]
