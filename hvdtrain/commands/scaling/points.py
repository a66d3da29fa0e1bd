"""What is trained at each size: a short run of the recipe, whose microbatches are the same everywhere.

strong    the recipe's batch, shared by more and more ranks: fewer and fewer microbatches
weak      a batch that grows with the ranks: as many microbatches everywhere
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdtrain.config import load_config, run_folders
from hvdtrain.errors import ConfigError
from hvdtrain.planner.estimate import Estimate, estimate

Kind = Literal["strong", "weak"]
_LEAST_STEPS = 12  # of which the first few are of the start-up
_LINES = 12  # of a run's log
# Of a run that is to be measured: no rate is looked at, no part of it grows, nothing is saved but at its end.
_SHORT = (
    *("train.tokens=0", "train.epochs=0", "train.ramp_start=0", "train.ramp_increment=0", "train.ramp_tokens=0"),
    *("schedule.warmup_steps=0", "schedule.warmup_tokens=0", "schedule.warmup_epochs=0"),
    *("scaling.rule=none", "scaling.per_rank=false", "scaling.base_batch=0", "scaling.base_tokens=0"),
    *("eval.every=0", "checkpoint.every=0", "checkpoint.keep_best=false", "checkpoint.mtbf_hours=0"),
    *("watchdog.check_replicas_every=0", "metrics.tensorboard=false"),
)


@dataclass(frozen=True)
class Series:
    """The sizes of one measurement. ranks_per_node: of each node. steps: of each run."""

    recipe: str
    overrides: Sequence[str]
    kind: Kind
    nodes: Sequence[int]
    ranks_per_node: int
    steps: int

    def __post_init__(self) -> None:
        given = ",".join(map(str, self.nodes))
        if len(set(self.nodes)) < 2:
            raise ConfigError(f"--nodes {given}: one size says nothing of others; give two or more, like 1,2,4")
        if list(self.nodes) != sorted(set(self.nodes)):
            raise ConfigError(f"--nodes {given}: expected numbers that rise, like 1,2,4")
        if self.ranks_per_node < 1:
            raise ConfigError(f"--ranks-per-node {self.ranks_per_node}: give 1 or more")
        if self.steps < _LEAST_STEPS:
            raise ConfigError(f"--steps {self.steps}: give {_LEAST_STEPS} or more; the first are of the start-up")


@dataclass(frozen=True)
class Point:
    """One size. settings: of its run, the user's among them. plan: of that run."""

    nodes: int
    settings: Sequence[str]
    plan: Estimate

    @property
    def ranks(self) -> int:
        return self.plan.load.ranks

    @property
    def name(self) -> str:
        return f"nodes-{self.nodes}"


def whole_run(series: Series) -> Estimate:
    """Of the recipe as it is, on the fewest nodes. Errors: see ``estimate``."""
    ranks = series.nodes[0] * series.ranks_per_node
    config = load_config(series.recipe, series.overrides, run_folders(series.recipe, None))
    return estimate(config, ranks, series.ranks_per_node)


def points_of(series: Series, whole: Estimate) -> list[Point]:
    """Errors: ConfigError where a size cannot share its batch, DataError; nothing has been started."""
    points = [_point(series, whole, nodes) for nodes in series.nodes]
    rows = min(point.plan.load.microbatch for point in points)
    if any(point.plan.load.microbatch != rows for point in points):
        points = [_point(series, whole, nodes, [f"train.microbatch={rows}"]) for nodes in series.nodes]
    return points


def _point(series: Series, whole: Estimate, nodes: int, more: Sequence[str] = ()) -> Point:
    train, times = whole.config.train, nodes // series.nodes[0] if series.kind == "weak" else 1
    if series.kind == "weak" and nodes % series.nodes[0]:
        raise ConfigError(
            f"--nodes {nodes} is no multiple of {series.nodes[0]}: --kind weak multiplies the batch by it"
        )
    batch = [f"train.global_batch={train.global_batch * times}", f"train.global_tokens={train.global_tokens * times}"]
    length = [f"train.steps={series.steps}", f"metrics.every={max(1, series.steps // _LINES)}"]
    settings = [*series.overrides, *_SHORT, *length, *batch, *more]
    config = load_config(series.recipe, settings, [Path(f"nodes-{nodes}")])
    try:
        plan = estimate(config, nodes * series.ranks_per_node, series.ranks_per_node)
    except ConfigError as error:
        raise ConfigError(f"{nodes * series.ranks_per_node} ranks on {nodes} nodes: {error}") from None
    return Point(nodes, settings, plan)
