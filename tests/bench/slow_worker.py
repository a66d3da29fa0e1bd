"""One of four workers of an asynchronous server is slow: what do the others keep of their speed?

    make bench BENCH=slow_worker          STEPS=200 SLOWER=4 ROUNDS=3 choose

What a worker computes is a sleep, of 60 ms or SLOWER times that, beside a tiny model: so that five ranks on two cores
wait for one another only where the server makes them. A worker's speed is its tickets a second; the ways take turns in
one job.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS, ROUNDS = (int(os.environ.get(name, most)) for name, most in (("STEPS", 200), ("ROUNDS", 3)))
SLOWER, PAUSE_S = float(os.environ.get("SLOWER", "4")), 0.06


def measure() -> None:
    """On each rank; rank 0 prints, way by way, the tickets a second of each worker, and the staleness."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from dealt import Dealt, server
    from learner import Recipe

    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.world import detect_world

    torch.set_num_threads(1)
    with open_group(detect_world()) as group:
        for turn in range(2 * ROUNDS):
            factor = SLOWER if turn % 2 and group.rank == 3 else 1.0
            learner = Dealt(group, Recipe(sync=server(1)), STEPS, pause_s=PAUSE_S * factor)
            group.barrier()
            began_s = time.perf_counter()
            learner.walk()
            speed = learner.tickets / (time.perf_counter() - began_s)
            learner.engine.close()
            speeds, numbers = group.all_gather_object(speed)[:4], learner.numbers
            if group.rank == 0:
                print(json.dumps([turn % 2, speeds, numbers["staleness_mean"], numbers["staleness_max"]]), flush=True)


def main() -> None:
    from table import write

    command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "5", sys.executable, __file__, "measure"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=1800)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or len(lines) != 2 * ROUNDS:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows, speeds_of = [], []
    for is_slow, name in ((0, "as fast as the others"), (1, f"{SLOWER:g}x slower")):
        of_way = [line for line in lines if line[0] == is_slow]
        others = [statistics.mean(speeds[:3]) for _, speeds, _, _ in of_way]
        speeds_of.append(others)
        slow = statistics.median(speeds[3] for _, speeds, _, _ in of_way)
        stale = statistics.median(line[2] for line in of_way), max(line[3] for line in of_way)
        rows.append([name, f"{statistics.median(others):.2f}", f"{slow:.2f}", f"{stale[0]:.2f} / {stale[1]}"])
    kept = [slow / equal for equal, slow in zip(*speeds_of, strict=True)]
    head = ["one of four workers", "the others, tickets/s", "that one", "staleness, mean / most"]
    note = (
        f"The others keep {statistics.median(kept):.1%} of their speed ({min(kept):.1%} to {max(kept):.1%}): median of "
        f"{ROUNDS} rounds of {STEPS} steps, the ways in turn. Computing is a sleep of {1e3 * PAUSE_S:.0f} ms, the slow "
        f"worker's of {SLOWER:g} times that, beside a tiny model."
    )
    print(
        write(
            "slow_worker", "A slow worker of an asynchronous server", "make bench BENCH=slow_worker", head, rows, note
        )
    )


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["measure"] else main()
