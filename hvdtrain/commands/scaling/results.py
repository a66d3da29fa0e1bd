"""What the points came to, and what they say of larger sizes and of the whole run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.checkpoint.retention import folder_of, steps_saved
from hvdtrain.commands.scaling.points import Point, Series
from hvdtrain.jobs.slurm import job_records, read_object
from hvdtrain.planner.estimate import Estimate
from hvdtrain.planner.growth import Growth, Prediction
from hvdtrain.planner.measured import Measured, points_of

_DOUBLINGS = 3  # beyond the largest that was measured


@dataclass(frozen=True)
class Result:
    """Of one size, measured. job, summary: of its run. checkpoint_bytes: of one."""

    point: Point
    run: Measured
    job: Mapping[str, Any]
    summary: Mapping[str, Any]
    checkpoint_bytes: int

    @property
    def tokens_per_s(self) -> float:
        return self.run.tokens_of_step / self.run.step_s


@dataclass(frozen=True)
class Beyond:
    """A size that was not measured. step: seconds of one; tokens: of one."""

    nodes: int
    ranks: int
    microbatches: int
    step: Prediction
    tokens: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step.seconds


@dataclass(frozen=True)
class Found:
    """whole: the recipe's plan, on the fewest nodes. checked: the largest size, told from the smaller ones alone."""

    series: Series
    whole: Estimate
    results: Sequence[Result]
    beyond: Sequence[Beyond]
    checked: Prediction | None

    def speed_up(self, tokens_per_s: float) -> float:
        return tokens_per_s / self.results[0].tokens_per_s

    def efficiency(self, nodes: int, tokens_per_s: float) -> float:
        return self.speed_up(tokens_per_s) * self.results[0].point.nodes / nodes

    def run_s(self, tokens_per_s: float) -> float:
        """Of the whole run, by its tokens: a larger batch takes fewer steps."""
        return self.whole.load.tokens / tokens_per_s


def read_result(point: Point, run: Measured) -> Result:
    steps = steps_saved(run.run_dir)
    folder = folder_of(run.run_dir, steps[0]) if steps else Path("/nowhere")
    size = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    return Result(point, run, job_records(run.run_dir)[-1], read_object(run.run_dir / "summary.json"), size)


def conclude(series: Series, whole: Estimate, results: Sequence[Result], asked: Sequence[int] = ()) -> Found:
    """asked: sizes to be told of; none: a few doublings beyond the largest. With one result nothing is told."""
    if len(results) < 2:
        return Found(series, whole, results, [], None)
    sizes = asked or [results[-1].point.nodes * 2**doubling for doubling in range(1, _DOUBLINGS + 1)]
    beyond = [found for nodes in sizes if (found := _beyond(series, results, nodes)) is not None]
    checked = _told(results[:-1], results[-1].point.nodes, results[-1].run.microbatches) if len(results) > 2 else None
    return Found(series, whole, results, beyond, checked)


def _beyond(series: Series, results: Sequence[Result], nodes: int) -> Beyond | None:
    """None: a size that cannot share the batch."""
    first, ranks = results[0], nodes * series.ranks_per_node
    tokens, microbatches = first.run.tokens_of_step, float(first.run.microbatches)
    if series.kind == "weak":
        tokens *= nodes / first.point.nodes
    else:
        microbatches *= first.point.nodes / nodes
        if microbatches < 1:
            return None
    count = math.ceil(microbatches)
    return Beyond(nodes, ranks, count, _told(results, nodes, count), tokens)


def _told(results: Sequence[Result], nodes: int, microbatches: int) -> Prediction:
    """Seconds of a step."""
    points, unit = points_of([result.run for result in results])
    ranks_per_node = results[0].point.ranks / results[0].point.nodes
    size = nodes if unit == "nodes" else nodes * ranks_per_node
    one = Growth(points).predict(size, microbatches)
    return Prediction(*(value * microbatches for value in (one.seconds, one.low, one.high)), one.share)
