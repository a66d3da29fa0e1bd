"""MPI by itself, for work that has no gradients to sum: data preparation. Torch and Horovod stay unloaded."""

import atexit
import ctypes
import os
import re
import socket
import sys
import threading
import warnings
from collections.abc import MutableMapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdtrain.comm.abort import end_all_ranks
from hvdtrain.comm.open_mpi import allow_choice
from hvdtrain.comm.ranks import Ranks
from hvdtrain.comm.world import World, check_sizes
from hvdtrain.errors import EXIT_CRASH, LaunchError, say_from
from hvdtrain.files import exists

# A host's networks with its own containers and virtual machines. They have the same addresses on every host (Docker's
# is 172.17.0.1): Open MPI would take one for a way to the other hosts, reach itself, and wait for ever.
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
    """Start MPI and return ``mpi4py.MPI`` (collective).

    At the process's exit all ranks end MPI together. Where one does not come, the others exit without it after LEAVE_S.
    Errors: LaunchError where MPI cannot be loaded, or joins another world than the launcher announced.
    """
    _set_up_open_mpi(os.environ)
    mpi = _load(world)
    name, version = mpi.get_vendor()
    check_sizes(world, mpi.COMM_WORLD.Get_size(), f"{name} {'.'.join(map(str, version))}")
    _end_in_time(mpi, world.rank)
    return mpi


def _set_up_open_mpi(env: MutableMapping[str, str]) -> None:
    """Put into ``env`` what Open MPI reads when it starts, where the user has not set it. Other MPIs ignore it."""
    # A rank that waits spins. With as many ranks as cores it takes a core away from the work; yielding costs nothing
    # where cores are free.
    env.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # Over TCP without "put", by which a large message is one piece: while a rank writes it, it reads nothing, and what
    # two ranks exchange takes the time of both directions one after the other, twice what the cable needs.
    env.setdefault("OMPI_MCA_btl_tcp_flags", "send,inplace,need-ack,need-csum,hetero-rdma")
    allow_choice(env)
    # Open MPI from the package index looks for its files where it was built. Its own mpirun tells the ranks the right
    # place; a rank of another launcher would die in MPI_Init, before the sizes can be compared.
    if exists(Path(sys.prefix, "bin", "orterun_wrapper")):
        env.setdefault("OPAL_PREFIX", sys.prefix)
        # Nothing here uses its one-sided transport over libfabric, and closing that takes a second.
        env.setdefault("OMPI_MCA_btl", "^ofi")
        inner = [name for _, name in socket.if_nameindex() if _INNER.fullmatch(name)]
        if inner and "OMPI_MCA_btl_tcp_if_include" not in env:
            env.setdefault("OMPI_MCA_btl_tcp_if_exclude", ",".join(["127.0.0.1/8", *inner]))


def _load(world: World) -> ModuleType:
    """Import ``mpi4py.MPI``, which starts MPI. Errors: LaunchError."""
    with warnings.catch_warnings():
        # mpi4py warns of the variables of another MPI's launcher. start_mpi checks what came of them, in one line.
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
    return MPI


@cache
def _end_in_time(mpi: ModuleType, rank: int) -> None:
    """End MPI at the process's exit; where that takes longer than LEAVE_S, say so and exit without it.

    Ranks wait for one another in MPI's end, for ever if one is stopped. mpi4py would end MPI after Python has ended its
    threads, so that none could speak. Horovod starts after MPI, and exit handlers run in reverse: it has ended before.
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
                finalize = ctypes.CDLL(mpi.__file__).MPI_Finalize  # lets ``watch`` run; mpi4py's keeps Python's lock
            except (OSError, AttributeError):
                finalize = mpi.Finalize
            finalize()
        ended.set()

    # Started now: Python 3.12 and later start no thread at exit.
    threading.Thread(target=watch, name="hvdtrain-farewell", daemon=True).start()
    atexit.register(end)
