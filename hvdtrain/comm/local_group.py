"""A group of one: no launcher, no MPI, no waiting."""

import torch

from hvdtrain.comm.group import Group, Pending
from hvdtrain.comm.ranks import OneRank


class _Done:
    def wait(self) -> None:
        pass


class LocalGroup(OneRank, Group):
    """The single process that is the whole world; a sum over it is the value itself."""

    backend = "none"

    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return _Done()

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        pass
