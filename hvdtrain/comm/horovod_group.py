"""All ranks, over Horovod: ring all-reduce of gradients by NCCL, MPI or Gloo."""

import os
from typing import Any

import torch

from hvdtrain.comm.group import Group, Pending
from hvdtrain.comm.mpi import start_mpi
from hvdtrain.comm.world import World, check_sizes
from hvdtrain.errors import LaunchError, RankLostError

# One entry per tensor name; every gradient bucket and scalar has one. Horovod's default is 1024.
_CACHE_CAPACITY = 4096


class HorovodGroup(Group):
    """The group of all ranks. Making one is a collective; there is one per process.

    Errors: LaunchError where Horovod joins another world than the launcher announced.
    """

    def __init__(self, world: World):
        os.environ.setdefault("HOROVOD_CACHE_CAPACITY", str(_CACHE_CAPACITY))
        # Before hvd.init(), or Horovod's shutdown finalises MPI under mpi4py's feet.
        self._mpi = None if world.launcher.endswith("--gloo") else start_mpi(world)
        import horovod.torch as hvd

        if self._mpi is not None and not hvd.mpi_built():
            raise LaunchError(
                f"{world.launcher} starts MPI ranks, but this Horovod was built without MPI; "
                "use `horovodrun --gloo`, or build again with `make env`"
            )
        hvd.init()
        check_sizes(world, hvd.size(), "Horovod")
        self._hvd = hvd
        self.rank = hvd.rank()
        self.size = hvd.size()
        self.backend = _backend(hvd, gloo=self._mpi is None)

    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return _PendingAllReduce(self._hvd, self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name=name))

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        with _ranks_lost():
            self._hvd.broadcast_(tensor, root, name=name)

    def all_gather_object(self, value: Any) -> list[Any]:
        with _ranks_lost():
            # Named, because Horovod's own name is the value's type: ranks with None and a tuple would wait for ever.
            return self._hvd.allgather_object(value, name="hvdtrain.objects")

    def close(self) -> None:
        self._hvd.shutdown()

    def abort(self, exit_code: int) -> None:
        """End the whole job now, from one rank (local). Where MPI runs, MPI tells the launcher; elsewhere the launcher
        sees this process's exit code.
        """
        if self._mpi is not None:
            self._mpi.COMM_WORLD.Abort(exit_code)
        os._exit(exit_code)


class _PendingAllReduce:
    def __init__(self, hvd: Any, handle: int):
        self._hvd, self._handle = hvd, handle

    def wait(self) -> None:
        with _ranks_lost():
            self._hvd.synchronize(self._handle)


class _ranks_lost:
    """Turns Horovod's internal error into one that says what happened."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and kind.__name__ == "HorovodInternalError":
            raise RankLostError(f"lost contact with another rank during a collective ({error})") from None


def _backend(hvd: Any, gloo: bool) -> str:
    if torch.cuda.is_available() and hvd.nccl_built():
        return "nccl"
    return "gloo" if gloo else "mpi"
