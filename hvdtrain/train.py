"""The training loop, to be read from top to bottom. It never names a mode."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.building import Loader, open_engine, open_loader, open_log
from hvdtrain.checkpoint.saver import Saver
from hvdtrain.comm.session import open_group
from hvdtrain.comm.silence import other_hosts
from hvdtrain.comm.world import World
from hvdtrain.config import flatten, load_config, may_cut, run_folders, topology_of
from hvdtrain.engine import Engine
from hvdtrain.errors import EXIT_STOPPED_EARLY
from hvdtrain.jobs.claim import Claim
from hvdtrain.machine.circles import look_at_what_comes
from hvdtrain.opening import Asked, OpenRun, open_run, recorded
from hvdtrain.planner.shortage import memory_explained
from hvdtrain.summary import announce, sum_up
from hvdtrain.watch.log import Log
from hvdtrain.watch.stopping import StopSignals
from hvdtrain.watch.watchdog import Watchdog


def train(
    recipe: str,
    overrides: Sequence[str],
    run_dir: Path | None,
    resume: str,
    world: World,
    timeline: Path | None = None,
    signals: StopSignals | None = None,
) -> Mapping[str, Any]:
    """Train a recipe in ``run_dir`` (default ``runs/RECIPE``) and return its summary. Every rank calls this.

    A run that was asked to stop (``signals``, see watch/stopping.py) returns status "stopped", the step and the reason.

    resume: ``auto`` continues what is in ``run_dir``, ``never`` refuses to, a path continues that run in ``run_dir``.
    timeline: file for a record of every collective; None: no record.
    """
    parts, topology = may_cut(recipe, overrides), topology_of(recipe, overrides)
    with open_group(world, timeline is not None, parts, topology) as group:
        folders = run_folders(recipe, run_dir, resume)
        run_dir, config = folders[0], group.together(lambda: load_config(recipe, overrides, folders))
        group.agree(flatten(config.model_dump()), "the configuration")
        asked = Asked([recipe, *overrides], config, run_dir, resume, timeline)
        with (
            Claim(run_dir, group) as claim,
            memory_explained(config, group.size, world.local_size),  # no tensor may be held here: see there
            Watchdog(config.watchdog, run_dir, group, other_hosts(group)) as watchdog,
        ):
            return _run(open_run(asked, world, group, claim, signals), watchdog)


def _run(run: OpenRun, watchdog: Watchdog) -> Mapping[str, Any]:
    if run.start.finished is not None:
        if run.is_main:
            steps = run.start.progress.step
            print(f"hvdtrain: {run.run_dir} is finished ({steps} steps); to train on, raise train.steps")
        return run.start.finished
    with recorded(run), contextlib.ExitStack() as closing:
        engine = closing.enter_context(contextlib.closing(open_engine(run)))
        loader = closing.enter_context(contextlib.closing(open_loader(run, engine)))
        log, peak = open_log(run, engine, watchdog)
        closing.enter_context(log)
        saver = closing.enter_context(
            Saver(run.run_dir, run.mesh.world, run.config.checkpoint, run.step, run.claim.check)
        )
        announce(run, engine, log, peak)
        look_at_what_comes()
        return _walk(run, engine, loader, log, saver, watchdog)


def _walk(
    run: OpenRun, engine: Engine, loader: Loader, log: Log, saver: Saver, watchdog: Watchdog
) -> Mapping[str, Any]:
    progress, scores = run.start.progress, dict[str, float]()
    run.stopping.begin()
    for step in loader.steps(run.steps_left):
        run.step, is_last = step, step == run.last
        save_is_due = saver.is_due(step) or is_last
        is_scored = _due(step, run.config.eval.every, run.last)
        is_shown = is_scored or log.is_due(step)
        with log.step(step) as phase:
            with phase("data"):
                microbatches = loader.next_step()
            with phase("compute"):
                engine.forward_backward(microbatches, run.task, step, loader.place)
            with phase("sync"):
                engine.finish(run.stopping.asked(), is_shown, save_is_due, is_scored, log.balance.told(step))
            with phase("optimizer"):
                lr = run.lr(step)
                agreed = engine.step(lr, step)
        if agreed is None:  # the replicas have told one another nothing
            log.pass_by()
            continue
        run.claim.check()  # before anything is written
        log.add(step, loader.epoch, agreed, lr)
        if not agreed.is_met:  # the others train on
            continue
        if dealt_anew := log.balance.decide(loader.rows_of_step):
            loader.deal(log.balance.speeds)
            log.say(f"hvdtrain: step {step}: {dealt_anew}")
        reason = None if is_last else run.stopping.agreed(agreed.flags)
        log.after("checkpoint")
        log.say_all(saver.poll())
        score = None
        if is_scored:
            scores = _evaluate(run, engine, log, watchdog)
            score = run.score(scores)
            log.metrics.add_evaluation(step, scores)
            save_is_due |= saver.is_best(score)
        log.after("checkpoint")
        if save_is_due or reason:
            log.metrics.doing("saving")
            engine.check(step, is_extra=not save_is_due)
            progress = engine.progress(step, loader, **run.settings)
            log.say_all(saver.save(engine.state(), progress, score, last=is_last or bool(reason)))
            run.stopping.keep_free("saving", saver.save_s)
        elif _due(step, run.config.watchdog.check_replicas_every, last=0):
            engine.check_replicas(step)
        if reason:
            log.say(f"hvdtrain: stopped at step {step} ({reason}); the same command goes on")
            run.end = EXIT_STOPPED_EARLY, reason
            return {"status": "stopped", "step": step, "reason": reason}
    if not scores:  # resumed after the last step, but before its summary was written
        scores = _evaluate(run, engine, log, watchdog)
    run.notes += saver.failures
    return sum_up(run, engine, log, progress, scores, saver.save_s)


def _evaluate(run: OpenRun, engine: Engine, log: Log, watchdog: Watchdog) -> dict[str, float]:
    """Scores of the validation split."""
    log.after("evaluation")
    with run.stopping.measured("evaluation"):
        batches = log.metrics.evaluating(run.data.val(), run.data.val.count)
        scores = engine.evaluate(watchdog.each(batches), run.task)
    engine.note_best(scores["val_loss"])
    return scores


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
