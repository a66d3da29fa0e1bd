"""The training loop, to be read from top to bottom. It never names a mode."""

import contextlib
import json
import math
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdtrain import sizing
from hvdtrain.checkpoint import writer as checkpoint
from hvdtrain.checkpoint.saver import Saver
from hvdtrain.checkpoint.start import find_start, moved_rate
from hvdtrain.checkpoint.writer import Progress
from hvdtrain.comm.group import Group
from hvdtrain.comm.session import open_group
from hvdtrain.comm.silence import other_hosts
from hvdtrain.comm.world import World
from hvdtrain.config import RunConfig, dump_yaml, flatten, load_config
from hvdtrain.cut.compiling import CompileClock, check_compiler
from hvdtrain.data.carried import carry
from hvdtrain.data.corpora import Corpora, check_corpora, open_corpora, stage
from hvdtrain.data.loader import TrainLoader
from hvdtrain.data.stream import read_through_note
from hvdtrain.engine import Plan
from hvdtrain.errors import EXIT_OK, EXIT_STOPPED_EARLY, crash_code, say
from hvdtrain.files import read_text, troubles, write_text
from hvdtrain.jobs.claim import Claim
from hvdtrain.jobs.job_record import close_job, record_job
from hvdtrain.machine.cores import take_cores
from hvdtrain.machine.device import pick_device
from hvdtrain.machine.malloc import keep_freed_memory
from hvdtrain.machine.matmul import use_fast_matmul, use_tf32
from hvdtrain.machine.peaks import find_peak, worth_measuring
from hvdtrain.models.recompute import use_recompute
from hvdtrain.optim.ema import make_ema
from hvdtrain.optim.optimizer import make_optimizer
from hvdtrain.optim.scaling import Scaled
from hvdtrain.optim.schedules import learning_rate
from hvdtrain.planner.shortage import memory_explained
from hvdtrain.sync.replicas import ReplicaCheck, tensors_of
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import Evaluation, Training
from hvdtrain.version import git_state, versions
from hvdtrain.watch.meter import StepClock, memory_peak_mib
from hvdtrain.watch.metrics import Metrics, write_summary
from hvdtrain.watch.phases import Phases
from hvdtrain.watch.profiler import Profiler, parse_steps
from hvdtrain.watch.stopping import Stopping, StopSignals
from hvdtrain.watch.stragglers import Stragglers, own_seconds
from hvdtrain.watch.watchdog import Watchdog


def train(
    recipe: str,
    overrides: Sequence[str],
    run_dir: Path | None,
    resume: str,
    world: World,
    timeline: Path | None = None,
    signals: StopSignals | None = None,
) -> dict[str, Any]:
    """Train a recipe in ``run_dir`` (default ``runs/RECIPE``) and return its summary. Every rank calls this.

    A run that was asked to stop (``signals``, see stopping.py) returns the status "stopped", the step and the reason.

    resume: ``auto`` continues what is in ``run_dir``, ``never`` refuses to, a path continues that run in ``run_dir``.
    timeline: file for a record of every collective; None: no record.
    """
    with open_group(world, timeline is not None) as group:
        config = group.together(lambda: load_config(recipe, overrides))
        group.agree(flatten(config.model_dump()), "the configuration")
        run_dir = run_dir or Path("runs") / Path(recipe).stem
        words = [recipe, *overrides]
        hosts = other_hosts(group)
        with (
            Claim(run_dir, group) as claim,
            memory_explained(config, group.size, world.local_size),
            Watchdog(config.watchdog, run_dir, group, hosts) as dog,
        ):
            # Held by nothing here, so that memory_explained can let go of it.
            return _Run(words, config, run_dir, resume, world, group, timeline, signals, dog, claim).run()


@dataclass(frozen=True)
class _Data:
    """What a rank reads: checked, opened."""

    corpora: Corpora
    train: Training
    val: Evaluation


