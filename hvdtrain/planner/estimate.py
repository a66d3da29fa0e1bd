"""``hvdtrain plan``: what a recipe will need on a number of ranks, printed before anything is started."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdtrain import sizing
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.config import RunConfig, flatten, load_config, run_folders
from hvdtrain.cut.combinations import bubble, check_combination, note_on_nodes, notes_on, notes_on_sync
from hvdtrain.data.corpora import CorpusFacts, open_corpora
from hvdtrain.data.shards import has_labels
from hvdtrain.errors import ConfigError, plural
from hvdtrain.files import exists
from hvdtrain.machine.matmul import use_fast_matmul
from hvdtrain.planner.memory import Memory, memory
from hvdtrain.planner.workload import Workload, check_ranks, workload
from hvdtrain.sync import check_sync
from hvdtrain.tasks import make_task

_MIB = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """``notes``: what the reader has to know about it."""

    config: RunConfig
    load: Workload
    memory: Memory
    notes: list[str]


def plan(
    recipe: str,
    overrides: Sequence[str],
    ranks: int,
    ranks_per_node: int = 0,
    vocab_size: int = 0,
    as_json: bool = False,
    run_dir: Path | None = None,
) -> str:
    """What ``hvdtrain plan`` prints: a table, or JSON. One process; nothing is trained, no model allocated.

    ranks_per_node: 0: all on one node. vocab_size: of data that are not there yet; 0: the data say it. run_dir: of a
    run that goes on; None: runs/RECIPE, as in ``train``.

    Errors: ConfigError for settings that cannot be, or a vocabulary that nobody has told; DataError for data that are
    damaged or that the task does not read.
    """
    found = estimate(load_config(recipe, overrides, run_folders(recipe, run_dir)), ranks, ranks_per_node, vocab_size)
    return as_text(recipe, found) if not as_json else json.dumps(as_tree(recipe, found), indent=1)


def estimate(config: RunConfig, ranks: int, ranks_per_node: int = 0, vocab_size: int = 0) -> Estimate:
    """``plan`` of settings, as numbers. On a CPU it sets this process's matrix library as a run would (local)."""
    check_ranks(ranks, ranks_per_node)
    check_combination(flatten(config.model_dump()))
    replicas = config.replicas_of(ranks)
    recipe, config = config, sizing.sized(config, replicas)
    facts, epoch_tokens, notes = read_facts(config, replicas, vocab_size)
    scaled = sizing.scaled(recipe, replicas, epoch_tokens)
    config = sizing.resolved(recipe, scaled)
    check_sync(config.sync, replicas, config.train.steps)
    notes += [scaled.about, *scaled.notes] if scaled.factor != 1 else scaled.notes
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            notes.append("no GPU here, so the plan is a CPU's; device=cuda plans for a GPU")
    load = workload(config, facts, ranks, ranks_per_node)
    fast_fp32 = device == "cpu" and config.precision == "fp32" and use_fast_matmul("fp32") == "oneDNN"
    found = memory(config, facts, load, device, math_attention=fast_fp32)
    notes += found.assumptions
    notes += notes_on(flatten(config.model_dump()), load.microbatches) + notes_on_sync(flatten(config.model_dump()))
    notes += note_on_nodes(config.mesh.tensor, load.ranks_per_node, load.nodes)
    if fast_fp32:
        notes.append("attention: keeps T x T scores, as on this AMD processor in fp32 (machine/matmul.py)")
    return Estimate(config, load, found, notes)


def read_facts(config: RunConfig, replicas: int, vocab_size: int = 0) -> tuple[CorpusFacts, int, list[str]]:
    """What the run's data say, how many tokens an epoch has (0: not known), and notes. Errors: see ``plan``.

    config: with the batch of these replicas.
    """
    names = list(config.data.mixture) or [config.data.dir]
    task = make_task(config.task)
    missing = [name for name in names if not exists(Path(name) / "manifest.json")]
    if missing:
        if vocab_size < 1:
            raise ConfigError(
                f"no shards in {missing[0]}, so the vocabulary is not known; give --vocab-size N, or data.dir=DIR"
            )
        classes = " and 2 labels" if has_labels(task.kind) else ""
        note = f"no shards in {missing[0]}: planned for a vocabulary of {vocab_size:,}{classes}, without its files"
        return CorpusFacts(vocab_size), 0, [note]
    corpora = open_corpora(config.data)
    feed = sizing.feed_of(config, 0, replicas)
    task.check(corpora, feed)
    manifest = corpora.manifest
    if vocab_size and vocab_size != manifest.vocab_size:
        raise ConfigError(
            f"--vocab-size {vocab_size}, but {corpora.names} has a vocabulary of {manifest.vocab_size}; leave it out"
        )
    training = task.open_training(corpora, feed)  # opens files, reads no token
    epoch_tokens, longest = sizing.epoch_tokens_of(config, training.source), training.longest_row
    shards = [info for _, one in corpora.entries for info in one.shards]
    tokens = sum(info.tokens for _, one in corpora.entries for info in one.split("train"))
    facts = replace(
        CorpusFacts.of(manifest),
        longest=longest,
        train_tokens=tokens if task.rows_are_alike else 0,
        shard_bytes=sum(info.file_bytes for info in shards),
        documents=sum(info.documents for info in shards),
    )
    notes = [f"rows: as long as the longest that is trained on, {longest} tokens"] if longest else []
    return facts, epoch_tokens, notes


