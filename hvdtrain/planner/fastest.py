"""``hvdtrain plan --cluster FILE --fit``: the meshes with which a recipe fits a cluster's memory, the fastest first.

With ``--from RUN...`` a rank is as fast as those runs have measured it to be (calibrate.py).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.config import load_config, run_folders
from hvdtrain.errors import ConfigError
from hvdtrain.planner.calibrate import CALIBRATED, calibrated
from hvdtrain.planner.cluster import Cluster, read_cluster
from hvdtrain.planner.cost import StepTime, step_time, work_of
from hvdtrain.planner.estimate import Estimate, estimate, in_columns
from hvdtrain.planner.proposals import Proposals, as_rows, propose
from hvdtrain.sync import SyncOptions

_GIB = 1 << 30
_WORTH = 0.98  # of its time, below which a wire of fewer bits is proposed: it rounds


@dataclass(frozen=True)
class Timed:
    plan: Estimate
    time: StepTime


def plan_fastest(
    recipe: str,
    overrides: Sequence[str],
    ranks: int,
    cluster: str,
    ranks_per_node: int = 0,
    vocab_size: int = 0,
    as_json: bool = False,
    run_dir: Path | None = None,
    runs: Sequence[Path] = (),
) -> str:
    """What the command prints. Errors: see ``plan``, ``read_cluster``, ``calibrated``; ConfigError where nothing
    fits.
    """
    of_cluster = read_cluster(cluster)
    config = load_config(recipe, overrides, run_folders(recipe, run_dir))
    per_node = min(ranks_per_node or int(of_cluster["ranks_per_node"]), ranks)
    if runs:
        alone = config.model_copy(update={"mesh": MeshOptions(), "sync": SyncOptions()})
        of_cluster = calibrated(of_cluster, runs, estimate(alone, 1, 1, vocab_size))
    found = propose(config, ranks, int(of_cluster["memory_gib"] * _GIB), per_node, vocab_size)
    if not found.fit:
        raise ConfigError(
            f"nothing fits {ranks:,} ranks of {of_cluster['memory_gib']:g} GiB: {'; '.join(found.refused)}; take more "
            "ranks, or a smaller model.context"
        )
    timed = in_order(found.fit, of_cluster, ranks, per_node, vocab_size)
    rows = [_row(one) for one in timed]
    if as_json:
        tree = {"recipe": recipe, "cluster": of_cluster.name, "figures": dict(of_cluster.figures)}
        return json.dumps({**tree, "meshes": rows, "refused": found.refused}, indent=1)
    return _as_text(recipe, ranks, of_cluster, rows, found.refused, measured=bool(runs))


def in_order(
    plans: Sequence[Estimate], cluster: Cluster, ranks: int, ranks_per_node: int, vocab_size: int
) -> list[Timed]:
    """The fastest first; each with the wire that is worth it."""
    timed = []
    for plan in plans:
        first, *others = [
            Timed(one, step_time(work_of(one), cluster)) for one in _wires(plan, ranks, ranks_per_node, vocab_size)
        ]
        timed.append(min([first, *(one for one in others if one.time.total < _WORTH * first.time.total)], key=_total))
    return sorted(timed, key=_total)


def _total(one: Timed) -> float:
    return one.time.total


def _wires(plan: Estimate, ranks: int, ranks_per_node: int, vocab_size: int) -> Iterator[Estimate]:
    yield plan
    sync = plan.config.sync
    if plan.load.replicas > 1 and sync.name in ("allreduce", "zero") and _wire(plan) == "fp32":
        options = getattr(sync, sync.name)
        narrow = sync.model_copy(update={sync.name: options.model_copy(update={"wire": "bf16"})})
        yield estimate(plan.config.model_copy(update={"sync": narrow}), ranks, ranks_per_node, vocab_size)


def _wire(plan: Estimate) -> str:
    """ZeRO has one of its own."""
    sync = plan.config.sync
    return sync.zero.wire if sync.name == "zero" else sync.allreduce.wire


def _row(one: Timed) -> dict[str, Any]:
    (row,) = as_rows(Proposals([one.plan], []))
    parts = {name: round(seconds, 6) for name, seconds in one.time.parts.items()}
    return {**row, "wire": _wire(one.plan), "step_s": round(one.time.total, 6), "parts_s": parts}


def _as_text(
    recipe: str,
    ranks: int,
    cluster: Cluster,
    rows: Sequence[dict[str, Any]],
    refused: Sequence[str],
    measured: bool,
) -> str:
    names = ("tensor", "pipeline", "replicas", "zero", "recompute", "microbatch", "wire")
    head = (*names, "GiB a rank", "bubble", "step s", *(part for part in rows[0]["parts_s"] if part != "compute"))
    table = [
        (
            *(str(row[name]) for name in names),
            f"{row['memory_bytes'] / _GIB:.2f}",
            f"{row['bubble']:.0%}",
            f"{row['step_s']:.4f}",
            *(f"{seconds:.4f}" for part, seconds in row["parts_s"].items() if part != "compute"),
        )
        for row in rows
    ]
    lines = [
        f"plan: {recipe}, {ranks:,} ranks of {cluster.name}, {cluster['memory_gib']:g} GiB each; fastest first",
        *in_columns([head, *table]),
    ]
    if measured:
        source = cluster.sources["tflops"]
        told = (f"{name} {cluster[name]:.4g}" for name in CALIBRATED if cluster.sources[name] == source)
        lines.append(f"  {source}: {', '.join(told)}")
    if refused:
        lines += ["", "do not fit:", *(f"  {reason}" for reason in refused)]
    return "\n".join(lines)
