"""A job that is asked to stop 20 times, at random moments: what does it lose, and how long does it take to go on?

make bench BENCH=requeue            (ten minutes; needs root and .ci/install-slurm; CYCLES=20, SEED=1)

slurm/train.sbatch on the two-node Slurm of the tests, a rank on each node. In every cycle the batch shell gets USR2, as
Slurm sends it before the time limit: every fourth time while the ranks are still loading, else some steps later. The
ranks save, the script requeues the job. Then it trains to its end, and is compared with a run that nobody disturbed.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from cluster import SlurmCluster  # noqa: E402
from command import until  # noqa: E402
from launch import prepare, succeed  # noqa: E402
from test_job_faults import assert_equal_to_the_bit  # noqa: E402
from test_train_job import Job, losses  # noqa: E402

CYCLES, SEED = int(os.environ.get("CYCLES", "20")), int(os.environ.get("SEED", "1"))
STEPS = 40 * CYCLES  # more than are made between a start and a signal
WORDS = (f"train.steps={STEPS}", "eval.every=0", "checkpoint.every=0", "metrics.every=1", "metrics.tensorboard=false")
LONG_S = 300


def newest_step(job: Job) -> int:
    """Of the run's checkpoints; 0: there is none."""
    return max((int(path.name[-8:]) for path in (job.run_dir / "checkpoints").glob("step-*")), default=0)


def last_step(job: Job) -> int:
    """The last step in metrics.jsonl; 0: there is none."""
    return max(losses(job.run_dir), default=0)


def restarts(job: Job) -> int:
    return int(job.slurm.show(job.id)["Restarts"])


def cycle(job: Job, number: int, chance: random.Random) -> tuple[float | None, float, int]:
    """One start, until the job is in the queue again: seconds to the first step, from signal to end; steps lost.

    The first is None where the signal came before that step.
    """
    until(lambda: job.slurm.show(job.id)["JobState"] == "RUNNING", "the job runs", LONG_S)
    started = datetime.fromisoformat(job.slurm.show(job.id)["StartTime"]).timestamp()
    before, first_s = newest_step(job), None
    if number % 4 == 3:
        until(lambda: job.log.count(f"hvdtrain job: job {job.id} on ") == number + 1, "the script has begun", LONG_S)
        time.sleep(chance.uniform(0, 5))
    else:
        until(lambda: last_step(job) > before, "the first step", LONG_S)
        first_s = time.time() - started
        some = before + chance.randrange(1, 15)
        until(lambda: last_step(job) >= some, "some steps", LONG_S)
        time.sleep(chance.uniform(0, 0.2))
    signalled = time.monotonic()
    job.signal()
    until(lambda: restarts(job) == number + 1, "the job is in the queue again", LONG_S)
    saved = newest_step(job)
    if saved < before or (saved == before and first_s is not None):
        raise SystemExit(f"cycle {number}: no newer checkpoint than step {before}\n{job.log}")
    return first_s, time.monotonic() - signalled, last_step(job) - saved


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="requeue-") as name:
        folder, chance = Path(name), random.Random(SEED)
        prepared = prepare(folder / "data")
        unbroken = folder / "unbroken"
        succeed("train", prepared.recipe, *WORDS, "--run-dir", unbroken, how="mpirun", ranks=2, timeout_s=1800)
        (folder / "slurm").mkdir()
        with SlurmCluster(folder / "slurm") as slurm:
            env = {"HVDTRAIN_LAUNCHER": "pmix", "HVDTRAIN_HOME": str(ROOT)}
            job = Job(slurm, folder, prepared.recipe, *WORDS, options=("--ntasks-per-node=1",), **env)
            rows = []
            for number in range(CYCLES):
                rows.append(cycle(job, number, chance))
                print(number, rows[-1], newest_step(job), flush=True)
            ended = slurm.wait(job.id, timeout_s=1800)
        found = ended["JobState"], ended["ExitCode"], ended["Restarts"]
        if found != ("COMPLETED", "0:0", str(CYCLES)):
            raise SystemExit(f"the job ended as {found}\n{job.log}")
        assert_equal_to_the_bit(job.run_dir, unbroken)
        told = job.log.count("hvdtrain job: stopped early; newest checkpoint: ")
    first, ending, lost = zip(*rows, strict=True)
    first = [seconds for seconds in first if seconds is not None]

    def shown(seconds: list[float]) -> list[str]:
        return [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]

    print(
        table.write(
            "requeue",
            "Signal, save, requeue, go on: over and over",
            "make bench BENCH=requeue",
            [f"{CYCLES} cycles, {STEPS} steps", "median", "worst"],
            [
                ["steps lost", f"{statistics.median(lost):g}", str(max(lost))],
                ["seconds from the signal to the end of the job", *shown(ending)],
                ["seconds from the start of the job to its first step", *shown(first)],
            ],
            f"Seed {SEED}; {len(lost) - len(first)} of the signals came before the first step. The job ended with exit "
            f"code 75 in {told} of {CYCLES} cycles. Learning curve, sample digest, parameters and optimizer state of "
            "the run are equal, to the bit, to those of two ranks that nobody disturbed. All of Slurm, both nodes and "
            "both ranks share this machine.",
        )
    )
    if max(lost) > 0:
        raise SystemExit("steps were lost")


if __name__ == "__main__":
    main()
