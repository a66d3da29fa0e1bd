"""What a run says as it begins and when it has ended: its first lines, and summary.json."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import hvdtrain
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.engine import Engine
from hvdtrain.errors import plural
from hvdtrain.files import troubles, write_json
from hvdtrain.machine.peaks import Peak, find_peak, worth_measuring
from hvdtrain.opening import OpenRun
from hvdtrain.version import git_state, versions
from hvdtrain.watch.log import Log
from hvdtrain.watch.meter import memory_peak_mib


def announce(run: OpenRun, engine: Engine, log: Log, peak: Peak) -> None:
    """The first lines."""
    world, group, config = run.world, run.mesh.world, run.config
    parameters = sum(math.prod(piece.whole) for piece in engine.replica.slices)
    log.say(
        f"hvdtrain: {plural(group.size, 'rank')} ({world.launcher}, {group.backend}), {run.device.type}, "
        f"{run.cores.note}, {config.precision} ({run.matmul})"
    )
    log.say(f"hvdtrain: {parameters:,} parameters; {run.data.train.about}")
    if run.scaled.factor != 1:
        log.say(f"hvdtrain: {run.scaled.about}")
    if run.start.checkpoint:
        log.say(f"hvdtrain: resumed from {run.start.checkpoint}")
    if peak.about:
        log.say(f"hvdtrain: {peak.about}")
    for note in run.notes:
        log.say(f"hvdtrain: note: {note}")


def sum_up(run: OpenRun, engine: Engine, log: Log, progress: Progress, scores: Mapping[str, float]) -> dict[str, Any]:
    """Write and return the summary of a run that is finished (collective)."""
    _measure_peak(run, log)
    summary = _summary(run, engine, log, progress, scores)
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
    return {
        "status": "finished",
        "step": progress.step,
        "tokens": progress.tokens,
        **scores,
        "weights": "raw" if engine.ema is None else "ema",
        "best_val_loss": engine.best_val_loss,
        "train_loss": None if math.isnan(metrics.last_loss) else metrics.last_loss,
        "noise_scale_tokens": engine.noise.value(),
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
        "threads_per_rank": torch.get_num_threads(),
        "launcher": run.world.launcher,
        "backend": group.backend,
        "device": run.device.type,
        "precision": run.config.precision,
        "matmul": run.matmul,
        "data_digest": run.data.corpora.data_digest,
        "sample_digest": f"{progress.fingerprint:016x}",
        **engine.sync.report(),
        "fallbacks": [*run.notes, *log.notes],
        "file_troubles": dict(sum(map(Counter, group.all_gather_object(troubles())), Counter())),
        "versions": versions(),
        "git": git_state(Path(hvdtrain.__file__).parent),
    }
