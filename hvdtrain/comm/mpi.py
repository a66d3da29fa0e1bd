"""MPI by itself, for work that has no gradients to sum: data preparation. Torch and Horovod stay unloaded."""

import atexit
import ctypes
import os
import re
import socket
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdtrain.comm.abort import end_all_ranks
from hvdtrain.comm.ranks import Ranks
from hvdtrain.comm.world import World, check_sizes
from hvdtrain.errors import EXIT_CRASH, LaunchError, say_from
from hvdtrain.files import exists

# Networks of a host with its own containers and virtual machines: the same addresses on every host, such as Docker's
# 172.17.0.1. Open MPI would take them for ways to the other hosts, reach itself, and wait for ever.
_INNER = re.compile(r"(docker|podman|cni|flannel|virbr|lxcbr|lxdbr|veth)\S*|br-[0-9a-f]{12}")
LEAVE_S = 120.0  # for all ranks to leave, once they have nothing more to do


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


def start_mpi(world: World) -> ModuleType:
    """Initialise MPI (collective) and return ``mpi4py.MPI``. It ends with the process, or the process ends without it.

    Errors: LaunchError where MPI cannot be loaded, or joins another world than the launcher announced.
    """
    # Open MPI spins while it waits: with as many ranks as cores that takes a core away from the work. Yielding costs
    # nothing where cores are free. Read when MPI starts.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # Open MPI from the package index looks for its files where it was built. Its mpirun says so to the ranks; a rank of
    # another launcher would die inside MPI_Init, before the sizes can be compared.
    if exists(Path(sys.prefix, "bin", "orterun_wrapper")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        # Its one-sided transport over libfabric, which nothing here uses, takes a second of every process's end.
        os.environ.setdefault("OMPI_MCA_btl", "^ofi")
        inner = [name for _, name in socket.if_nameindex() if _INNER.fullmatch(name)]
        if inner and "OMPI_MCA_btl_tcp_if_include" not in os.environ:
            os.environ.setdefault("OMPI_MCA_btl_tcp_if_exclude", ",".join(["127.0.0.1/8", *inner]))
    with warnings.catch_warnings():
        # Marks of another MPI's launcher. What came of them is checked below, and said in one line.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            *_, why = str(error).splitlines() or [type(error).__name__]
            raise LaunchError(
                f"{world.launcher} started {world.size} tasks, but MPI cannot be loaded here ({why}): "
                "load the modules that were there when the environment was built, or build it again (make env)",
                world.rank,
            ) from None

    name, version = MPI.get_vendor()
    check_sizes(world, MPI.COMM_WORLD.Get_size(), f"{name} {'.'.join(map(str, version))}")
    _end_in_time(MPI, world.rank)
    return MPI


@cache
def _end_in_time(mpi: ModuleType, rank: int) -> None:
    """Ranks wait for one another in MPI's end, after all else: where one is stopped there, the others shall say so.

    mpi4py would end MPI after Python's threads, in silence. Horovod, which begins later, has ended before.
    """
    begins, ended = threading.Event(), threading.Event()

    def watch() -> None:
        begins.wait()
        if not ended.wait(LEAVE_S):
            say_from(rank, f"not all ranks leave within {LEAVE_S:g} s", past_locks=True)
            os._exit(EXIT_CRASH)

    def end() -> None:
        begins.set()
        if not mpi.Is_finalized():
            try:
                finalize = ctypes.CDLL(mpi.__file__).MPI_Finalize  # lets go of Python's lock, as mpi4py's does not
            except (OSError, AttributeError):
                finalize = mpi.Finalize
            finalize()
        ended.set()

    # Made now: later Pythons make no threads at their end.
    threading.Thread(target=watch, name="hvdtrain-farewell", daemon=True).start()
    atexit.register(end)
