"""What an axis costs between two ranks in memory: sums, gathers and scattered sums of 4 KB to 16 MB.

All ways in one process, in turn: ours over shared memory, MPI and Gloo; MPI's own Allreduce, Horovod's, and that of
torch's Gloo, which sum in an order of their own.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

SIZES = {"4 KB": 1 << 12, "64 KB": 1 << 16, "1 MB": 1 << 20, "16 MB": 1 << 24}
RANKS, ROUNDS = 2, 3
MOST_TURNS, SECONDS = 40, 0.5  # of a call with a size, in one round
TOGETHER_BYTES = 1 << 22  # calls follow one another without a barrier until so much has been summed, as in a layer


def measure() -> None:
    """On each rank; rank 0 prints medians in ms by operation, size and way."""
    import torch
    from mpi4py import MPI

    from hvdtrain.comm.mpi_axis import MpiAxis
    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.shared_axis import SharedAxis
    from hvdtrain.comm.torch_axis import TorchAxis, open_store
    from hvdtrain.comm.world import detect_world

    torch.set_num_threads(1)
    world, cpu = detect_world(), torch.device("cpu")
    with open_group(world) as group:
        comm, store = MPI.COMM_WORLD, open_store(group)
        axes = [SharedAxis(MPI, comm.Dup()), MpiAxis(MPI, comm.Dup())]
        axes.append(TorchAxis("gloo", store, group.rank, group.size, cpu))
        theirs: dict[str, Callable] = {
            "MPI Allreduce": lambda tensor: comm.Allreduce(MPI.IN_PLACE, tensor),
            "Horovod allreduce": lambda tensor: group.all_reduce_sum(tensor, f"bench.{len(tensor)}"),
            "torch gloo allreduce": lambda tensor: axes[2]._all.allreduce([tensor]).wait(),
        }
        found = {}
        for size, count in SIZES.items():
            tensor = torch.zeros(count // 4)
            part = tensor[: len(tensor) // group.size].clone()
            calls = _calls(axes, theirs, tensor, part)
            together = max(1, min(50, TOGETHER_BYTES // count))
            for (operation, way), times in _in_turn(calls, comm, together).items():
                found[f"{operation}|{size}|{way}"] = 1e3 * statistics.median(times)
        for axis in axes:
            axis.close()
        if group.rank == 0:
            print(json.dumps(found), flush=True)


def _calls(axes: Sequence, theirs: dict[str, Callable], tensor: object, part: object) -> dict[tuple, Callable]:
    calls: dict[tuple, Callable] = {("sum", axis.backend): partial(axis.sum, tensor) for axis in axes}
    calls |= {("sum", name): partial(call, tensor) for name, call in theirs.items()}
    calls |= {("gather", axis.backend): partial(axis.gather, part, 0) for axis in axes}
    return calls | {("scatter_sum", axis.backend): partial(axis.scatter_sum, tensor, 0) for axis in axes}


def _in_turn(calls: dict, comm: object, together: int) -> dict:
    times = {name: [] for name in calls}
    began, turns = time.perf_counter(), 0
    while turns < 3 or comm.bcast(turns < MOST_TURNS and time.perf_counter() - began < SECONDS * len(calls)):
        for name, call in calls.items():
            comm.Barrier()
            call()  # the ranks do not leave a barrier together
            started = time.perf_counter()
            for _ in range(together):
                call()
            if turns:  # the first allocates
                times[name].append((time.perf_counter() - started) / together)
        turns += 1
    return times


def run() -> dict[str, float]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["mpirun", "-np", str(RANKS), "--oversubscribe", "--bind-to", "none", sys.executable, __file__, "--rank"],
        env={**os.environ, **root, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    from table import write

    rounds = [run() for _ in range(ROUNDS)]
    found = {tuple(name.split("|")): statistics.median(one[name] for one in rounds) for name in rounds[0]}
    ways = dict.fromkeys((operation, way) for operation, _, way in found)
    rows = [
        [operation, way, *(f"{found[operation, size, way]:.3g}" for size in SIZES)]
        for operation, way in sorted(ways, key=lambda one: ("sum", "gather", "scatter_sum").index(one[0]))
    ]
    note = (
        "ms of a call on rank 0, fp32, in blocks of up to 50 calls (4 MiB) one behind the other. Of a gather the size "
        f"of the whole. Each size: all ways in turn, up to {MOST_TURNS} blocks; medians of {ROUNDS} rounds' medians. "
        "One thread a rank."
    )
    head = ["operation", "way", *SIZES]
    print(write("axis", "An axis between two ranks in memory", "make bench BENCH=axis", head, rows, note))


if __name__ == "__main__":
    measure() if sys.argv[1:2] == ["--rank"] else main()
