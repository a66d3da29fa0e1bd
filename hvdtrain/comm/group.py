"""The contract of ranks that train together: what ``Ranks`` can do, tensors summed and copied, and ranks by sets.

Every method that is not marked *local* is a collective: all ranks of the group call it, in the same order.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.open_mpi import AllReduce
from hvdtrain.comm.ranks import Pending, Ranks

Sets = Sequence[Sequence[int]]  # of ranks: each in ascending order, no rank in two of them; the same on all ranks


class Rows(Protocol):
    """Ranks that exchange rows: as those of a group do, see there."""

    size: int

    def all_to_all_async(self, rows: torch.Tensor, received: torch.Tensor, name: str) -> Pending: ...

    def all_gather_async(self, row: torch.Tensor, rows: torch.Tensor, name: str) -> Pending: ...


@dataclass(frozen=True)
class Nodes:
    """Ranks on several nodes, on each as many and more than one. near: those of this rank's node; far: those of its
    place on all nodes.
    """

    near: Rows
    far: Rows


class Group(Ranks):
    """``backend`` names what carries the bytes, for the run's record; ``all_reduce``: by which algorithm, where there
    was a choice. nodes: None where ranks do not stand so, or rows go another way.
    """

    backend: str
    all_reduce: AllReduce | None = None
    nodes: Nodes | None = None

    @abstractmethod
    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start summing ``tensor`` (contiguous; fp32, fp64, fp16 or integer) over all ranks, in place.

        Ranks may start their tensors in any order: they are matched by ``name``.
        """

    @abstractmethod
    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to combine ``tensor`` (contiguous, fp32) over all ranks by Adasum (2006.02924), in place: of two that
        agree their mean, of two that have nothing in common their sum. Over MPI, of 2^n ranks.
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

    @abstractmethod
    def split(self, sets: Sets) -> "Group":
        """The group of this rank's set, or of this rank alone where it is in none; there ranks count from 0.

        Only the group of all ranks can be split. What it was split into ends with it.
        """

    @abstractmethod
    def axis(self, sets: Sets, device: torch.device) -> Axis:
        """The same as an axis, for tensors on ``device``."""

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


def set_of(rank: int, sets: Sets) -> Sequence[int]:
    """The one that ``rank`` is in; by itself where it is in none."""
    everyone = [one for ranks in sets for one in ranks]
    assert len(set(everyone)) == len(everyone), f"a rank is in two sets: {sets}"
    assert all(list(ranks) == sorted(ranks) for ranks in sets), f"not in ascending order: {sets}"
    return next((ranks for ranks in sets if rank in ranks), (rank,))


def neighbours(ranks: Sequence[int], hosts: Sequence[str]) -> tuple[Sets, Sets] | None:
    """Those on one node; and those of one place on all nodes. None: one node, nodes of one rank, or of unequal many.

    hosts: of each rank of the world.
    """
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank], []).append(rank)
    near = list(of_host.values())
    if len(near) == 1 or {len(one) for one in near} != {len(near[0])} or len(near[0]) == 1:
        return None
    return near, [list(places) for places in zip(*near, strict=True)]
