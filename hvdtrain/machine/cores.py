"""Which cores are this rank's? Physical ones, near one another, and no more threads than cores.

A node of two NUMA nodes of four cores with two hardware threads each, four ranks that the launcher left on all of them:

    NUMA node       0                                1
    cores           0,8    1,9    2,10   3,11        4,12   5,13   6,14   7,15
    rank            [ 0        ]  [ 1        ]       [ 2        ]  [ 3        ]         two threads each

Both hardware threads of a core go to its rank: the second one serves the loader and Horovod. A launcher that has bound
the ranks is respected, and where the cores do not divide evenly, or all memory is equally near, the scheduler decides.
"""

import os
import socket
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.comm.ranks import Ranks
from hvdtrain.errors import plural
from hvdtrain.machine.quota import Quota, quota_of_rank, read_limits

# Anyone who set these has a plan for the threads of a process; moving the process would spoil it.
PLACED_BY_USER = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

# Read by libraries when they are loaded: before torch and numpy are imported.
LIBRARY_THREADS = {
    # An OpenMP thread that waits spins first, with gcc's library for a few milliseconds. Where it shares the core with
    # MPI or another rank, it keeps the core from the very thread that it waits for. A short spin still avoids a sleep
    # between two operators. Two threads on two cores of an AMD EPYC, medians, ways in turn:
    #
    #     spins    36,000 parameters: alone, two at once       two blocks of width 256, load of 8
    #     default           108,000       91,000 tokens/s       1.2 updates/s
    #     0                  60,600      151,000                7.9
    #     1,000             105,000       96,000                6.2
    #     10,000            134,000       18,000
    #
    # 1,000 costs nothing on a quiet machine and avoids most of the harm elsewhere. Set 0 on one that is always shared.
    "GOMP_SPINCOUNT": "1000",
    # numpy's own; nothing here multiplies matrices in numpy.
    "OPENBLAS_NUM_THREADS": "1",
}


def set_library_threads(environment: MutableMapping[str, str]) -> None:
    """Put into ``environment`` what the user has not set there (local; before torch is imported).

    With OMP_WAIT_POLICY the user has already said how threads shall wait.
    """
    for name, value in LIBRARY_THREADS.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in environment:
            environment.setdefault(name, value)


@dataclass(frozen=True)
class Topology:
    """``core_of``: hardware thread -> the lowest hardware thread of its physical core; ``node_of``: -> NUMA node.

    A hardware thread that it does not know is a core of its own, on node 0.
    """

    core_of: Mapping[int, int] = field(default_factory=dict)
    node_of: Mapping[int, int] = field(default_factory=dict)

    def cores(self, cpus: set[int]) -> dict[int, set[int]]:
        """Physical core -> those of its hardware threads that are among ``cpus``; in the order of the cores."""
        found = defaultdict(set)
        for cpu in sorted(cpus):
            found[self.core_of.get(cpu, cpu)].add(cpu)
        return dict(sorted(found.items()))

    def node(self, cpu: int) -> int:
        return self.node_of.get(cpu, 0)


@dataclass(frozen=True)
class Cores:
    """``threads`` to compute with; ``bound_to``: hardware threads the rank was put on, or None; ``note``: in words."""

    threads: int
    bound_to: frozenset[int] | None
    note: str


def threads_of_rank(group: Ranks) -> int:
    """Compute threads for this rank (collective): its share of the physical cores and the CPU quota open to it
    and its neighbours.

    OMP_NUM_THREADS, where set, is obeyed. A launcher that binds ranks to cores of their own is respected.
    """
    return take_cores(group, bind=False).threads


