"""By which algorithm Open MPI sums gradients: the one of its own choice, or its ring, where that is faster.

Its choice follows tables that were measured on fast networks: between four hosts at 1 Gbit/s it took 1.7 times as long
as the ring. So where ranks are on several hosts, both are measured before Horovod starts.

    environment, before MPI starts    coll_tuned_use_dynamic_rules=1        changes nothing by itself
    any time (MPI_T)                  coll_tuned_allreduce_algorithm=4      of every communicator made from now on
    Horovod starts                    ... which its communicators are

What the user has set of these, by mpirun, the environment or a file of Open MPI's, stays.
"""

import ctypes
import os
import socket
import statistics
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hvdtrain.errors import LaunchError

WISH = "HVDTRAIN_ALLREDUCE"
WISHES = ("default", "ring", "measure")
RULES = "OMPI_MCA_coll_tuned_use_dynamic_rules"
_ALGORITHM, _ITS_CHOICE, _RING = b"coll_tuned_allreduce_algorithm", 0, 4
_MIB, _SUMS = 4, 1000  # what is measured: a bucket, and the sums of a step, which a ring makes slower
_ROUNDS, _ENOUGH_S = 3, 1.0
_WORTH = 0.9  # of its choice's time: a ring that saves less is not worth other bits


@dataclass(frozen=True)
class AllReduce:
    """Who sums gradients over MPI. default_ms, ring_ms: of 4 MiB and a small sum, on the slowest rank; None: the user
    has decided.
    """

    algorithm: str
    default_ms: float | None = None
    ring_ms: float | None = None

    @property
    def about(self) -> str:
        if self.default_ms is None:
            return f"all-reduce: {self.algorithm} ({WISH})"
        return (
            f"all-reduce: {self.algorithm}; {_MIB} MiB take {self.default_ms:.3g} ms by Open MPI's own choice, "
            f"{self.ring_ms:.3g} ms by its ring"
        )


def allow_choice(env: MutableMapping[str, str]) -> None:
    """Before MPI starts: let its algorithms be chosen later, where the user has not chosen (local)."""
    if not _users(env):
        env.setdefault(RULES, "1")


def choose_all_reduce(mpi: ModuleType, env: Mapping[str, str] = os.environ) -> AllReduce | None:
    """Choose for all communicators that are made from now on (collective over all ranks; before Horovod starts).

    HVDTRAIN_ALLREDUCE says which, or to measure in any case; without it both are measured where ranks are on several
    hosts. None: there was nothing to choose. Errors: LaunchError, on all ranks.
    """
    variable = None if _users(env) else _Variable.find(mpi)
    own = (env.get(WISH), variable is not None and variable.read() == _ITS_CHOICE, socket.gethostname())
    wishes, can_choose, hosts = zip(*mpi.COMM_WORLD.allgather(own), strict=True)
    wish = wishes[0]
    if set(wishes) - {None, *WISHES} or len(set(wishes)) > 1:
        said = sorted({wish or "unset" for wish in wishes})
        raise LaunchError(f"{WISH}={' or '.join(said)}: expected one of {', '.join(WISHES)}, on all ranks alike")
    if variable is None or not all(can_choose) or wish == "default" or (wish is None and len(set(hosts)) == 1):
        return None
    if wish == "ring":
        variable.write(_RING)
        return AllReduce("ring")
    default_s, ring_s = _measure(mpi, variable)
    is_ring = ring_s < _WORTH * default_s
    variable.write(_RING if is_ring else _ITS_CHOICE)
    return AllReduce("ring" if is_ring else "default", round(1e3 * default_s, 3), round(1e3 * ring_s, 3))


def _users(env: Mapping[str, str]) -> list[str]:
    """What the user has set of Open MPI's collectives."""
    names = [name for name in env if name.startswith("OMPI_MCA_coll") and name != RULES]
    return names + [RULES] * (env.get(RULES, "1") != "1")


def _measure(mpi: ModuleType, variable: "_Variable") -> tuple[float, float]:
    """Median seconds by its own choice and by the ring, the slowest rank's; the same on all."""
    import numpy as np

    bucket, sums = np.zeros(_MIB << 18, dtype=np.float32), np.zeros(_SUMS)
    comms = []
    for algorithm in (_ITS_CHOICE, _RING):
        variable.write(algorithm)
        comms.append(mpi.COMM_WORLD.Dup())

    def seconds(comm: Any, count: int) -> float:
        comm.Barrier()
        began = time.perf_counter()
        comm.Allreduce(mpi.IN_PLACE, bucket[:count])
        comm.Allreduce(mpi.IN_PLACE, sums)
        return mpi.COMM_WORLD.allreduce(time.perf_counter() - began, mpi.MAX)

    rounds: list[list[float]] = []
    for comm in comms:
        seconds(comm, 1 << 14)  # the ranks connect
    while len(rounds) < _ROUNDS and sum(map(sum, rounds)) < _ENOUGH_S:
        rounds.append([seconds(comm, len(bucket)) for comm in comms])
    for comm in comms:
        comm.Free()
    default_s, ring_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return default_s, ring_s


class _Variable:
    """A number of Open MPI's that may change while it runs (MPI 4.0, 15.3: control variables)."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p):
        self._library, self._handle = library, handle

    @classmethod
    def find(cls, mpi: ModuleType) -> "_Variable | None":
        """None: this MPI has none, or does not let it be changed."""
        if mpi.get_vendor()[0] != "Open MPI":
            return None
        try:
            library = ctypes.CDLL(mpi.__file__)
            start, find, open_ = (
                getattr(library, f"MPI_T_{name}") for name in ("init_thread", "cvar_get_index", "cvar_handle_alloc")
            )
        except (OSError, AttributeError):
            return None
        number, handle = ctypes.c_int(), ctypes.c_void_p()
        if start(int(mpi.THREAD_MULTIPLE), ctypes.byref(number)) or find(_ALGORITHM, ctypes.byref(number)):
            return None
        if open_(number, None, ctypes.byref(handle), ctypes.byref(ctypes.c_int())):
            return None
        found = cls(library, handle)
        return found if found.write(found.read()) else None

    def read(self) -> int:
        value = ctypes.c_int(-1)
        self._library.MPI_T_cvar_read(self._handle, ctypes.byref(value))
        return value.value

    def write(self, value: int) -> bool:
        """Has it taken the value?"""
        return self._library.MPI_T_cvar_write(self._handle, ctypes.byref(ctypes.c_int(value))) == 0