class _Run:
    """One run on one rank. ``run`` is the walk; the rest is what it needs before and after."""

    def __init__(
        self,
        words: list[str],
        config: RunConfig,
        run_dir: Path,
        resume: str,
        world: World,
        group: Group,
        timeline: Path | None,
        signals: StopSignals | None,
        watchdog: Watchdog,
        claim: Claim,
    ):
        self.words, self.watchdog, self.claim = words, watchdog, claim
        self.recipe, self.run_dir, self.world, self.group = config, run_dir, world, group
        self.config = config = group.together(lambda: sizing.sized(config, group.size))
        self.is_main = group.rank == 0
        self.stopping = group.together(lambda: Stopping(run_dir, config.stop, self.is_main, signals))
        self.cores = take_cores(group)
        torch.set_num_threads(self.cores.threads)
        # Everything that can be wrong with the input is found here, on all ranks, before the first collective.
        self.task = make_task(config.task)
        self.device, self.fallbacks = group.together(lambda: pick_device(config.device, world, group))
        self.fallbacks += self.stopping.notes
        self.data = self._open_data()
        self.fallbacks += group.together(lambda: read_through_note(self.data.train.source.read_through))
        self.scaled = group.together(self._scale)
        self.fallbacks += self.scaled.notes
        self.config = config = sizing.resolved(self.recipe, self.scaled)
        group.together(lambda: check_compiler(config.compile, self.device))
        use_tf32(config.tf32)
        self.matmul = "cuBLAS"
        if self.device.type == "cpu":
            keep_freed_memory()
            self.matmul = use_fast_matmul(config.precision)
        self.identity = {**config.identity(), **self.data.corpora.identity()}
        self.finished: dict[str, Any] | None = None
        self.progress, self.resumed_from, notes = self._find_start(resume)
        self.fallbacks += notes + moved_rate(self.progress, config.schedule, config.optim.lr, config.train.steps)
        if timeline is not None:
            self.fallbacks += group.together(lambda: group.start_timeline(timeline))

    def run(self) -> dict[str, Any]:
        if self.finished is not None:
            if self.is_main:
                steps = self.progress.step
                print(f"hvdtrain: {self.run_dir} is finished ({steps} steps); to train on, raise train.steps")
            return self.finished
        self.group.together(self.stopping.check_start)
        self.group.together(self._prepare_folder)
        with self._recorded():
            return self._train()

    def _train(self) -> dict[str, Any]:
        config, progress = self.config, self.progress
        model = self.task.make_model(config.model, self.data.corpora.manifest)
        model.initialise(config.seed)
        use_recompute(model, config.recompute)
        model.to(self.device).train()
        optimizer = make_optimizer(model, config.optim)
        self.ema = make_ema(model, config.ema)
        if self.resumed_from:
            self.group.together(lambda: checkpoint.load(self.resumed_from, model, optimizer, self.ema))
            if self.ema is not None and not checkpoint.has_ema(self.resumed_from):
                self.fallbacks.append(f"{self.resumed_from} has no averaged weights: the average begins there")
        self.compiling = CompileClock() if config.compile != "none" else None
        plan = Plan(model, self.group, config.sync, config.precision, config.seed, config.compile, config.guard)
        if plan.loss_scale is not None and progress.loss_scale is not None:
            plan.loss_scale.load(progress.loss_scale)
        if plan.guard is not None and progress.guard is not None:
            plan.guard.load(progress.guard)
        loader = TrainLoader(self.data.train.source, self.device)
        loader.rows_consumed = progress.rows_consumed
        closing = contextlib.closing
        with (
            closing(loader),
            closing(plan.sync),
            closing(self._open_metrics()) as metrics,
            self._phases() as phases,
            Saver(self.run_dir, self.group, config.checkpoint, progress.step, self.claim.check) as saver,
        ):
            self._announce(metrics, model)
            return self._walk(loader, plan, optimizer, metrics, phases, saver)

    def _walk(
        self,
        loader: TrainLoader,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        metrics: Metrics,
        phases: Phases,
        saver: Saver,
    ) -> dict[str, Any]:
        config, progress, steps = self.config, self.progress, self.config.train.steps
        task, stopping = self.task, self.stopping
        replicas, stragglers = ReplicaCheck(self.group), self._stragglers()
        best, scores, startup_s = progress.best_val_loss, {}, None

        stopping.begin()
        for step in range(progress.step + 1, steps + 1):
            self.step, is_last = step, step == steps
            save_is_due, eval_is_due = saver.is_due(step) or is_last, _due(step, config.eval.every, steps)
            if phases.begin(step):
                metrics.say(f"step {step}: wrote {self.run_dir}/profile")
            with phases("data"):
                microbatches = loader.next_step()
            with phases("compute"):
                plan.forward_backward(microbatches, task, step)
            with phases("sync"):
                sums = plan.finish(config.optim.clip_norm, stopping.asked())
            with phases("optimizer"):
                lr = learning_rate(config.schedule, config.optim.lr, steps, step - 1)
                plan.step(optimizer, lr)
                if self.ema is not None:
                    self.ema.update(step)
            self.claim.check()  # before anything is written
            metrics.add(step, loader.epoch, sums, lr, phases.end(), plan.flops, plan.guard)
            if stragglers is not None and _due(step, config.watchdog.stragglers_every, last=0):
                self._tell(metrics, stragglers.compare(self.group.all_gather_object(own_seconds(metrics.spent)), step))
            if startup_s is None:
                startup_s = _seconds_since_process_start()
                if self.compiling is not None:
                    metrics.say(f"hvdtrain: compiled in {self.compiling.seconds:.1f} s")

            stop_reason = None if is_last else stopping.agreed(sums.flags)
            phases.after("checkpoint")
            metrics.say_all(saver.poll())
            val_loss = None
            if eval_is_due:
                phases.after("evaluation")
                with stopping.measured("evaluation"):
                    scores = self._evaluate(plan, metrics)
                val_loss = scores["val_loss"]
                best = val_loss if best is None else min(best, val_loss)
                metrics.add_evaluation(step, scores)
                save_is_due |= saver.is_best(val_loss)
            phases.after("checkpoint")
            save_is_due |= bool(stop_reason)
            if save_is_due or _due(step, config.watchdog.check_replicas_every, last=0):
                replicas.check(tensors_of(plan.model), step)
            if save_is_due:
                metrics.doing("saving")
                plan.check_finite(step)
                progress = self._progress(step, loader, plan, metrics, best)
                ends = is_last or bool(stop_reason)
                metrics.say_all(saver.save(plan.model, optimizer, progress, self.ema, val_loss, last=ends))
                stopping.keep_free("saving", saver.save_s)
            if stop_reason:
                metrics.say(f"hvdtrain: stopped at step {step} ({stop_reason}); the same command goes on")
                self.end = EXIT_STOPPED_EARLY, stop_reason
                return {"status": "stopped", "step": step, "reason": stop_reason}

        if not scores:  # resumed after the last step, but before its summary was written
            phases.after("evaluation")
            scores = self._evaluate(plan, metrics)
            best = scores["val_loss"] if best is None else min(best, scores["val_loss"])
        self.fallbacks += saver.failures
        self._measure_peak(metrics)
        summary = self._summary(progress, scores, best, metrics, startup_s)
        self.claim.check()
        self.group.together(lambda: write_summary(self.run_dir, summary) if self.is_main else None)
        return summary

    def _evaluate(self, plan: Plan, metrics: Metrics) -> dict[str, float]:
        """Scores of the validation split; of the averaged weights, where there are any."""
        with self.ema.swapped(plan.publish) if self.ema is not None else contextlib.nullcontext():
            batches = metrics.evaluating(self.data.val(), self.data.val.count)
            return plan.evaluate(self.watchdog.each(batches), self.task)

    def _open_metrics(self) -> Metrics:
        progress, steps = self.progress, self.config.train.steps
        options = self.config.metrics
        self.group.barrier()  # ranks of a node measure at the same time: each finds its share of the machine
        self.peak = find_peak(options.mfu, self.device, self.config.precision, self.config.tf32)
        peak = self.peak.flops_per_s
        metrics = Metrics(self.run_dir, options, steps, self.is_main, progress.step, progress.tokens, self.device, peak)
        if progress.noise is not None:
            metrics.noise.load(progress.noise)
        return metrics

    def _phases(self) -> Phases:
        steps = parse_steps(self.config.metrics.profile)
        profiler = Profiler(steps, self.run_dir, self.group.rank, self.device)
        return Phases(StepClock(self.device), profiler, self.watchdog)

    def _stragglers(self) -> Stragglers | None:
        options = self.config.watchdog
        if self.group.size == 1 or not options.stragglers_every:
            return None
        hosts = self.group.all_gather_object(socket.gethostname())
        return Stragglers(options.straggler_factor, hosts, self.progress.step)

    def _tell(self, metrics: Metrics, notes: list[str]) -> None:
        self.fallbacks += notes
        metrics.say_all(f"hvdtrain: note: {note}" for note in notes)

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """The job's record in the run folder, from now on to whatever end it takes (collective at its beginning)."""
        self.step = self.progress.step
        folders = {str(folder): manifest.data_digest for folder, manifest in self.data.corpora.entries}
        data = {**self.data.corpora.identity(), "folders": folders}
        config, group = self.config, self.group
        folder, notes = record_job(
            self.run_dir, self.words, group, self.world, config, data, self.step, config.train.steps
        )
        self.fallbacks += notes
        self.end = EXIT_OK, "finished"
        try:
            yield
        except BaseException as error:
            self.end = getattr(error, "exit_code", crash_code(error)), str(error)
            raise
        finally:
            for note in close_job(folder, *self.end, self.step) if self.is_main else ():
                say(f"note: {note}")

    def _measure_peak(self, metrics: Metrics) -> None:
        """After a long run on CPUs: what could they have done? (collective)"""
        seconds = max(self.group.all_gather_object(metrics.wall_s))
        if worth_measuring(self.config.metrics.mfu, self.device, seconds):
            self.group.barrier()
            metrics.peak = find_peak("measure", self.device, self.config.precision).flops_per_s

    def _scale(self) -> Scaled:
        """Batch, rates and lengths of this run, now that the ranks and the size of an epoch are known (local)."""
        source, train = self.data.train.source, self.config.train
        update_tokens = train.global_tokens or train.global_batch * self.config.model.context
        epoch_tokens = source.rows_per_epoch * update_tokens // source.rows_per_step
        return sizing.scaled(self.recipe, self.group.size, epoch_tokens)

    def _open_data(self) -> _Data:
        """Find out what is wrong with the data now, on all ranks, and open what is right (collective)."""
        config, group, world = self.config, self.group, self.world
        feed = group.together(lambda: sizing.feed_of(config, group.rank, group.size, pin=self.device.type == "cuda"))
        corpora = group.together(lambda: open_corpora(config.data))
        group.agree(corpora.data_digest, f"the data in {corpora.names}")
        group.together(lambda: self.task.check(corpora, feed))
        sharing = group.rank, group.size
        if config.data.stage:
            corpora = stage(corpora, Path(config.data.stage), world.local_rank == 0, group.together)
            sharing = world.local_rank, world.local_size  # each node has a copy of its own
        if config.data.verify == "full":
            group.together(lambda: check_corpora(corpora, *sharing, torch.get_num_threads()))

        def open_splits() -> _Data:
            train = self.task.open_training(corpora, feed)
            return _Data(corpora, train, self.task.open_evaluation(corpora, "val", feed, config.eval.rows))

        return group.together(open_splits)

    def _find_start(self, resume: str) -> tuple[Progress, Path | None, list[str]]:
        """Where to begin (collective). The run folder is ours from here on, unless nothing is left to do in it."""
        summary = self.group.all_gather_object(_read_summary(self.run_dir))[0]
        if summary.get("step", -1) >= self.config.train.steps:
            found = find_start(self.run_dir, resume, self.identity, self.group, False, RunConfig().identity())
            if found[0].step == summary["step"]:
                self.finished = summary
                return found
        found = None
        if resume not in ("auto", "never") and not self._has_checkpoints():
            # Another run's checkpoint is only read: one that does not fit is refused before this folder is anybody's.
            found = find_start(self.run_dir, resume, self.identity, self.group, False, RunConfig().identity())
        self.claim.take()
        if found is None or self._has_checkpoints():
            found = find_start(self.run_dir, resume, self.identity, self.group, True, RunConfig().identity())
        return found

    def _has_checkpoints(self) -> bool:
        """Does the run folder hold any? As rank 0 sees it (collective)."""
        saved = self.group.together(lambda: self.is_main and bool(checkpoint.steps_saved(self.run_dir)))
        return self.group.all_gather_object(saved)[0]

    def _prepare_folder(self) -> None:
        if self.is_main:
            write_text(self.run_dir / "config.yaml", dump_yaml(self.recipe))
            carry(self.run_dir, self.config.data, self.data.corpora)

    def _announce(self, metrics: Metrics, model: torch.nn.Module) -> None:
        world, ranks = self.world, _count(self.group.size, "rank")
        parameters = sum(p.numel() for p in model.parameters())
        metrics.say(
            f"hvdtrain: {ranks} ({world.launcher}, {self.group.backend}), {self.device.type}, "
            f"{self.cores.note}, {self.config.precision} ({self.matmul})"
        )
        metrics.say(f"hvdtrain: {parameters:,} parameters; {self.data.train.about}")
        if self.scaled.factor != 1:
            metrics.say(f"hvdtrain: {self.scaled.about}")
        if self.resumed_from:
            metrics.say(f"hvdtrain: resumed from {self.resumed_from}")
        if self.peak.about:
            metrics.say(f"hvdtrain: {self.peak.about}")
        for fallback in self.fallbacks:
            metrics.say(f"hvdtrain: note: {fallback}")

    def _progress(self, step: int, loader: TrainLoader, plan: Plan, metrics: Metrics, best: float | None) -> Progress:
        own = sum(self.group.all_gather_object(loader.fingerprint))
        return replace(
            self.progress,
            step=step,
            rows_consumed=loader.rows_consumed,
            tokens=int(metrics.tokens),
            fingerprint=(self.progress.fingerprint + own) % (1 << 64),
            best_val_loss=best,
            identity=self.identity,
            loss_scale=plan.loss_scale and plan.loss_scale.state(),
            noise=metrics.noise.state(),
            guard=plan.guard and plan.guard.state(),
            run_steps=self.config.train.steps,
            world_size=self.group.size,
            versions=versions(),
        )

    def _summary(
        self,
        progress: Progress,
        scores: dict[str, float],
        best: float | None,
        metrics: Metrics,
        startup_s: float | None,
    ) -> dict[str, Any]:
        return {
            "status": "finished",
            "step": progress.step,
            "tokens": progress.tokens,
            **scores,
            "weights": "raw" if self.ema is None else "ema",
            "best_val_loss": best,
            "train_loss": None if math.isnan(metrics.last_loss) else metrics.last_loss,
            "noise_scale_tokens": metrics.noise.value(),
            "skipped_steps": metrics.skipped,
            "scaling": self.scaled.about if self.scaled.factor != 1 else None,
            "tokens_per_s": round(metrics.tokens_per_s, 1),
            "model_tflops_per_s": metrics.flops_per_s and round(metrics.flops_per_s / 1e12, 6),
            "mfu": metrics.mfu and round(metrics.mfu, 4),
            "memory_peak_mib": round(max(self.group.all_gather_object(memory_peak_mib(self.device))), 1),
            "compile_s": self.compiling and round(self.compiling.seconds, 3),
            "wall_s": round(metrics.wall_s, 3),
            "startup_s": startup_s and round(startup_s, 3),
            "world_size": self.group.size,
            "threads_per_rank": torch.get_num_threads(),
            "launcher": self.world.launcher,
            "backend": self.group.backend,
            "device": self.device.type,
            "precision": self.config.precision,
            "matmul": self.matmul,
            "data_digest": self.data.corpora.data_digest,
            "sample_digest": f"{progress.fingerprint:016x}",
            "fallbacks": self.fallbacks,
            "file_troubles": dict(sum(map(Counter, self.group.all_gather_object(troubles())), Counter())),
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
        }


def _read_summary(run_dir: Path) -> dict[str, Any]:
    """That of a run that has ended; else an empty one."""
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(read_text(run_dir / "summary.json"))
        if isinstance(summary, dict) and isinstance(summary.get("step"), int):
            return summary
    return {}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _seconds_since_process_start() -> float:
    """Wall time since this process began, imports and all (Linux)."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")
