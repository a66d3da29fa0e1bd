"""Load balance: one rank shares its core with another process, which leaves when most of the run is over.

    make bench BENCH=balance       RANKS=2 ROWS=16 (a rank's) STEPS=120 ROUNDS=3

Each rank has a core of its own, so there must be as many. Three runs a round, in turn:

quiet      nobody is slow: what a step takes where all have equal shares
even       a process competes for the last rank's core: all wait for that rank
balanced   the same with balance.every=5; then the process leaves

Ideal is a step that nobody waits in: the ranks' speeds, the slow one's as the first two runs tell it, added up.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from tiny import random_tokens, write_data  # noqa: E402

from hvdtrain.watch.log_file import STEP_PARTS  # noqa: E402

RANKS, ROWS = int(os.environ.get("RANKS", "2")), int(os.environ.get("ROWS", "16"))
STEPS, ROUNDS = int(os.environ.get("STEPS", "120")), int(os.environ.get("ROUNDS", "3"))
SETTLED, LEAVES, AGAIN = 0.25, 0.6, 0.8  # of the steps: shares are found, the process leaves, shares are found again
MODEL = {"layers": 4, "heads": 4, "width": 128, "context": 128}
ON_ITS_CORE = 'cores=($0); exec taskset -c ${cores[$OMPI_COMM_WORLD_LOCAL_RANK]} "$@"'


def train(folder: Path, name: str, cores: list[int], every: int, competes: bool) -> list[dict]:
    """The lines of a run's metrics."""
    run_dir = folder / name
    settings = {
        "data.dir": folder / "data", "train.steps": STEPS, "train.global_batch": RANKS * ROWS, "eval.every": 0,
        "checkpoint.every": 0, "metrics.every": 5, "metrics.tensorboard": False, "balance.every": every,
        "schedule.name": "constant", "schedule.warmup_steps": 2,
        **{f"model.{key}": value for key, value in MODEL.items()},
    }  # fmt: skip
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    (folder / "empty.yaml").write_text("{}\n")
    command = [
        *("mpirun", "-np", str(RANKS), "--oversubscribe", "--bind-to", "none"),
        *("bash", "-c", ON_ITS_CORE, " ".join(map(str, cores)), sys.executable, "-m", "hvdtrain", "train"),
        *(f"{folder}/empty.yaml", *words, "--run-dir", str(run_dir)),
    ]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **root, "PATH": path, "OMP_NUM_THREADS": "1"}
    with (
        (folder / "output").open("w") as said,
        competitor(cores[-1]) if competes else nullcontext() as other,
        subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT) as job,
    ):
        while job.poll() is None:
            time.sleep(0.1)
            lines = lines_of(run_dir)
            if other is not None and lines and lines[-1]["step"] >= LEAVES * STEPS:
                other.kill()
    if job.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'output').read_text()[-3000:]}")
    return lines_of(run_dir)


@contextmanager
def competitor(core: int):
    """A process that computes on ``core`` for as long as it may."""
    with subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield other
        finally:
            other.kill()


def lines_of(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [line for line in lines if line["kind"] == "train"]


def step_s(lines: list[dict], first: float, last: float) -> float:
    """Median seconds of a step between these parts of the run."""
    chosen = [line for line in lines if first * STEPS < line["step"] <= last * STEPS]
    return statistics.median(sum(line[f"time_{part}_s"] for part in STEP_PARTS) for line in chosen)


def main() -> None:
    from table import write

    cores = sorted(os.sched_getaffinity(0))[:RANKS]
    if len(cores) < RANKS:
        sys.exit(f"needs a core for each of {RANKS} ranks; there are {len(cores)}")
    rows, shares = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", 256, train=[random_tokens(400_000, 256)], val=[random_tokens(1000, 256)])
        for number in range(1, ROUNDS + 1):
            quiet = step_s(train(folder, f"quiet-{number}", cores, 0, competes=False), SETTLED, 1)
            even = step_s(train(folder, f"even-{number}", cores, 0, competes=True), SETTLED, LEAVES)
            lines = train(folder, f"balanced-{number}", cores, 5, competes=True)
            balanced, after = step_s(lines, SETTLED, LEAVES), step_s(lines, AGAIN, 1)
            ideal = quiet * RANKS / (RANKS - 1 + quiet / even)
            shares.append(ideal / balanced)
            settled = next(line for line in reversed(lines) if line["step"] <= LEAVES * STEPS)
            found, end = next(line for line in lines if line["step"] > SETTLED * STEPS), lines[-1]
            rows.append(
                [
                    f"{1e3 * quiet:.0f}",
                    f"{even / quiet:.2f}",
                    f"{balanced / quiet:.2f}",
                    f"{ideal / quiet:.2f}",
                    f"{ideal / balanced:.1%}",
                    f"{settled['fewest_rows']} to {settled['most_rows']}",
                    f"{found['share_changes']} + {settled['share_changes'] - found['share_changes']}",
                    f"{after / quiet:.2f}",
                    f"{end['fewest_rows']} to {end['most_rows']}",
                ]
            )
    head = ["quiet, ms a step", "even / quiet", "balanced / quiet", "ideal / quiet", "of ideal", "rows of a rank"]
    head += ["changes: before and after a quarter", "left: / quiet", "rows then"]
    note = (
        f"{RANKS} ranks of one thread, each on its core, {ROWS} rows a rank where all have as many; {MODEL}. A process "
        f"computes on the last rank's core until {LEAVES:.0%} of {STEPS} steps. Median of steps from a quarter on; a "
        f"line is a round. Of ideal, median: {statistics.median(shares):.1%}."
    )
    print(write("balance", "Rows for a rank that is slowed", "make bench BENCH=balance", head, rows, note))


if __name__ == "__main__":
    main()