def take_cores(group: Ranks, bind: bool = True, topology: Topology | None = None) -> Cores:
    """Find this rank's cores and, with ``bind``, move it there (collective). No more threads than its CPU quota either.

    OMP_NUM_THREADS, where set, is the number of threads; a rank that wants more than it has cores is not bound.
    HVDTRAIN_BIND=none: no rank is bound. Only the calling thread moves, and those that it starts later; Horovod's are
    already running and may use any idle core.
    """
    topology = read_topology() if topology is None else topology
    host, cpus, limits = socket.gethostname(), os.sched_getaffinity(0), read_limits()
    everyone = group.all_gather_object((host, tuple(sorted(cpus)), limits))
    neighbours = [set(theirs) for name, theirs, _ in everyone if name == host]
    quota = quota_of_rank(limits, [theirs for name, _, theirs in everyone if name == host])
    wanted = _number(os.environ.get("OMP_NUM_THREADS", ""))
    may_bind = bind and os.environ.get("HVDTRAIN_BIND", "") != "none"
    if may_bind and not any(name in os.environ for name in PLACED_BY_USER) and all(n == cpus for n in neighbours):
        local_rank = sum(name == host for name, *_ in everyone[: group.rank])
        own = place(cpus, local_rank, len(neighbours), topology)
        if own is not None and (wanted or 1) <= len(topology.cores(own)):
            os.sched_setaffinity(0, own)
            threads, count = _threads(wanted, len(topology.cores(own)), quota)
            nodes = sorted({topology.node(cpu) for cpu in own})
            return Cores(threads, frozenset(own), f"{count}, bound on cores {show(own)} of NUMA node {show(nodes)}")
    threads, count = _threads(wanted, _share(cpus, neighbours, topology), quota)
    return Cores(threads, None, f"{count}, on any of cores {show(cpus)}")


def _threads(wanted: int | None, cores: int, quota: Quota | None) -> tuple[int, str]:
    """How many, and in words; never none."""
    threads, why = wanted or cores, ""
    if quota is not None and quota.of_rank < threads:
        threads, why = wanted or max(1, int(quota.of_rank)), f" {'above' if wanted else 'by'} {quota}"
    return threads, f"{plural(threads, 'thread')} a rank{why}"


def _share(cpus: set[int], neighbours: Sequence[set[int]], topology: Topology) -> int:
    """Physical cores of this rank; one that several ranks may use is divided among them."""
    users = [set(topology.cores(theirs)) for theirs in neighbours]
    share = sum(1 / sum(core in theirs for theirs in users) for core in topology.cores(cpus))
    return max(1, int(share + 1e-9))


def _number(text: str) -> int | None:
    """OMP_NUM_THREADS may be a list for nested regions; the first one counts."""
    first = text.partition(",")[0].strip()
    return max(1, int(first)) if first.isdigit() else None


def place(cpus: set[int], local_rank: int, local_size: int, topology: Topology) -> set[int] | None:
    """Of ``cpus``, which all ranks of the node may use, those that shall be this rank's own.

    None where there is nothing to win or no even division: one rank, one NUMA node, nodes of different size, a number
    of ranks that is no multiple of the nodes (nor they of it), or cores that do not divide among a node's ranks.
    """
    on_node = defaultdict(list)
    for core, threads in topology.cores(cpus).items():
        on_node[topology.node(core)].append(threads)
    nodes = [on_node[number] for number in sorted(on_node)]
    if local_size < 2 or len(nodes) < 2 or len({len(cores) for cores in nodes}) > 1:
        return None
    if len(nodes) % local_size == 0:  # whole nodes for each rank
        share = len(nodes) // local_size
        mine = [threads for cores in nodes[local_rank * share : (local_rank + 1) * share] for threads in cores]
    elif local_size % len(nodes) == 0 and len(nodes[0]) % (ranks := local_size // len(nodes)) == 0:
        share = len(nodes[0]) // ranks
        first = local_rank % ranks * share
        mine = nodes[local_rank // ranks][first : first + share]
    else:
        return None
    return set().union(*mine)


def show(numbers: Sequence[int] | set[int]) -> str:
    """Numbers as Linux lists them: {0, 1, 2, 8} is ``0-2,8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_topology(system: Path = Path("/sys/devices/system")) -> Topology:
    """What Linux says about this machine; where it says nothing (some containers), an empty one."""
    core_of, node_of = {}, {}
    for folder in system.glob("cpu/cpu[0-9]*"):
        siblings = _read_list(folder / "topology" / "thread_siblings_list")
        if siblings:
            core_of[int(folder.name[3:])] = min(siblings)
    for folder in system.glob("node/node[0-9]*"):
        node_of.update(dict.fromkeys(_read_list(folder / "cpulist"), int(folder.name[4:])))
    return Topology(core_of, node_of)


def _read_list(path: Path) -> list[int]:
    """Linux's lists: ``0-3,8`` is 0, 1, 2, 3, 8. Empty where it cannot be read."""
    try:
        ranges = [part.partition("-") for part in path.read_text().strip().split(",") if part]
        return [cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)]
    except (OSError, ValueError):
        return []
