"""What runs have measured: the time of a step on so many nodes, from the folders of short runs on a few of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

from hvdtrain.config import RunConfig, flatten
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.files import again, listed, read_json
from hvdtrain.planner.growth import Point
from hvdtrain.planner.workload import step_rows
from hvdtrain.watch.log_file import STEP_PARTS, read_log

# What may differ between runs of which one is to tell how another grows: the batch of all ranks and what is scaled with
# it, how long, where the data lie, and what is neither computed nor sent in a step.
_MAY_DIFFER = (
    *("seed", "data.*", "eval.*", "checkpoint.*", "metrics.*", "stop.*", "watchdog.*", "schedule.*", "scaling.*"),
    *("train.steps", "train.tokens", "train.epochs", "train.global_batch", "train.global_tokens", "train.ramp_*"),
    *("optim.lr", "optim.beta1", "optim.beta2", "guard.*", "device", "train.microbatch"),
)
# Of summary.json and job.json: what the ranks computed on and with.
_OF_MACHINE = ("device", "matmul", "precision", "backend", "threads_per_rank")


@dataclass(frozen=True)
class Measured:
    """Of one run. parts: seconds of a step on rank 0, in the median over its lines, by what they were spent on.
    spread: of a line's time about that median, relative. microbatches: of a step, of ``rows`` sequences each.
    """

    run_dir: Path
    nodes: int
    ranks: int
    parts: Mapping[str, float]
    spread: float
    rows: int
    microbatches: int
    tokens_of_step: float
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())

    @property
    def ranks_per_node(self) -> float:
        return self.ranks / self.nodes


def read_runs(run_dirs: Sequence[Path]) -> list[Measured]:
    """By size. Errors: CheckpointError for a folder that is no run; ConfigError for runs that cannot be compared."""
    runs = sorted((read_run(run_dir) for run_dir in run_dirs), key=lambda run: (run.nodes, run.ranks))
    check_comparable(runs)
    return runs


def read_run(run_dir: Path) -> Measured:
    """The last job of a run. Errors: see ``read_runs``."""
    jobs = [job for job in listed(run_dir / "jobs") if (job / "job.json").is_file()]
    if not jobs:
        raise CheckpointError(f"{run_dir} is not a run folder with a job's record: there is no jobs/*/job.json")
    job = read_json(max(jobs, key=lambda folder: read_json(folder / "job.json").get("started", "")) / "job.json")
    try:
        log = read_log(run_dir / "metrics.jsonl")
    except OSError as error:
        raise CheckpointError(f"{run_dir}: cannot read metrics.jsonl: {error.strerror}") from None
    lines = [line for line in log if line.get("kind") == "train" and line["step"] > job.get("step_began", 0)]
    if len(lines) < 3:  # the first is of the start-up
        raise CheckpointError(
            f"{run_dir}: {len(lines)} lines in metrics.jsonl of its last job, and the first is of the start-up; let it "
            "train for 3 x metrics.every steps at least"
        )
    longest = job.get("data", {}).get("longest_row", 0)
    of_rank = step_rows(RunConfig.model_validate(job["config"]), job["world_size"], longest)
    summary = run_dir / "summary.json"
    machine = {**(again(lambda: read_json(summary), summary) if summary.is_file() else {}), **job}
    return Measured(
        run_dir,
        len(job["nodes"]),
        job["world_size"],
        {part: median(line[f"time_{part}_s"] for line in lines[1:]) for part in STEP_PARTS},
        _spread(lines[1:]),
        of_rank.microbatch,
        of_rank.microbatches,
        (lines[-1]["tokens"] - lines[0]["tokens"]) / (lines[-1]["step"] - lines[0]["step"]),
        flatten(job["config"]),
        {name: machine.get(name) for name in _OF_MACHINE},
    )


def check_comparable(runs: Sequence[Measured]) -> None:
    """Errors: ConfigError that names what differs and should not."""
    first = runs[0]
    problems = []
    for run in runs[1:]:
        for key in sorted(first.settings.keys() | run.settings.keys()):
            ours, theirs = first.settings.get(key), run.settings.get(key)
            if ours != theirs and not any(fnmatchcase(key, pattern) for pattern in _MAY_DIFFER):
                problems.append(f"{key} is {ours} in {first.run_dir} and {theirs} in {run.run_dir}")
        for name in _OF_MACHINE:
            ours, theirs = first.machine[name], run.machine[name]
            alone = name == "backend" and 1 in (first.ranks, run.ranks)  # a rank alone has none
            if None not in (ours, theirs) and ours != theirs and not alone:
                problems.append(f"{name} is {ours} in {first.run_dir} and {theirs} in {run.run_dir}")
        if first.rows != run.rows:
            problems.append(
                f"a microbatch has {first.rows} rows in {first.run_dir} and {run.rows} in {run.run_dir} "
                "(set train.microbatch alike)"
            )
    several = [run for run in runs if run.nodes > 1]
    for run in runs:
        if several and run.ranks_per_node != several[0].ranks_per_node:
            problems.append(
                f"{run.run_dir} has {run.ranks_per_node:g} ranks a node, "
                f"{several[0].run_dir} {several[0].ranks_per_node:g}"
            )
    if problems:
        raise ConfigError("runs that cannot be compared: " + "; ".join(problems))


def points_of(runs: Sequence[Measured]) -> tuple[list[Point], str]:
    """What ``Growth`` is fitted to, and what its sizes count: nodes, or ranks where all runs are on one node."""
    by_node = any(run.nodes > 1 for run in runs)
    points = [
        Point(run.nodes if by_node else run.ranks, run.step_s / run.microbatches, run.microbatches) for run in runs
    ]
    return points, "nodes" if by_node else "ranks"


def _spread(lines: Sequence[Mapping[str, Any]]) -> float:
    """Half of what lies between the quarters of the lines' times, as a share of their median."""
    times = sorted(sum(line[f"time_{part}_s"] for part in STEP_PARTS) for line in lines)
    return (times[-1 - len(times) // 4] - times[len(times) // 4]) / 2 / median(times)
