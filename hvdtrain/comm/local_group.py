"""A group of one: no launcher, no MPI, no waiting."""

from typing import Any

import torch

from hvdtrain.comm.group import Group, Pending


class _Done:
    def wait(self) -> None:
        pass


class LocalGroup(Group):
    """The single process that is the whole world; a sum over it is the value itself."""

    rank = 0
    size = 1
    backend = "none"

    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return _Done()

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        pass

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass
