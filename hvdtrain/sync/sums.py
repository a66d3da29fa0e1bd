"""What ranks tell one another in a step beside gradients: loss, targets, flags, parts, and who used which parameter.

    all ranks             [loss, targets, flags, parts | users of what all hold]     one sum, where replicas are whole
    ranks of some slices                              [| users of what these hold]     one more for each such set

What all ranks of a replica know alike, one of them says: ``mesh.speaks``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import Mesh
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.slices import Slice
from hvdtrain.sync.sync import Told

_OF_PARTS = slice(3, 6)  # see PartNorms
_OTHERS = 6  # loss, targets, flags, and those of parts


@dataclass(frozen=True)
class Totals:
    """Sums over all replicas, fp64. users: of each slice, ranks that had a gradient of it."""

    loss: torch.Tensor
    weight: torch.Tensor
    flags: torch.Tensor
    parts: torch.Tensor
    users: torch.Tensor


class Sums:
    """slices: those whose gradients are summed."""

    def __init__(self, mesh: Mesh, slices: Sequence[Slice]):
        self._mesh, self._device = mesh, slices[0].tensor.device
        numbers: dict[Group, list[int]] = {mesh.world: []}
        for number, piece in enumerate(slices):
            numbers.setdefault(piece.holders, []).append(number)
        self._numbers = {
            group: torch.tensor(of_group, dtype=torch.int64, device=self._device) for group, of_group in numbers.items()
        }
        self._used = torch.zeros(len(slices), dtype=torch.bool)  # on the host, as it was last
        self._used_there = self._used.to(self._device)

    def over_ranks(self, told: Told, parts: PartNorms, used: torch.Tensor, is_complete: bool) -> Totals:
        """used: of each slice, has this rank had a gradient of it? bool, on the host. is_complete: see ``PartNorms``.

        Collective.
        """
        if not torch.equal(used, self._used):  # a copy waits for the device, and it is the same in nearly every step
            self._used, self._used_there = used, used.to(self._device)
        tensors = {group: self._to_sum(group) for group in self._numbers}
        sums = tensors[self._mesh.world]
        if self._mesh.speaks:
            sums[0].copy_(told.loss)
            sums[1].fill_(sum(told.weights))
        sums[2].fill_(told.flags)
        parts.tell(sums[_OF_PARTS], told.weights, is_complete)
        under_way = [group.all_reduce_sum_async(tensor, "hvdtrain.sums") for group, tensor in tensors.items()]
        if told.more is not None:
            under_way.append(self._mesh.world.all_reduce_sum_async(told.more, "hvdtrain.more"))
        for pending in under_way:
            pending.wait()
        users = torch.zeros(len(used), dtype=torch.float64, device=self._device)
        for group, numbers in self._numbers.items():
            users[numbers] = tensors[group][self._others(group) :]
        return Totals(sums[0], sums[1], sums[2], sums[_OF_PARTS], users)

    def _to_sum(self, group: Group) -> torch.Tensor:
        numbers, others = self._numbers[group], self._others(group)
        tensor = torch.zeros(others + len(numbers), dtype=torch.float64, device=self._device)
        tensor[others:] = self._used_there[numbers]
        return tensor

    def _others(self, group: Group) -> int:
        return _OTHERS if group is self._mesh.world else 0
