"""An axis over MPI, where its ranks are on several nodes or have no memory in common.

Who sees to it that a message goes on while Python computes? MPI moves messages only inside its calls. Where the group
of all ranks is Horovod's, Horovod's thread looks for work every HOROVOD_CYCLE_TIME (1 ms), and each look moves
everything that is under way in this process, messages of an axis too.
"""

from types import ModuleType
from typing import Any

import torch

from hvdtrain.comm.exchange import ExchangeAxis, check
from hvdtrain.comm.ranks import Pending


class MpiAxis(ExchangeAxis):
    """The ranks of ``comm`` (``mpi4py.MPI.Comm``), which is this axis's own. mpi: ``mpi4py.MPI``."""

    backend = "mpi"

    def __init__(self, mpi: ModuleType, comm: Any):
        self._mpi, self._comm = mpi, comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        # What is sent is never added by MPI: types of a width, because a count of bytes ends at 2 GiB.
        self._types = {1: mpi.BYTE, 2: mpi.INT16_T, 4: mpi.INT32_T, 8: mpi.INT64_T}

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        check(tensor)
        self._comm.Bcast(self._words(tensor), root)
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> Pending:
        check(tensor)
        return _PendingMessage(self._comm.Isend(self._words(tensor), to), tensor)

    def receive(self, tensor: torch.Tensor, source: int) -> Pending:
        check(tensor)
        return _PendingMessage(self._comm.Irecv(self._words(tensor), source), tensor)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def close(self) -> None:
        self._comm.Free()

    def _all_gather(self, row: torch.Tensor, rows: torch.Tensor) -> None:
        self._comm.Allgather(self._words(row), self._words(rows))

    def _all_to_all(self, rows: torch.Tensor, received: torch.Tensor) -> None:
        self._comm.Alltoall(self._words(rows), self._words(received))

    def _words(self, tensor: torch.Tensor) -> list[Any]:
        """The memory of a contiguous tensor, as mpi4py takes it."""
        return [self._mpi.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), self._types[tensor.itemsize]]


class _PendingMessage:
    """tensor: kept until the message has gone or come."""

    def __init__(self, request: Any, tensor: torch.Tensor):
        self._request, self._tensor = request, tensor

    def done(self) -> bool:
        return self._request.Test()

    def wait(self) -> None:
        self._request.Wait()
