"""Rows between all ranks of a group by messages of our own, instead of MPI's all-to-all and all-gather.

    rank 1 of 4      sends to 2, 3, 0      receives from 0, 3, 2      all under way at once, from the start

MPI's collectives exchange in rounds, and Horovod runs one after the other: between them a slow link is idle. Messages
of several buckets keep it busy, and a rank need not be in MPI at the same time as the others.

Ranks may start in any order: a message's tag is made of its name. Horovod's thread, which looks for work every
HOROVOD_CYCLE_TIME (1 ms), moves them on while Python computes (see mpi_axis.py).
"""

import zlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from hvdtrain.comm.ranks import Pending
from hvdtrain.comm.waiting import nap
from hvdtrain.errors import RankLostError

MOST_RANKS = 64  # each bucket is 4 (ranks - 1) messages of Python's: at so many about a millisecond
_TAGS = 1 << 31


class Messages:
    """Over ``comm`` (``mpi4py.MPI.Comm``), which is this object's own. mpi: ``mpi4py.MPI``."""

    def __init__(self, mpi: ModuleType, comm: Any):
        self._mpi, self._comm = mpi, comm
        self._rank, self.size = comm.Get_rank(), comm.Get_size()
        self._names: dict[int, str] = {}

    def all_to_all_async(self, rows: torch.Tensor, received: torch.Tensor, name: str) -> Pending:
        """See ``Group.all_to_all_async``."""
        return self._exchange(rows, received, name)

    def all_gather_async(self, row: torch.Tensor, rows: torch.Tensor, name: str) -> Pending:
        """See ``Group.all_gather_async``."""
        return self._exchange(row.expand(self.size, -1), rows, name)

    def _exchange(self, rows: torch.Tensor, received: torch.Tensor, name: str) -> Pending:
        own, tag = self._rank, self._tag(name)
        received[own].copy_(rows[own])
        others = [(own + distance) % self.size for distance in range(1, self.size)]
        requests = [self._comm.Irecv(self._words(received[other]), other, tag) for other in reversed(others)]
        requests += [self._comm.Isend(self._words(rows[other]), other, tag) for other in others]
        return _PendingMessages(self._mpi, requests, (rows, received))

    def _tag(self, name: str) -> int:
        tag = zlib.crc32(name.encode()) % _TAGS
        other = self._names.setdefault(tag, name)
        assert other == name, f"{name} and {other} have one tag: rename one of them"
        return tag

    def _words(self, row: torch.Tensor) -> list[Any]:
        assert row.dtype == torch.int32 and row.is_contiguous()
        return [self._mpi.memory.fromaddress(row.data_ptr(), row.nbytes), self._mpi.INT32_T]


def can_serve(mpi: ModuleType, ranks: int) -> bool:
    """May messages replace MPI's collectives between so many ranks? Alike on all of them."""
    is_free = mpi.Query_thread() == mpi.THREAD_MULTIPLE  # Horovod's thread is in MPI as well
    return is_free and 1 < ranks <= MOST_RANKS and mpi.COMM_WORLD.Get_attr(mpi.TAG_UB) >= _TAGS - 1


class _PendingMessages:
    """tensors: kept until all messages have gone and come."""

    def __init__(self, mpi: ModuleType, requests: list[Any], tensors: Sequence[torch.Tensor]):
        self._mpi, self._requests, self._tensors = mpi, requests, tensors

    def done(self) -> bool:
        if self._requests:
            try:
                if self._mpi.Request.Testall(self._requests):
                    self._requests = []
            except self._mpi.Exception as error:
                raise RankLostError(f"lost contact with another rank during an exchange ({error})") from None
        return not self._requests

    def wait(self) -> None:
        while not self.done():
            nap()
