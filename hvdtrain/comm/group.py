"""The contract of ranks that train together: what ``Ranks`` can do, and tensors summed and copied.

Every method that is not marked *local* is a collective: all ranks of the group call it, in the same order.
"""

from abc import abstractmethod
from typing import Protocol

import torch

from hvdtrain.comm.ranks import Ranks


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the tensor that was handed over holds the result."""


class Group(Ranks):
    """``backend`` names what carries the bytes, for the run's record."""

    backend: str

    @abstractmethod
    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start summing ``tensor`` (contiguous; fp32, fp64, fp16 or integer) over all ranks, in place.

        Ranks may start their tensors in any order: they are matched by ``name``.
        """

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        """Copy ``tensor`` (contiguous) from ``root`` to all ranks, in place."""

    def all_reduce_sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place."""
        self.all_reduce_sum_async(tensor, name).wait()
        return tensor
