"""What a run says as it begins and when it has ended: its first lines, and summary.json."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import hvdtrain
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.comm.mesh import grid
from hvdtrain.comm.mesh_map import describe_mesh, draw
from hvdtrain.comm.world import node_name
from hvdtrain.config import flatten
from hvdtrain.cut.combinations import bubble, notes_on
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.cut.stages import balance_of
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.engine import Engine
from hvdtrain.errors import plural
from hvdtrain.files import troubles, write_json
from hvdtrain.jobs.slurm import read_object
from hvdtrain.machine.peaks import Peak, find_peak, worth_measuring
from hvdtrain.models.matrices import block_matrices
from hvdtrain.opening import OpenRun
from hvdtrain.optim.optimizer import state_bytes
from hvdtrain.planner.workload import workload
from hvdtrain.slices import Slice
from hvdtrain.sync import needs_of
from hvdtrain.sync.needs import Trained
from hvdtrain.sync.traffic import mib
from hvdtrain.version import git_state, versions
from hvdtrain.watch.log import Log
from hvdtrain.watch.meter import memory_peak_mib


def announce(run: OpenRun, engine: Engine, log: Log, peak: Peak) -> None:
    """The first lines."""
    world, group, config = run.world, run.mesh.world, run.config
    log.say(
        f"hvdtrain: {plural(group.size, 'rank')} ({world.launcher}, {group.backend}), {run.device.type}, "
        f"{run.cores.note}, {config.precision} ({run.matmul})"
    )
    shown, notes = describe_mesh(run.mesh, run.device)
    for line in shown:
        log.say(f"hvdtrain: {line}")
    run.notes += notes
    if servers := run.mesh.servers:
        log.say(
            f"hvdtrain: training on {plural(group.size - servers, 'rank')}, parameters on {plural(servers, 'server')}"
        )
    if (drift := _drift(run, engine)) is not None:
        log.say(f"hvdtrain: not what one process trains: {drift}")
    if group.all_reduce is not None:
        log.say(f"hvdtrain: {group.all_reduce.about}")
    parameters = _parameters(run, engine)
    log.say(f"hvdtrain: {parameters}; {run.data.train.about}")
    if run.config.mesh.pipeline > 1:
        _announce_stages(run, log)
    if run.taken_over is not None and run.start.origin is not None:
        log.say(f"hvdtrain: {run.taken_over.in_words(run.start.origin)}")
        run.notes += run.taken_over.notes
    if run.scaled.factor != 1:
        log.say(f"hvdtrain: {run.scaled.about}")
    if run.start.checkpoint:
        log.say(f"hvdtrain: resumed from {run.start.checkpoint}")
    if peak.about:
        log.say(f"hvdtrain: {peak.about}")
    for name, signature in run.data.val.signatures.items():
        log.say(f"hvdtrain: {name} is {signature}")
    for note in run.notes:
        log.say(f"hvdtrain: note: {note}")


def _drift(run: OpenRun, engine: Engine) -> str | None:
    """How far the run may be from one process; None: it is equal, or one."""
    drift = engine.sync.drift
    return None if drift.is_exact or run.mesh.world.size == 1 else drift.bound


def _announce_stages(run: OpenRun, log: Log) -> None:
    config, found = run.config, _mesh_fields(run)
    log.say(
        f"hvdtrain: schedule {config.cut.schedule}, microbatches of a step {found['microbatches']}, "
        f"balance of stages {found['balance']:.2f}, bubble {found['bubble']:.0%}"
    )
    run.notes += notes_on(flatten(config.model_dump()), found["microbatches"])


def _mesh_fields(run: OpenRun) -> dict[str, Any]:
    """Of a run whose model is spread over ranks, for its summary (collective)."""
    config, mesh = run.config, run.config.mesh
    hosts = run.mesh.world.all_gather_object(node_name())
    microbatches = _microbatches(run)
    return {
        "tensor": mesh.tensor,
        "pipeline": mesh.pipeline,
        "schedule": config.cut.schedule if mesh.pipeline > 1 else None,
        "stages_per_rank": config.cut.stages_per_rank,
        "microbatches": microbatches,
        "balance": round(_balance(run), 4),
        "bubble": round(bubble(flatten(config.model_dump()), microbatches), 4),
        "hosts": [line.strip() for line in draw(grid(len(hosts), mesh.pipeline, mesh.tensor), hosts)],
    }


def _balance(run: OpenRun) -> float:
    """Of the ranks of the pipe: mean cost of their stages over that of the dearest."""
    costs, ranks = [stage.cost for stage in run.stages] or [1.0], run.config.mesh.pipeline
    return balance_of([sum(costs[rank::ranks]) for rank in range(ranks)])


def _microbatches(run: OpenRun) -> int:
    """Of the largest step (local)."""
    facts = CorpusFacts.of(run.data.corpora.manifest)
    return workload(run.config, facts, run.mesh.world.size).microbatches


def _parameters(run: OpenRun, engine: Engine) -> str:
    """How many, and what freezing some saves (collective)."""
    count, trained = _counts(engine)
    if trained == count:
        return f"{count:,} parameters"
    sent, otherwise = (_sent_mib(run, some) for some in (_trained_slices(engine), engine.replica.slices))
    less = f" (a rank sends {sent:.3g} MiB a step, not {otherwise:.3g})" if otherwise else ""
    return f"{count:,} parameters, {trained:,} of them trained{less}"


def _trained_slices(engine: Engine) -> list[Slice]:
    return [piece for piece in engine.replica.slices if piece.tensor.requires_grad]


def _sent_mib(run: OpenRun, slices: Sequence[Slice], microbatches: int = 1) -> float:
    """By the plan: what a rank that trains these sends in a step (local)."""
    config, held = run.config, Counter[int]()
    for piece in slices:
        held[piece.holders.size] += piece.tensor.numel()
    narrow = bool(PRECISIONS[config.precision].weights)
    ranks = run.mesh.world.size // config.mesh.ranks
    shapes = {piece.name: tuple(piece.tensor.shape) for piece in slices}
    in_blocks = sum(math.prod(shapes[name]) for name in block_matrices(shapes, config.model))
    state = state_bytes(config.optim, held.total(), in_blocks)
    trained = Trained(list(shapes.values()), state, ranks, run.last, microbatches, narrow, held)
    return mib(needs_of(config.sync, trained).sent)


def _counts(engine: Engine) -> tuple[int, int]:
    """All parameters of a replica, and those that are trained (collective)."""
    here = {piece.name: (math.prod(piece.whole), piece.tensor.requires_grad) for piece in engine.replica.slices}
    pieces = {name: one for held in engine.mesh.own.all_gather_object(here) for name, one in held.items()}.values()
    return sum(n for n, _ in pieces), sum(n for n, is_trained in pieces if is_trained)


def sum_up(
    run: OpenRun, engine: Engine, log: Log, progress: Progress, scores: Mapping[str, float], save_s: float
) -> dict[str, Any]:
    """Write and return the summary of a run that is finished (collective). save_s: of the last checkpoint."""
    _measure_peak(run, log)
    summary = _summary(run, engine, log, progress, scores) | {"save_s": round(save_s, 3)}
    run.claim.check()
    group = run.mesh.world
    group.on_main(lambda: write_json(run.run_dir / "summary.json", summary))
    return summary


def _measure_peak(run: OpenRun, log: Log) -> None:
    """After a long run on CPUs: what could they have done?"""
    group = run.mesh.world
    seconds = max(group.all_gather_object(log.metrics.wall_s))
    if worth_measuring(run.config.metrics.mfu, run.device, seconds):
        group.barrier()
        log.metrics.peak = find_peak("measure", run.device, run.config.precision).flops_per_s


def _summary(run: OpenRun, engine: Engine, log: Log, progress: Progress, scores: Mapping[str, float]) -> dict[str, Any]:
    group, metrics = run.mesh.world, log.metrics
    parameters, trained = _counts(engine)
    return {
        "status": "finished",
        "step": progress.step,
        "tokens": progress.tokens,
        **scores,
        **({"signatures": dict(run.data.val.signatures)} if run.data.val.signatures else {}),
        "from": read_object(run.run_dir / "from.json") or None,
        "parameters": parameters,
        "trained_parameters": trained,
        "weights": "raw" if engine.ema is None else "ema",
        "best_val_loss": engine.best_val_loss,
        "train_loss": None if math.isnan(metrics.last_loss) else metrics.last_loss,
        "noise_scale_tokens": engine.noise.value(),
        "noise_scale_note": engine.noise.why_not() or None,
        "skipped_steps": metrics.skipped,
        "scaling": run.scaled.about if run.scaled.factor != 1 else None,
        "tokens_per_s": round(metrics.tokens_per_s, 1),
        "model_tflops_per_s": metrics.flops_per_s and round(metrics.flops_per_s / 1e12, 6),
        "mfu": metrics.mfu and round(metrics.mfu, 4),
        "memory_peak_mib": round(max(group.all_gather_object(memory_peak_mib(run.device))), 1),
        "compile_s": log.compiling and round(log.compiling.seconds, 3),
        "wall_s": round(metrics.wall_s, 3),
        "startup_s": log.startup_s and round(log.startup_s, 3),
        "world_size": group.size,
        "replicas": run.mesh.replicas,
        "mesh": _mesh_fields(run) if run.config.mesh.ranks > 1 else None,
        "threads_per_rank": torch.get_num_threads(),
        "launcher": run.world.launcher,
        "backend": group.backend,
        "all_reduce": group.all_reduce and asdict(group.all_reduce),
        "drift": _drift(run, engine),
        "device": run.device.type,
        "precision": run.config.precision,
        "matmul": run.matmul,
        "data_digest": run.data.corpora.data_digest,
        "sample_digest": f"{progress.fingerprint:016x}",
        **engine.report(),
        "sent_planned_mib": _sent_mib(run, _trained_slices(engine), _microbatches(run)),
        "balance": log.balance.summary(),
        "fallbacks": [*run.notes, *log.notes],
        "file_troubles": dict(sum(map(Counter, group.all_gather_object(troubles())), Counter())),
        "versions": versions(),
        "git": git_state(Path(hvdtrain.__file__).parent),
    }