# --- printing -----------------------------------------------------------------------------------------------------


def as_tree(recipe: str, found: Estimate) -> dict[str, Any]:
    """For machines: sizes in bytes, everything else as its name says."""
    return {
        "recipe": recipe,
        "precision": found.config.precision,
        "device": found.memory.device,
        "workload": asdict(found.load),
        "memory_bytes": {**found.memory.parts, "of a layer": found.memory.of_layer, "total": found.memory.total},
        "memory_peak_mib": round(found.memory.total / _MIB, 1),
        "sent_bytes": found.memory.sent,
        "balance": round(found.memory.balance, 4),
        "notes": found.notes,
    }


def as_text(recipe: str, found: Estimate) -> str:
    load, held, config = found.load, found.memory, found.config
    ranks = plural(load.ranks, "rank", ",")
    where = f"{ranks} on {plural(load.nodes, 'node', ',')}" if load.nodes > 1 else ranks
    length = f"{load.positions:,}"
    end = f", at the end {load.min_lr:g}" if config.schedule.name != "constant" else ""
    epochs = f", {load.epochs:.2f} epochs" if load.epochs is not None else ""
    task = make_task(config.task)
    fixed = task.rows_are_alike and not task.rows_are_packed
    rows = [
        ("global batch", f"{load.global_batch:,} x {length}", f"tokens, {load.global_tokens:,} in all"),
        ("a rank's share", f"{load.rows_of_rank:,} x {length}", "" if fixed else "at most"),
        ("microbatches", f"{load.microbatches:,}", f"of {load.microbatch:,} x {length}"),
        ("learning rate", f"{load.lr:g}", f"{config.schedule.name}{end}"),
        ("warm-up", f"{load.warmup_steps:,}", "steps"),
        ("steps", f"{load.steps:,}", ""),
        ("tokens", f"{load.tokens:,}", f"{'' if fixed else 'at most'}{epochs}".removeprefix(", ")),
        ("parameters", f"{load.parameters:,}", ""),
        ("model FLOPs", f"{load.flops_of_step / 1e9:,.1f}", "GFLOP a step and rank"),
        *_of_mesh(found),
    ]
    more = {"activations": f"{held.of_layer / _MIB:,.1f} a layer"}
    parts = [(name, f"{size / _MIB:,.1f}", more.get(name, "")) for name, size in held.parts.items() if size]
    total = f"{held.total / _MIB:,.1f}"
    on_node = f"{held.total * load.ranks_per_node / _MIB:,.1f} on a node" if load.ranks_per_node > 1 else ""
    lines = [
        f"plan: {recipe}, {where}, {held.device}, {config.precision}",
        *_table(rows),
        "",
        "memory of a rank at its peak, MiB",
        *_table([*parts, ("total", total, on_node)]),
    ]
    return "\n".join([*lines, "", *(f"note: {note}" for note in found.notes)])


_SENT = {
    "replica": ("sent", "MiB a step and rank: {sync}"),
    "tensor": ("sent in layers", "MiB: sums over mesh.tensor={tensor}"),
    "pipe": ("sent by stages", "MiB: activations and their gradients"),
}


def _of_mesh(found: Estimate) -> list[tuple[str, str, str]]:
    config, mesh, cut = found.config, found.config.mesh, found.config.cut
    name, wire = config.sync.name, config.sync.allreduce.wire
    words = {"sync": f"gradients ({wire})" if name == "allreduce" else f"sync.name={name}", "tensor": mesh.tensor}
    rows = [
        (name, f"{size / _MIB:,.1f}", said.format_map(words))
        for axis, (name, said) in _SENT.items()
        if (size := found.memory.sent[axis]) or axis == "replica"
    ]
    if mesh.ranks > 1:
        rows.append(("replicas", f"{found.load.replicas:,}", f"of {mesh.ranks} ranks: {_axes(mesh)}"))
    if mesh.pipeline > 1:
        waits = bubble(flatten(config.model_dump()), found.load.microbatches)
        rows.append(
            ("bubble", f"{waits:.0%}", f"of a step ({cut.schedule}), balance of stages {found.memory.balance:.2f}")
        )
    return rows


def _axes(mesh: MeshOptions) -> str:
    sizes = {"tensor": mesh.tensor, "pipeline": mesh.pipeline}
    return " x ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size > 1)


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers under one another; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {name:<{names}}  {value:>{values}}  {more}".rstrip() for name, value, more in rows]
