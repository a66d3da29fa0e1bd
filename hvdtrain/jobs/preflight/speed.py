"""How fast is each rank, compared with the others? A matrix product, copies in memory, an all-reduce.

Others may be using the machine, and a node is not bad because of one slow moment: where a rank looks slow, all measure
again, up to five times, and each rank's best counts.

An all-reduce is as slow as its slowest link, mostly for all ranks alike. So it names a node only where that node alone
is late. The table shows the speed that all have in common, for the user to compare with what the network should do.
"""

import time
from collections.abc import Callable, Sequence

import torch

from hvdtrain.comm.group import Group
from hvdtrain.jobs.preflight.findings import Look, slow
from hvdtrain.machine.cores import threads_of_rank

_TRIES = 5
_COPY_BYTES = 64 << 20  # beyond what most caches hold; two of them for each rank
_REDUCE_BYTES = 16 << 20
_SECONDS = 0.2  # of each measurement
Speeds = dict[str, float]  # GFLOP/s or GB/s
_UNITS = {"matrix product": "GFLOP/s"}


def measure_speeds(node: str, factor: float, group: Group) -> dict[str, list[Look]]:
    """node -> its looks, the same on all ranks (collective)."""
    nodes = group.all_gather_object(node)
    torch.set_num_threads(threads_of_rank(group))
    devices = _devices(nodes[: group.rank].count(node), nodes.count(node))
    problem = ""

    def alone() -> Speeds:
        nonlocal problem
        try:
            return _measure(devices)
        except Exception as error:  # a broken GPU, or one whose memory another process still holds
            problem = f"rank {group.rank}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return {}

    best = _best_of(alone, factor, group)
    problems = group.all_gather_object(problem)
    if group.size > 1 and not any(problems):
        for so_far, now in zip(best, _best_of(lambda: _all_reduce(group, devices[0]), factor, group), strict=True):
            so_far.update(now)
    looks = judge_speeds(nodes, best, factor)
    for owner, said in zip(nodes, problems, strict=True):
        if said:
            looks[owner].append(Look("computing", "", said))
    return looks


def _best_of(measure: Callable[[], Speeds], factor: float, group: Group) -> list[Speeds]:
    """Each rank's best, measured again while any rank looks slow (collective)."""
    best = [dict[str, float]() for _ in range(group.size)]
    for _ in range(_TRIES):
        group.barrier()  # ranks of a node measure at the same time: each finds its share of the machine
        for so_far, now in zip(best, group.all_gather_object(measure()), strict=True):
            so_far.update({what: max(speed, so_far.get(what, 0.0)) for what, speed in now.items()})
        if not any(slow_ranks(best, factor).values()):
            break
    return best


def slow_ranks(speeds: Sequence[Speeds], factor: float) -> dict[str, list[int]]:
    """What was measured -> the ranks that are slow in it. Only those that measured the same are compared."""
    found = {}
    for what in dict.fromkeys(what for of_rank in speeds for what in of_rank):
        ranks = [rank for rank, of_rank in enumerate(speeds) if what in of_rank]
        found[what] = [ranks[at] for at in slow([speeds[rank][what] for rank in ranks], factor)]
    return found


def judge_speeds(nodes: Sequence[str], speeds: Sequence[Speeds], factor: float) -> dict[str, list[Look]]:
    """nodes: of each rank. A node's figure is that of its slowest rank."""
    looks: dict[str, list[Look]] = {node: [] for node in nodes}
    for what, culprits in slow_ranks(speeds, factor).items():
        least: dict[str, int] = {}
        for rank, node in enumerate(nodes):
            if what in speeds[rank] and (node not in least or speeds[rank][what] < speeds[least[node]][what]):
                least[node] = rank
        for node, rank in least.items():
            found = f"{speeds[rank][what]:.4g} {_UNITS.get(what, 'GB/s')}"
            problem = f"rank {rank} is slower than the ranks' median by more than {factor:g} times"
            looks[node].append(Look(what, found, problem if rank in culprits else "", amount=speeds[rank][what]))
    return looks


def _devices(rank_of_node: int, ranks_per_node: int) -> list[torch.device]:
    """A rank among several measures its own GPU, one that is alone on its node each that it sees."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        return [torch.device("cpu")]
    own = [rank_of_node % gpus] if ranks_per_node > 1 else range(gpus)
    return [torch.device("cuda", number) for number in own]


def _measure(devices: Sequence[torch.device]) -> Speeds:
    """This rank's speeds, of its slowest device."""
    found: Speeds = {}
    for device in devices:
        work = _on_cpu() if device.type == "cpu" else _on_gpu(device)
        for what, speed in work.items():
            found[what] = min(speed, found.get(what, speed))
    return found


def _on_cpu() -> Speeds:
    cpu = torch.device("cpu")
    # Small: done within one turn on a core, whoever else wants it.
    return {"matrix product": _matrix_product(512, torch.float32, cpu), "memory copy": _copy(cpu, cpu)}


def _on_gpu(device: torch.device) -> Speeds:
    torch.cuda.set_device(device)
    return {
        "matrix product": _matrix_product(4096, torch.float16, device),
        "memory copy": _copy(device, device),
        "host to GPU": _copy(torch.device("cpu"), device),
    }


def _matrix_product(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s."""
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best_s(lambda: left @ right, device) / 1e9


def _copy(source: torch.device, target: torch.device) -> float:
    """GB/s that are copied, each byte counted once."""
    content = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=source)
    if source != target:
        content = content.pin_memory()
    copy = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=target)
    return _COPY_BYTES / _best_s(lambda: copy.copy_(content, non_blocking=True), target) / 1e9


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of many calls: the others were interrupted, which says nothing of the machine."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    until = time.perf_counter() + _SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first one allocates, or makes its kernel


def _all_reduce(group: Group, device: torch.device) -> Speeds:
    """GB/s of the bus, as NCCL's tests count: 2 (p - 1) / p of the bytes pass each rank (collective)."""
    if group.backend != "nccl":
        device = torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tensor = torch.zeros(_REDUCE_BYTES // 4, device=device)
    group.all_reduce_sum(tensor, "preflight")
    times = []
    for _ in range(5):
        group.barrier()
        began = time.perf_counter()
        group.all_reduce_sum(tensor, "preflight")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return {"all-reduce": 2 * (group.size - 1) / group.size * _REDUCE_BYTES / min(times) / 1e9}
