"""A group of one: no launcher, no MPI, no waiting."""

import torch

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.comm.group import Group, Sets
from hvdtrain.comm.ranks import Done, OneRank, Pending


class LocalGroup(OneRank, Group):
    """The single process that is the whole world; a sum over it is the value itself."""

    backend = "none"

    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return Done()

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return Done()

    def all_to_all_async(self, rows: torch.Tensor, received: torch.Tensor, name: str) -> Pending:
        received.copy_(rows)
        return Done()

    def all_gather_async(self, row: torch.Tensor, rows: torch.Tensor, name: str) -> Pending:
        rows.copy_(row)
        return Done()

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        pass

    def split(self, sets: Sets) -> Group:
        return self

    def axis(self, sets: Sets, device: torch.device) -> Axis:
        return LocalAxis()
