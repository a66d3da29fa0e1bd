"""Where does a run begin? At the newest whole checkpoint of its folder, or of another run, or at step 0."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdtrain.checkpoint.manifest import Progress, check_resumable
from hvdtrain.checkpoint.retention import steps_saved
from hvdtrain.checkpoint.valid import newest_valid, set_aside_damaged
from hvdtrain.comm.group import Group
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.files import exists
from hvdtrain.optim.schedules import ScheduleOptions, learning_rate


def find_start(
    run_dir: Path,
    resume: str,
    identity: Mapping[str, Any],
    group: Group,
    is_owner: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Progress, Path | None, list[str]]:
    """The progress to go on from, its checkpoint (None: step 0), and what has to be said about it (collective).

    resume: ``auto``, ``never`` or a run's folder, as ``hvdtrain train --resume`` takes it. identity: the settings that
    the run must share; defaults: those of a setting that the run did not know yet. is_owner: of ``run_dir`` (see
    jobs/claim.py): damaged checkpoints beyond the one that is taken are set aside; else nothing is written.
    Errors: ConfigError where the run there has another recipe, or must not be touched; CheckpointError where no
    checkpoint is whole.
    """
    if resume == "never":
        group.on_main(lambda: _refuse_to_overwrite(run_dir))
        return Progress(), None, []
    # With --resume DIR, what this run has saved by itself since then is newer.
    source = run_dir if resume == "auto" else Path(resume)
    found = newest_valid(run_dir, group)
    if found is None and source != run_dir:
        found = newest_valid(source, group)
    if found is None:
        group.together(lambda: _check_nothing_is_lost(source, explicit=source != run_dir))
        return Progress(), None, []
    folder, progress, damaged = found
    group.together(lambda: check_resumable(folder, progress))
    group.together(lambda: _check_identity(folder, progress, identity, defaults or {}))
    own_step = progress.step if folder.parent.parent == run_dir else -1
    if is_owner and not set_aside_damaged(run_dir, own_step, group):
        return find_start(run_dir, resume, identity, group, is_owner, defaults)
    return progress, folder, [f"damaged checkpoint skipped: {problem}" for problem in damaged]


def moved_rate(progress: Progress, schedule: ScheduleOptions, peak: float, steps: int) -> list[str]:
    """Where a run goes on with another length: what its learning rate was at the last step made, and is there now.

    schedule, peak: those of both, in steps (see ``RunConfig.identity``). steps: the run's length now.
    Empty where nothing moved, or the checkpoint is of before its length was saved.
    """
    before = progress.run_steps
    if before in (None, steps):
        return []
    was, now = (learning_rate(schedule, peak, length, progress.step - 1) for length in (before, steps))
    if f"{was:.3g}" == f"{now:.3g}":
        return []
    return [
        f"resumed at step {progress.step} with train.steps {before} -> {steps}: "
        f"the learning rate there was {was:.3g} and is now {now:.3g}"
    ]


def _refuse_to_overwrite(run_dir: Path) -> None:
    if steps_saved(run_dir) or exists(run_dir / "summary.json"):
        raise ConfigError(f"{run_dir} already holds a run; use --resume auto to go on with it, or another --run-dir")


def _check_identity(folder: Path, progress: Progress, identity: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Errors: ConfigError that lists what differs between the run in ``folder`` and this one.

    A setting that the run did not know yet, because this hvdtrain is newer, had its default.
    """
    saved = {**defaults, **(progress.identity or {})}
    differing = [
        f"{key} was {saved.get(key)!r} and is now {identity.get(key)!r}"
        for key in sorted({*saved, *identity})
        if saved.get(key) != identity.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{folder.parent.parent} is the run of another recipe: {'; '.join(differing)}; "
            "give another --run-dir, or the settings of that run"
        )


def _check_nothing_is_lost(source: Path, explicit: bool) -> None:
    """No checkpoint is whole: starting anew is right only where there never was one."""
    if steps := steps_saved(source):
        raise CheckpointError(
            f"{source} has {len(steps)} checkpoints and none is whole (newest: step {steps[0]}); "
            "restore one, or give another --run-dir to start anew"
        )
    if explicit:
        raise CheckpointError(f"--resume {source}: there is no checkpoint")
