"""What a wire format costs and saves: four buckets of 16 MiB summed over two ranks and four, through memory and over
1 Gbit/s.

The slow links are between hosts of their own on this machine, on cables that `tc` limits (needs root).
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
FOUR = ("n1", "n2", "n3", "n4")


def measure(forms: list[str]) -> None:
    """On each rank: seconds of a step's sums for every form in turn; rank 0 prints them."""
    import torch

    from hvdtrain.comm import messages
    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.world import detect_world
    from hvdtrain.sync.wire import make_wire

    torch.set_num_threads(1)
    if os.environ.get("BY") == "collectives":
        messages.MOST_RANKS = 0
    with open_group(detect_world(), topology="flat") as group:
        if os.environ.get("BY") == "all to all":
            group.nodes = None
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
    words = [*mpirun, "--bind-to", "none"]
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


def ways(mpirun: list[str], has_nodes: bool) -> dict[str, float]:
    """Each way's seconds: fp32 by Open MPI's ring and the wires in one run, then the others. has_nodes: of several
    ranks.
    """
    by_ring = run(mpirun, ["fp32", "bf16", "fp16"], HVDTRAIN_ALLREDUCE="ring")
    own = run(mpirun, ["fp32"], HVDTRAIN_ALLREDUCE="default")
    fused = run(mpirun, ["fp32"], HVDTRAIN_ALLREDUCE="default", HOROVOD_FUSION_THRESHOLD=str(128 << 20))
    collectives = run(mpirun, ["bf16"], BY="collectives")
    flat = run(mpirun, ["bf16"], BY="all to all") if has_nodes else {}
    return {
        "fp32, Open MPI's ring": by_ring["fp32"],
        "fp32, Open MPI's choice": own["fp32"],
        "fp32, its choice, Horovod's fusion of 128 MiB": fused["fp32"],
        "bf16": by_ring["bf16"],
        "fp16": by_ring["fp16"],
        "bf16, Horovod's collectives": collectives["bf16"],
        **({"bf16, every rank to every other": flat["bf16"]} if flat else {}),
    }


def main() -> None:
    from table import write

    from hvdtrain.machine.link import Link, slow_link

    mib = BUCKETS * BUCKET_MIB
    found: dict[tuple[str, str], list[float]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        slow_link(HOSTS, Link(1e9), Path(name, "two")) as (_, over_two),
        slow_link(FOUR, Link(1e9), Path(name, "four")) as (_, over_four),
    ):
        # Two ranks on each of two hosts, which talk through memory.
        pairs = {f"{HOSTS[0]}:1,{HOSTS[1]}:1": f"{HOSTS[0]}:2,{HOSTS[1]}:2", "tcp,self": "tcp,self,vader"}
        places = {
            "2, memory": ["mpirun", "--oversubscribe", "-np", "2"],
            "2, 1 Gbit/s": over_two,
            "4, 1 Gbit/s": over_four,
            "2 x 2, 1 Gbit/s": [pairs.get(word, word) for word in over_two],
        }
        chosen = sys.argv[1:] or places
        for _ in range(ROUNDS):
            for place, mpirun in ((place, places[place]) for place in chosen):
                seconds_of = ways(mpirun, has_nodes=" x " in place)
                for form, seconds in seconds_of.items():
                    found.setdefault((place, form), []).append(seconds)
                    ratios.setdefault((place, form), []).append(seconds_of["fp32, Open MPI's ring"] / seconds)
    rows = [
        [place, form, f"{1e3 * statistics.median(seconds) / mib:.2f}", f"{statistics.median(ratios[place, form]):.2f}"]
        for (place, form), seconds in found.items()
    ]
    note = (
        f"{BUCKETS} buckets of {BUCKET_MIB} MiB, started one after the other and then waited for; nothing else is "
        f"computed. One thread a rank. Median of {ROUNDS} rounds of {REPEATS} steps, the ways in turn. The links are "
        "those of hosts on this machine with `tc tbf` at 1 Gbit/s each way, MPI over TCP. The ideal of a ring of fp32 "
        "over four ranks is 12.6 ms per MiB."
    )
    head = ["ranks, between them", "wire", "ms per MiB of gradients", "speed / ring"]
    print(write("wire", "Wire formats of the gradients' sum", "make bench BENCH=wire", head, rows, note))


if __name__ == "__main__":
    measure(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
