"""Over a slow cable two ranks send to each other in the time of one: on a real cable, which goes both ways at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from not_here import require_hosts

from hvdtrain.machine.link import Link, slow_link

ROOT = Path(__file__).resolve().parents[2]
MBIT_PER_S, MIB = 200, 16  # a message takes 0.67 s: long beside what else a busy machine does, and beside its buffers
TRIES = 4  # the best counts: a busy machine holds up some, one direction at a time holds up all (a sum: 1.5 times)
_RANK = f"""
import json, time
import numpy as np
from hvdtrain.comm.mpi import start_mpi
from hvdtrain.comm.world import detect_world

mpi = start_mpi(detect_world())
world, numbers = mpi.COMM_WORLD, np.zeros({MIB} << 18, dtype=np.float32)
other, came = 1 - world.rank, np.zeros_like(numbers)

def seconds(work):
    world.Barrier()
    began = time.perf_counter()
    work()
    return world.allreduce(time.perf_counter() - began, mpi.MAX)

one_way = lambda: world.Send(numbers, other) if world.rank else world.Recv(came, other)
ways = one_way, lambda: world.Sendrecv(numbers, other, 0, came), lambda: world.Allreduce(mpi.IN_PLACE, numbers)
for way in ways:
    way()  # connects, and sees its buffers made
times = [min(seconds(way) for _ in range({TRIES})) for way in ways]
if not world.rank:
    print(json.dumps(times))
"""


def times(folder: Path) -> list[float]:
    """Of a message one way, of one each way, of a sum."""
    with slow_link(("n1", "n2"), Link(1e6 * MBIT_PER_S), folder) as (_, mpirun):
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        done = subprocess.run(
            [*mpirun, "-np", "2", "--bind-to", "none", sys.executable, "-c", _RANK],
            env={**os.environ, **root}, cwd=ROOT, text=True, capture_output=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_messages_and_sums_use_both_directions(tmp_path: Path):
    require_hosts()
    one_way, both_ways, a_sum = times(tmp_path)
    assert one_way > 0.9 * 8e-6 * (MIB << 20) / MBIT_PER_S  # the cable is what it was made
    assert both_ways < 1.25 * one_way
    assert a_sum < 1.25 * one_way
