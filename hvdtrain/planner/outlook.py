"""``hvdtrain plan`` with ``--from``, ``--cluster`` and ``--simulate``: how long a step and the run will take."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.config import load_config, run_folders
from hvdtrain.errors import ConfigError, plural
from hvdtrain.planner import estimate as plans
from hvdtrain.planner.cluster import Cluster, read_cluster
from hvdtrain.planner.cost import StepTime, hold_up, step_time, work_of, write_seconds
from hvdtrain.planner.estimate import Estimate, estimate, in_columns
from hvdtrain.planner.growth import Growth, Prediction
from hvdtrain.planner.measured import Measured, points_of, read_runs
from hvdtrain.planner.simulate import Chain, Outcome, best_interval, hours, simulate

_UNITS_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class Asked:
    """The words of the command. ranks_per_node: 0: as the cluster or the runs have it. links: like ``24h=2h``."""

    recipe: str
    overrides: Sequence[str]
    ranks: int
    ranks_per_node: int = 0
    vocab_size: int = 0
    run_dir: Path | None = None
    runs: Sequence[Path] = ()
    cluster: str = ""
    simulated: bool = False
    links: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outlook:
    """predicted: of a step, from runs. costs: of a step, from a cluster's figures. outcomes: of the whole run, one for
    each length of a job, the best save interval in each.
    """

    plan: Estimate
    runs: Sequence[Measured]
    predicted: Prediction | None
    unit: str
    cluster: Cluster | None
    costs: StepTime | None
    outcomes: Sequence[Outcome]

    @property
    def step_s(self) -> float:
        """By what was measured, where there is that."""
        if self.predicted is not None:
            return self.predicted.seconds
        assert self.costs is not None
        return self.costs.total


def plan_time(asked: Asked, as_json: bool = False) -> str:
    """What the command prints. Errors: see ``plan``, ``read_runs``, ``read_cluster``; ConfigError for words that do not
    go together.
    """
    found = look_ahead(asked)
    if as_json:
        return json.dumps({**plans.as_tree(asked.recipe, found.plan), **as_tree(found)}, indent=1)
    return f"{plans.as_text(asked.recipe, found.plan)}\n{as_text(found)}"


def look_ahead(asked: Asked) -> Outlook:
    """The same as numbers."""
    links = [link_in(text) for text in asked.links]
    cluster = read_cluster(asked.cluster) if asked.cluster else None
    runs = read_runs(asked.runs) if asked.runs else []
    per_node = asked.ranks_per_node or _per_node(cluster, runs)
    config = load_config(asked.recipe, asked.overrides, run_folders(asked.recipe, asked.run_dir))
    plan = estimate(config, asked.ranks, min(per_node, asked.ranks), asked.vocab_size)
    predicted, unit = _predict(plan, runs) if runs else (None, "")
    costs = step_time(work_of(plan), cluster) if cluster else None
    found = Outlook(plan, runs, predicted, unit, cluster, costs, [])
    if not asked.simulated:
        return found
    return Outlook(plan, runs, predicted, unit, cluster, costs, _simulate(found, links or [(math.inf, 0.0)]))


def _per_node(cluster: Cluster | None, runs: Sequence[Measured]) -> int:
    if cluster is not None:
        return int(cluster["ranks_per_node"])
    several = [run for run in runs if run.nodes > 1]
    return int(several[0].ranks_per_node) if several else 0


def _predict(plan: Estimate, runs: Sequence[Measured]) -> tuple[Prediction, str]:
    """Seconds of a step of the plan."""
    points, unit = points_of(runs)
    load, mesh = plan.load, plan.config.mesh
    of_runs = {name: runs[0].settings[f"mesh.{name}"] for name in ("tensor", "pipeline")}
    if of_runs != {"tensor": mesh.tensor, "pipeline": mesh.pipeline}:
        said = " ".join(f"mesh.{name}={size}" for name, size in of_runs.items())
        raise ConfigError(f"the runs have {said}, the plan another mesh: its time cannot be told from theirs")
    if load.microbatch != runs[0].rows:
        raise ConfigError(
            f"the plan has microbatches of {load.microbatch} rows, the runs of {runs[0].rows}: "
            f"set train.microbatch={runs[0].rows}, or measure runs with {load.microbatch}"
        )
    size = load.nodes if unit == "nodes" else load.ranks
    one = Growth(points).predict(size, load.microbatches)
    times = load.microbatches
    return Prediction(one.seconds * times, one.low * times, one.high * times, one.share), unit


def _simulate(found: Outlook, links: Sequence[tuple[float, float]]) -> list[Outcome]:
    assert found.cluster is not None
    cluster, load = found.cluster, found.plan.load
    work = work_of(found.plan)
    save = hold_up(work, cluster)
    saving = 0.0 if found.costs is None or found.predicted is not None else found.costs.save
    outcomes = []
    for link_s, queue_s in links:
        chain = Chain(
            ranks=load.ranks,
            work_s=load.steps * (found.step_s - saving),  # saves are simulated
            failures_per_rank_day=cluster["failures_per_rank_day"],
            save_every_s=max(1.0, save),
            save_s=save,
            write_s=write_seconds(work, cluster),
            restart_s=cluster["restart_s"],
            requeue_s=cluster["requeue_s"],
            link_s=link_s,
            queue_s=queue_s,
        )
        outcomes.append(best_interval(chain) if math.isfinite(chain.mean_s) else simulate(_never_saving(chain)))
    return outcomes


def _never_saving(chain: Chain) -> Chain:
    return Chain(**{**asdict(chain), "save_every_s": chain.work_s})


def link_in(text: str) -> tuple[float, float]:
    """``24h=2h``: jobs of 24 hours, which wait 2 in the median; ``24h``: which do not wait. Errors: ConfigError."""
    length, _, wait = text.partition("=")
    seconds = [_seconds_in(part) for part in ([length, wait] if wait else [length])]
    if None in seconds or not seconds[0] or text.endswith("="):
        raise ConfigError(f"--link {text}: expected WALLTIME=WAIT, like 24h=2h or 90min=10min")
    return float(seconds[0]), float(seconds[1] or 0.0) if wait else 0.0


def _seconds_in(text: str) -> float | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|m|h|d)", text.strip())
    return float(found[1]) * _UNITS_S[found[2]] if found else None


# --- printing -----------------------------------------------------------------------------------------------------


def as_tree(found: Outlook) -> dict[str, Any]:
    """For machines: seconds."""
    load = found.plan.load
    tree: dict[str, Any] = {"step_s": found.step_s, "run_s": found.step_s * load.steps}
    if found.predicted is not None:
        measured = [{"run": str(run.run_dir), unit: getattr(run, unit), "step_s": run.step_s} for run in found.runs
                    for unit in (found.unit,)]  # fmt: skip
        tree["from_runs"] = {**asdict(found.predicted), "measured": measured}
    if found.costs is not None and found.cluster is not None:
        tree["from_cluster"] = {"cluster": found.cluster.name, **found.costs.parts, "total": found.costs.total}
    if found.outcomes:
        tree["simulated"] = [_outcome_tree(one, found) for one in found.outcomes]
    return tree


def _outcome_tree(one: Outcome, found: Outlook) -> dict[str, Any]:
    """Percentiles 10, 50 and 90 of what differs from run to run."""
    assert found.cluster is not None
    nodes, watts = found.plan.load.nodes, found.cluster["watts_per_node"]
    tree = {
        "link_s": one.chain.link_s if math.isfinite(one.chain.link_s) else None,
        "save_every_s": one.chain.save_every_s,
        "calendar_s": _percentiles(one.calendar_s),
        "goodput": _percentiles(one.goodput),
        "effective": _percentiles(one.effective),
        "lost_s": _percentiles(one.lost_s),
        "failures": _percentiles(one.failures),
        "jobs": _percentiles(one.jobs),
        "node_hours": _percentiles(one.held_s * nodes / 3600),
    }
    return {**tree, "energy_mwh": _percentiles(one.held_s * nodes * watts / 3.6e9)} if watts else tree


def _percentiles(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in np.percentile(values, (10, 50, 90))]


def as_text(found: Outlook) -> str:
    lines = []
    if found.predicted is not None:
        lines += ["", *_from_runs(found)]
    if found.costs is not None:
        lines += ["", *_from_cluster(found)]
    load, step_s = found.plan.load, found.step_s
    tokens = load.global_tokens / step_s
    run_s = step_s * load.steps
    lines += [
        "",
        f"the run      {load.steps:,} steps of {step_s:.4g} s: {hours(run_s)} if nothing is in the way, "
        f"{tokens:,.0f} tokens/s, {run_s * load.nodes / 3600:,.1f} node hours",
    ]
    if found.outcomes:
        lines += ["", *_simulated(found)]
    return "\n".join(lines)


def _from_runs(found: Outlook) -> list[str]:
    predicted, unit = found.predicted, found.unit
    assert predicted is not None
    head = (unit, "microbatches", "step s", *found.runs[0].parts, "tokens/s", "efficiency")
    first = found.runs[0]
    alone = first.tokens_of_step / first.step_s / getattr(first, unit)
    rows = []
    for run in found.runs:
        rate = run.tokens_of_step / run.step_s
        parts = (f"{seconds:.4f}" for seconds in run.parts.values())
        size = getattr(run, unit)
        rows.append(
            (
                f"{size:,}",
                f"{run.microbatches}",
                f"{run.step_s:.4f}",
                *parts,
                f"{rate:,.0f}",
                f"{rate / size / alone:.0%}",
            )
        )
    load = found.plan.load
    size, rate = (load.nodes if unit == "nodes" else load.ranks), load.global_tokens / predicted.seconds
    blank = ("",) * len(first.parts)
    last = (f"{rate:,.0f}", f"{rate / size / alone:.0%}")
    rows.append((f"{size:,}", f"{load.microbatches}", f"{predicted.seconds:.4f}", *blank, *last))
    return [
        f"time of a step, fitted to {plural(len(found.runs), 'run')}; the last line is predicted",
        *in_columns([head, *rows]),
        f"  {predicted.share:.0%} of such predictions hold within {predicted.low:.4f} to {predicted.high:.4f} s",
    ]


def _from_cluster(found: Outlook) -> list[str]:
    assert found.costs is not None and found.cluster is not None
    total = found.costs.total
    rows = [
        (name, f"{seconds:.4f}", f"{seconds / total:.0%}") for name, seconds in found.costs.parts.items() if seconds
    ]
    assumed = [name for name, source in found.cluster.sources.items() if source.startswith("assumed")]
    said = [f"  assumed of it: {', '.join(assumed)}"] if assumed else []
    return [
        f"time of a step on {found.cluster.name}",
        *in_columns([("part", "s", "share"), *rows, ("total", f"{total:.4f}", "")]),
        *said,
    ]


def _simulated(found: Outlook) -> list[str]:
    head = (
        "jobs of",
        "wait",
        "save every",
        "calendar 10 %",
        "50 %",
        "90 %",
        "effective",
        "failures",
        "jobs",
        "node hours",
    )
    best = min(range(len(found.outcomes)), key=lambda number: float(found.outcomes[number].calendar_s.mean()))
    rows = []
    for number, one in enumerate(found.outcomes):
        tree = _outcome_tree(one, found)
        few, half, most = (hours(seconds) for seconds in tree["calendar_s"])
        mark = " *" if number == best and len(found.outcomes) > 1 else ""
        rows.append(
            (
                *(hours(one.chain.link_s), hours(one.chain.queue_s), hours(one.chain.save_every_s), few, half),
                *(most + mark, f"{tree['effective'][1]:.1%}", f"{tree['failures'][1]:,.0f}", f"{tree['jobs'][1]:,.0f}"),
                f"{tree['node_hours'][1]:,.0f}",
            )
        )
    lines = [f"the whole run, simulated {len(found.outcomes[0].calendar_s)} times", *in_columns([head, *rows])]
    if "energy_mwh" in (tree := _outcome_tree(found.outcomes[best], found)):
        lines.append("  energy {:,.3g}, {:,.3g}, {:,.3g} MWh (10, 50, 90 %)".format(*tree["energy_mwh"]))
    return lines
