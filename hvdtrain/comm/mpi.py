"""MPI by itself, for work that has no gradients to sum: data preparation. Torch and Horovod stay unloaded."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdtrain.comm.abort import end_all_ranks
from hvdtrain.comm.ranks import Ranks
from hvdtrain.comm.world import World, check_sizes
from hvdtrain.errors import LaunchError


def start_mpi(world: World) -> ModuleType:
    """Initialise MPI (collective) and return ``mpi4py.MPI``.

    Errors: LaunchError where MPI joins another world than the launcher announced.
    """
    # Open MPI spins while it waits: with as many ranks as cores that takes a core away from the work. Yielding costs
    # nothing where cores are free. Read when MPI starts.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # Open MPI from the package index looks for its files where it was built. Its mpirun says so to the ranks; a rank of
    # another launcher would die inside MPI_Init, before the sizes can be compared.
    if Path(sys.prefix, "bin", "orterun_wrapper").exists():
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        # Its one-sided transport over libfabric, which nothing here uses, takes a second of every process's end.
        os.environ.setdefault("OMPI_MCA_btl", "^ofi")
    from mpi4py import MPI

    check_sizes(world, MPI.COMM_WORLD.Get_size(), "MPI")
    return MPI


class MpiRanks(Ranks):
    """All ranks of the job over MPI alone. Making one is a collective.

    Errors: LaunchError where the launcher brings no MPI.
    """

    def __init__(self, world: World):
        if world.launcher.endswith("--gloo"):
            raise LaunchError(f"{world.launcher} brings no MPI; start with mpirun or srun --mpi=pmix", world.rank)
        self._mpi = start_mpi(world)
        self._comm = self._mpi.COMM_WORLD.Dup()
        self.rank, self.size = world.rank, world.size

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def close(self) -> None:
        self._comm.Free()

    def abort(self, exit_code: int) -> None:
        end_all_ranks(self._mpi, exit_code)
