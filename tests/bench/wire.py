"""What a wire format costs and saves: four buckets of 16 MiB summed over two ranks, through memory and over 1 Gbit/s.

The slow link is between two hosts of their own on this machine, on cables that `tc` limits (needs root).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUCKETS, BUCKET_MIB = 4, 16
HOSTS = ("n1", "n2")
ROUNDS, REPEATS = 3, 3


def measure(forms: list[str]) -> None:
    """On each rank: seconds of a step's sums for every form in turn; rank 0 prints them."""
    import torch

    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.world import detect_world
    from hvdtrain.sync.wire import make_wire

    torch.set_num_threads(1)
    with open_group(detect_world()) as group:
        flats = [torch.randn(BUCKET_MIB << 18) for _ in range(BUCKETS)]
        wires = {form: make_wire(form, group) for form in forms}
        times: dict[str, list[float]] = {form: [] for form in forms}
        for repeat in range(1 + REPEATS):  # the first allocates
            for form, wire in wires.items():
                for flat in flats:
                    flat.fill_(0.5)
                group.barrier()
                started = time.perf_counter()
                pending = [wire.start(flat, f"{form}.{number}") for number, flat in enumerate(flats)]
                for one in pending:
                    one.wait()
                if repeat:
                    times[form].append(time.perf_counter() - started)
        if group.rank == 0:
            print(json.dumps(times), flush=True)


def run(mpirun: list[str], forms: list[str], **knobs: str) -> dict[str, float]:
    """Median seconds of a step of each form."""
    words = [*mpirun, "-np", "2", "--bind-to", "none"]
    words += [word for name, value in knobs.items() for word in ("-x", f"{name}={value}")]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*words, sys.executable, str(Path(__file__).resolve()), "--rank", *forms],
        env={**os.environ, **root, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    times = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {form: statistics.median(values) for form, values in times.items()}


def main() -> None:
    from table import write

    from hvdtrain.machine.link import Link, slow_link

    mib = BUCKETS * BUCKET_MIB
    found: dict[tuple[str, str], list[float]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name, slow_link(HOSTS, Link(1e9), Path(name)) as (_, over_link):
        for _ in range(ROUNDS):
            for place, mpirun in (("memory", ["mpirun", "--oversubscribe"]), ("1 Gbit/s", over_link)):
                ours = run(mpirun, ["fp32", "bf16", "fp16"])
                fused = run(mpirun, ["fp32"], HOROVOD_FUSION_THRESHOLD=str(128 << 20))["fp32"]
                for form, seconds in {**ours, "fp32, Horovod's fusion of 128 MiB": fused}.items():
                    found.setdefault((place, form), []).append(seconds)
                    ratios.setdefault((place, form), []).append(ours["fp32"] / seconds)
    rows = [
        [place, form, f"{1e3 * statistics.median(seconds) / mib:.2f}", f"{statistics.median(ratios[place, form]):.2f}"]
        for (place, form), seconds in found.items()
    ]
    note = (
        f"{BUCKETS} buckets of {BUCKET_MIB} MiB, started one after the other and then waited for; nothing else is "
        f"computed. One thread a rank. Median of {ROUNDS} rounds of {REPEATS} steps, the forms in turn. The link is "
        "that of two hosts on this machine with `tc tbf` at 1 Gbit/s each way, MPI over TCP."
    )
    head = ["between two ranks", "wire", "ms per MiB of gradients", "speed / fp32"]
    print(write("wire", "Wire formats of the gradients' sum", "make bench BENCH=wire", head, rows, note))


if __name__ == "__main__":
    measure(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
