"""Which axis serves which ranks and tensors.

tensors of    ranks                                 axis
a GPU         each with a GPU of its own, NCCL      NCCL
              others                                one of the host's, below, through the host's memory
the host      over MPI, on one node                 shared memory; messages by MPI
              over MPI, on several nodes            MPI
              over Gloo                             Gloo
"""

from types import ModuleType
from typing import TYPE_CHECKING

import torch

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.comm.group import Sets, set_of
from hvdtrain.comm.mpi_axis import MpiAxis
from hvdtrain.comm.ranks import Ranks
from hvdtrain.comm.shared_axis import PLACE, SharedAxis, has_room
from hvdtrain.comm.staged import StagedAxis
from hvdtrain.comm.world import shares_gpus

if TYPE_CHECKING:
    from torch.distributed import Store


class Axes:
    """Makes the axes of a world, and ends them. mpi: ``mpi4py.MPI``, where MPI has joined its ranks."""

    def __init__(self, world: Ranks, mpi: ModuleType | None):
        self._world, self._mpi = world, mpi
        self._made: list[Axis] = []
        self._store: Store | None = None

    def make(self, sets: Sets, device: torch.device) -> Axis:
        """See ``Group.axis``."""
        if device.type != "cuda":
            axis = self._on_host(sets)
        elif why := _why_not_nccl():
            axis = self._on_host(sets)
            axis = StagedAxis(axis, why) if axis.size > 1 else axis
        else:
            axis = self._over_torch(sets, device)
        self._made.append(axis)
        return axis

    def close(self) -> None:
        for axis in self._made:
            axis.close()

    def _on_host(self, sets: Sets) -> Axis:
        return self._over_torch(sets, torch.device("cpu")) if self._mpi is None else _over_mpi(self._mpi, sets)

    def _over_torch(self, sets: Sets, device: torch.device) -> Axis:
        from torch.distributed import PrefixStore

        from hvdtrain.comm.torch_axis import TorchAxis, open_store

        if self._store is None:
            self._store = open_store(self._world)
        own = set_of(self._world.rank, sets)
        if len(own) == 1:
            return LocalAxis()
        store = PrefixStore(f"{len(self._made)}.{own[0]}", self._store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        return TorchAxis(backend, store, own.index(self._world.rank), len(own), device)


def _over_mpi(mpi: ModuleType, sets: Sets) -> Axis:
    world = mpi.COMM_WORLD
    own = set_of(world.Get_rank(), sets)
    part = world.Split(own[0], world.Get_rank())  # by the lowest rank, which is in no other set
    if len(own) == 1:
        part.Free()
        return LocalAxis()
    near = part.Split_type(mpi.COMM_TYPE_SHARED)
    on_one_node = near.Get_size() == part.Get_size()
    near.Free()
    if on_one_node and has_room(part):
        return SharedAxis(mpi, part)
    axis = MpiAxis(mpi, part)
    axis.note = f"{PLACE} has no room for memory that ranks share" if on_one_node else ""
    return axis


def _why_not_nccl() -> str:
    """Why tensors of a GPU cannot go over NCCL; empty: they can."""
    from torch.distributed import is_nccl_available

    if shares_gpus():
        return "ranks share a GPU (HVDTRAIN_SHARE_GPUS=1), which NCCL refuses"
    return "" if is_nccl_available() else "this torch has no NCCL"
