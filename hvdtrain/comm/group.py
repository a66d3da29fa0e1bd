"""The contract of ranks that train together: what ``Ranks`` can do, and tensors summed and copied.

Every method that is not marked *local* is a collective: all ranks of the group call it, in the same order.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Protocol

import torch

from hvdtrain.comm.ranks import Ranks


class Pending(Protocol):
    """A collective under way."""

    def done(self) -> bool:
        """Would ``wait`` return at once? (local)"""

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
    def all_to_all_async(self, rows: torch.Tensor, received: torch.Tensor, name: str) -> Pending:
        """Start sending row i of ``rows`` [size, n] to rank i; row j of ``received`` [size, n] will be rank j's.

        Both contiguous, int32 (which NCCL, MPI and Gloo all carry; other things travel as a view); matched by ``name``.
        """

    @abstractmethod
    def all_gather_async(self, row: torch.Tensor, rows: torch.Tensor, name: str) -> Pending:
        """Start sending ``row`` [1, n] to all; row j of ``rows`` [size, n] will be rank j's; tensors as above."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        """Copy ``tensor`` (contiguous) from ``root`` to all ranks, in place."""

    def all_reduce_sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place."""
        self.all_reduce_sum_async(tensor, name).wait()
        return tensor

    def start_timeline(self, path: Path) -> list[str]:
        """Begin to record all collectives in ``path`` (Chrome's trace format), written by rank 0.

        Returns what has to be said about it. Errors: OutputError where rank 0 cannot write there.
        """
        return [f"no timeline in {path}: one process sends nothing"]

    def stop_timeline(self) -> None:
        """Write what was recorded and close the file; without a timeline, nothing. ``close`` does it too."""
