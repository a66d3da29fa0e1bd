"""What a checkpoint costs the training: saved at once, or on a thread beside it. A GPT of 50 M parameters with AdamW.

make bench BENCH=checkpoint            ROUNDS=3; RUN_DIR=/scratch/x: the file system to write to

One process and two ranks, of one thread each: with a core to spare for the thread that writes, and without. Each round
trains some steps without a save, then some with one of each kind, in turn. `held up` is the time that the loop spends
inside the saver; `lost` also counts the steps that became slower because the thread writes: how much longer the same
number of steps took than without.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = int(os.environ.get("ROUNDS", "3"))
STEPS = 8  # more than a save takes
SIZES = {"layers": 10, "heads": 10, "width": 640, "context": 64, "bias": False}
VOCABULARY, ROWS = 1024, 1


def measure(folder: Path, threads: int, device: str, sizes: dict, vocabulary: int) -> None:
    """On each rank: seconds of every window of steps and of what the saver took of it; rank 0 prints them."""
    import torch
    from in_halves import InHalves

    from hvdtrain.checkpoint.manifest import Progress
    from hvdtrain.checkpoint.saver import Saver
    from hvdtrain.checkpoint.state import run_state
    from hvdtrain.checkpoint.writer import CheckpointOptions
    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.world import detect_world
    from hvdtrain.data.batch import Batch
    from hvdtrain.models.decoder import Decoder
    from hvdtrain.models.options import TransformerOptions
    from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
    from hvdtrain.slices import whole_slices
    from hvdtrain.sync import SyncOptions
    from hvdtrain.tasks.lm import LanguageModel

    with open_group(detect_world()) as group:
        torch.set_num_threads(threads)
        model = Decoder(TransformerOptions(**sizes), vocabulary)
        model.initialise(1)
        model.to(device)
        optimizer = make_optimizer(model.parameters(), OptimOptions(lr=1e-6))
        plan, task = InHalves(model, group, SyncOptions(), "fp32", seed=1), LanguageModel()
        windows = torch.randint(vocabulary, (ROWS, sizes["context"] + 1))
        batch = Batch(windows[:, :-1], windows[:, 1:].contiguous(), windows[:, 1:].numel()).to(torch.device(device))
        kinds = {"none": None, "at once": False, "asynchronous": True}
        savers = {
            kind: Saver(folder / kind, group, CheckpointOptions(asynchronous=flag, keep_last=1))
            for kind, flag in kinds.items()
            if flag is not None
        }
        found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
        number = 0

        wait = torch.cuda.synchronize if device == "cuda" else lambda: None

        def step() -> None:
            plan.forward_backward([batch], task, number)
            plan.finish(1.0)
            plan.step(optimizer, 1e-6)

        step()
        for turn in range(1 + ROUNDS):  # the first makes buffers and states
            for kind in kinds:
                saver = savers.get(kind)
                number += 1
                group.barrier()
                wait()
                started = time.perf_counter()
                if saver is not None:
                    saver.save(run_state(whole_slices(model, group), optimizer), Progress(step=number))
                for _ in range(STEPS):
                    step()
                    if saver is not None:
                        saver.poll()
                wait()
                elapsed = time.perf_counter() - started
                if saver is not None:
                    saver.drain()  # nothing where the steps were enough
                if turn:
                    found[kind].append((elapsed, *((saver.blocked_s, saver.save_s) if saver else (0.0, 0.0))))
        if group.rank == 0:
            print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "found": found}), flush=True)


def run(
    launcher: list[str], threads: int, device: str = "cpu", sizes: dict = SIZES, vocabulary: int = VOCABULARY
) -> dict:
    words = json.dumps([threads, device, sizes, vocabulary])
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(dir=os.environ.get("RUN_DIR")) as name:
        done = subprocess.run(
            [*launcher, sys.executable, str(Path(__file__).resolve()), "--rank", name, words],
            env={**os.environ, **root, "PATH": path, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=1800,
            check=True,
        )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    from table import write

    rows = []
    ranks = ["mpirun", "-np", "2", "--bind-to", "none", "--oversubscribe", "-x", "OMPI_MCA_mpi_yield_when_idle=1"]
    for where, launcher, threads in (("one process", [], 1), ("two ranks", ranks, 1)):
        measured = run(launcher, threads)
        found = measured["found"]
        plain = [elapsed for elapsed, _, _ in found["none"]]
        held = statistics.median(blocked for _, blocked, _ in found["at once"])
        for kind in ("at once", "asynchronous"):
            blocked = statistics.median(blocked for _, blocked, _ in found[kind])
            share = sorted(mine[1] / once[1] for mine, once in zip(found[kind], found["at once"], strict=True))
            lost = statistics.median(mine[0] - none for mine, none in zip(found[kind], plain, strict=True))
            whole = statistics.median(save for _, _, save in found[kind])
            rows.append(
                [
                    where,
                    kind,
                    f"{blocked:.3f}",
                    f"{100 * statistics.median(share):.1f} % ({100 * share[0]:.1f} - {100 * share[-1]:.1f})",
                    f"{100 * lost / held:.0f} %",
                    f"{whole:.2f}",
                ]
            )
    millions, mib = measured["parameters"] / 1e6, 12 * measured["parameters"] / 2**20
    note = (
        f"GPT of {millions:.1f} M parameters with AdamW's moments, fp32: {mib:.0f} MiB a checkpoint. Medians of "
        f"{ROUNDS} rounds of {STEPS} steps without a save, with one at once and with one beside, in turn; the share is "
        "that within a round, and its range. `Lost`: how much longer the steps took than those without a save; on CPUs "
        f"the thread that writes and digests takes time from the {os.cpu_count()} cores that compute (one a rank). The "
        f"first save, which makes the buffers, is left out. Load of the machine at the end: {os.getloadavg()[1]:.0f}."
    )
    head = ["ranks", "saved", "loop held up (s)", "held up / at once", "lost / at once", "until whole (s)"]
    print(write("checkpoint", "What a checkpoint costs the training", "make bench BENCH=checkpoint", head, rows, note))


if __name__ == "__main__":
    measure(Path(sys.argv[2]), *json.loads(sys.argv[3])) if sys.argv[1:2] == ["--rank"] else main()
