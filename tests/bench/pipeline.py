"""A pipeline's step against what its checker says is possible, and against torch.distributed.pipelining over gloo.

    make bench BENCH=pipeline          STEPS=20 RANKS=2 MICROBATCHES=8 choose

bound     of a step: the schedule run by the checker, with the passes' seconds as they were measured in these steps,
          without what they wait for, and with transfers that take no time
balance   of the ranks' seconds in their passes: mean / largest
theirs    the same pruned models with the same weights, under torch's schedule of that name
"""

import json
import os
import sys
from pathlib import Path

import table
from running import run

STEPS, RANKS, MICROBATCHES = (int(os.environ.get(n, d)) for n, d in (("STEPS", 20), ("RANKS", 2), ("MICROBATCHES", 8)))
SIZES = json.loads(os.environ.get("SIZES", '{"layers": 8, "width": 256, "heads": 4, "context": 256}'))
VOCABULARY, ROWS, PORT = 8192, 4, 29541
WAY = str(Path(__file__).parent / "ways" / "pipeline_rank.py")


def measured(schedule: str, stages_per_rank: int) -> dict[str, float]:
    asked = {
        "schedule": schedule, "stages_per_rank": stages_per_rank, "steps": STEPS, "microbatches": MICROBATCHES,
        "rows": ROWS, "vocabulary": VOCABULARY, "sizes": SIZES, "port": PORT,
    }  # fmt: skip
    launcher = ["mpirun", "-np", str(RANKS), "--oversubscribe", "--bind-to", "none", sys.executable]
    _, printed = run([*launcher, WAY, json.dumps(asked)], threads=1)
    return json.loads(printed.strip().splitlines()[-1])


def main() -> None:
    rows = []
    for schedule, stages_per_rank in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)):
        found = measured(schedule, stages_per_rank)
        ours, theirs = found["ours"], found.get("theirs")
        rows.append(
            [
                schedule,
                f"{1000 * ours:.0f} ms",
                f"{found['bound'] / ours:.3f}",
                f"{found['balance']:.3f}",
                f"{found['bubble']:.1%}",
                "-" if theirs is None else f"{theirs / ours:.3f}",
            ]
        )
    head = ["schedule", "step", "bound / step", "balance of ranks", "bubble of the bound", "theirs / ours"]
    note = (
        f"Decoder of {SIZES['layers']} x {SIZES['width']}, vocabulary {VOCABULARY}, context {SIZES['context']}, fp32: "
        f"{MICROBATCHES} microbatches of {ROWS} rows over {RANKS} ranks of one thread; medians of {STEPS} steps, "
        "ways in turn. The bound is made of the passes' own seconds, measured in the same steps."
    )
    title = "A pipeline against its bound, and against torch.distributed.pipelining"
    print(table.write("pipeline", title, "make bench BENCH=pipeline", head, rows, note))


if __name__ == "__main__":
    main()
