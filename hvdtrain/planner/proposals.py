"""Meshes that fit a given memory: of every way to divide the ranks, the cheapest settings with which a rank has room.

Cheap is what costs no arithmetic and little traffic, so these are tried in turn:

    as the recipe is -> ZeRO 1 -> ZeRO 2 -> smaller microbatches -> blocks that are computed again
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.config import RunConfig, flatten, load_config, run_folders
from hvdtrain.cut.combinations import bubble
from hvdtrain.errors import ConfigError
from hvdtrain.planner.estimate import Estimate, estimate, in_columns, read_facts
from hvdtrain.planner.workload import check_ranks

_UNITS = {"": 1, "B": 1} | {f"{p}iB": 1 << 10 * n for n, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}
_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Proposals:
    """fit: those with least traffic first. refused: what does not fit, and why."""

    fit: list[Estimate]
    refused: list[str]


def bytes_in(text: str) -> int:
    """``80GiB``, ``80GB``, ``500 MiB``. Errors: ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f"--memory {text}: expected a size like 80GiB, 24GB or 500MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def plan_meshes(
    recipe: str,
    overrides: Sequence[str],
    ranks: int,
    memory: str,
    ranks_per_node: int = 0,
    vocab_size: int = 0,
    as_json: bool = False,
    run_dir: Path | None = None,
) -> str:
    """What ``hvdtrain plan --memory`` prints: see ``plan`` for its words and errors."""
    config, size = load_config(recipe, overrides, run_folders(recipe, run_dir)), bytes_in(memory)
    found = propose(config, ranks, size, ranks_per_node, vocab_size)
    if as_json:
        return json.dumps({"recipe": recipe, "meshes": as_rows(found), "refused": found.refused}, indent=1)
    return as_text(recipe, ranks, size, found)


def propose(config: RunConfig, ranks: int, memory: int, ranks_per_node: int = 0, vocab_size: int = 0) -> Proposals:
    """memory: bytes that a rank may have. One process; nothing is trained, no model allocated.

    Errors: see ``plan``, for what no mesh would change.
    """
    check_ranks(ranks, ranks_per_node)
    read_facts(config, 1, vocab_size)  # what is wrong with the data is so for every mesh
    found = Proposals([], [])
    for tensor, pipeline in _divisions(ranks):
        name = f"mesh.tensor={tensor} mesh.pipeline={pipeline}"
        least, reason = None, ""
        for changed in _variants(config, tensor, pipeline, ranks):
            try:
                one = estimate(changed, ranks, ranks_per_node, vocab_size)
            except ConfigError as error:
                reason = reason or str(error)
                continue
            if one.memory.total <= memory:
                found.fit.append(one)
                break
            least = min(one.memory.total, least or one.memory.total)
        else:
            needs = "" if least is None else f"a rank needs {least / _GIB:.2f} GiB at least, of {memory / _GIB:.2f}"
            found.refused.append(f"{name}: {needs or reason}")
    found.fit.sort(key=lambda one: (sum(one.memory.sent.values()), one.memory.total))
    return found


def _divisions(ranks: int) -> Iterator[tuple[int, int]]:
    for tensor in range(1, ranks + 1):
        for pipeline in range(1, ranks // tensor + 1):
            if ranks % (tensor * pipeline) == 0:
                yield tensor, pipeline


def _variants(config: RunConfig, tensor: int, pipeline: int, ranks: int) -> Iterator[RunConfig]:
    """From the cheapest on. The recipe's own schedule, and what it has of these already, stay."""
    config = _with(config, "mesh", tensor=tensor, pipeline=pipeline)
    syncs = [config.sync]
    if config.sync.name == "allreduce" and ranks > tensor * pipeline:
        stages = (1, 2) if pipeline == 1 else (1,)
        zeros = [config.sync.zero.model_copy(update={"stage": stage}) for stage in stages]
        syncs += [config.sync.model_copy(update={"name": "zero", "zero": zero}) for zero in zeros]
    for sync in syncs:
        yield config.model_copy(update={"sync": sync})
    smallest = config.model_copy(update={"sync": syncs[-1]})
    sizes = [size for size in (16, 8, 4, 2, 1) if size < (config.train.microbatch or 32)]
    for microbatch in sizes:
        yield _with(smallest, "train", microbatch=microbatch)
    if config.recompute.name != "full":
        for microbatch in [config.train.microbatch, *sizes]:
            yield _with(_with(smallest, "train", microbatch=microbatch), "recompute", name="full", every=1)


def _with(config: RunConfig, room: str, **changed: Any) -> RunConfig:
    return config.model_copy(update={room: getattr(config, room).model_copy(update=changed)})


# --- printing -----------------------------------------------------------------------------------------------------


def as_rows(found: Proposals) -> list[Mapping[str, Any]]:
    """For machines: sizes in bytes."""
    return [
        {
            "tensor": one.config.mesh.tensor,
            "pipeline": one.config.mesh.pipeline,
            "replicas": one.load.replicas,
            "zero": one.config.sync.zero.stage if one.config.sync.name == "zero" else 0,
            "recompute": one.config.recompute.name,
            "microbatch": one.load.microbatch,
            "memory_bytes": one.memory.total,
            "sent_bytes": one.memory.sent,
            "bubble": round(bubble(flatten(one.config.model_dump()), one.load.microbatches), 4),
        }
        for one in found.fit
    ]


def as_text(recipe: str, ranks: int, memory: int, found: Proposals) -> str:
    lines = [f"plan: {recipe}, {ranks:,} ranks of at most {memory / _GIB:.2f} GiB; least traffic first"]
    head = ("tensor", "pipeline", "replicas", "zero", "recompute", "microbatch", "GiB a rank", "MiB sent", "bubble")
    rows = [
        (
            *(str(row[name]) for name in head[:6]),
            f"{row['memory_bytes'] / _GIB:.2f}",
            f"{sum(row['sent_bytes'].values()) / _MIB:,.0f}",
            f"{row['bubble']:.0%}",
        )
        for row in as_rows(found)
    ]
    lines += in_columns([head, *rows]) if rows else ["  none fits: take more ranks, or a smaller model.context"]
    if found.refused:
        lines += ["", "do not fit:", *(f"  {reason}" for reason in found.refused)]
    return "\n".join(lines)
