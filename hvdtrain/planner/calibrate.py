"""How fast a cluster's ranks compute, from short runs of the recipe in place of what the cluster's file says."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

from hvdtrain.config import flatten
from hvdtrain.errors import ConfigError, plural
from hvdtrain.planner.cluster import Cluster
from hvdtrain.planner.cost import work_of
from hvdtrain.planner.estimate import Estimate
from hvdtrain.planner.measured import Measured, read_run

CALIBRATED = ("tflops", "tokens_for_half", "memory_gb_per_s")
# What a microbatch computes, and what a step of the optimizer reads and writes.
_ALIKE = ("model.*", "task.*", "precision", "compile", "recompute.*", "optim.name", "optim.freeze")


def calibrated(cluster: Cluster, run_dirs: Sequence[Path], plan: Estimate) -> Cluster:
    """With tflops and memory_gb_per_s of the runs and, where their microbatches have two sizes, tokens_for_half.

    plan: of the recipe, on one rank. Errors: CheckpointError for a folder that is no run; ConfigError for
    runs of another recipe, or whose time of computing has other things in it.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    _check(runs, plan)
    work = work_of(plan)
    times: dict[int, list[float]] = {}
    for run in runs:
        times.setdefault(run.rows * plan.load.positions, []).append(run.parts["compute"] / run.microbatches)
    sizes = sorted(times)
    seconds = {tokens: median(times[tokens]) for tokens in sizes}
    half = cluster["tokens_for_half"]
    if len(sizes) > 1:
        half = _tokens_for_half(seconds, sizes[0], sizes[-1])
    flops_of_token = work.flops * (1 + work.recomputed / 3) / work.tokens
    largest = sizes[-1]
    tflops = flops_of_token * (largest + half) / seconds[largest] / 1e12
    gb_per_s = work.touched_bytes / median(run.parts["optimizer"] for run in runs) / 1e9
    figures = dict(zip(CALIBRATED, (tflops, half, gb_per_s), strict=True))
    source = f"measured by {plural(len(runs), 'run')}"
    sources = {name: source for name in figures if name != "tokens_for_half" or len(sizes) > 1}
    return replace(cluster, figures={**cluster.figures, **figures}, sources={**cluster.sources, **sources})


def _tokens_for_half(seconds: dict[int, float], small: int, large: int) -> float:
    """Of t(n) = c (n + half), through both points; nothing below 0."""
    each = (seconds[large] - seconds[small]) / (large - small)
    if each <= 0:
        raise ConfigError(
            f"runs with microbatches of {small:,} and {large:,} tokens: the larger take no longer; their times say "
            "nothing about computing"
        )
    return max(0.0, seconds[small] / each - small)


def _check(runs: Sequence[Measured], plan: Estimate) -> None:
    """Errors: see ``calibrated``."""
    wanted = flatten(plan.config.model_dump(mode="json"))
    for run in runs:
        ranks = [f"mesh.{name}={run.settings[f'mesh.{name}']}" for name in ("tensor", "pipeline")]
        if ranks != ["mesh.tensor=1", "mesh.pipeline=1"] or run.settings["sync.name"] != "allreduce":
            raise ConfigError(
                f"{run.run_dir} has {' '.join(ranks)} sync.name={run.settings['sync.name']}: how fast a rank computes "
                "is told by runs of whole models, with sync.name=allreduce"
            )
        for key, value in run.settings.items():
            if any(fnmatchcase(key, pattern) for pattern in _ALIKE) and wanted.get(key, value) != value:
                raise ConfigError(f"{run.run_dir} has {key}={value}, the recipe {wanted[key]}: its times are others")
