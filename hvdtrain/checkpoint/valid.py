"""Which checkpoints are whole: each part is there, as long as the manifest says, and has its digest."""

import os
from functools import partial
from pathlib import Path

from hvdtrain.checkpoint.manifest import Progress, cannot_read, check_is_file, read_manifest
from hvdtrain.checkpoint.retention import folder_of, read_best, set_aside, steps_saved
from hvdtrain.comm.group import Group
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.files import file_sha256, listed


def choose_valid(run_dir: Path, which: str, group: Group) -> tuple[Path, Progress] | None:
    """The checkpoint that is asked for (collective): ``newest`` whole one (None: there is none), ``best``, or a step.

    Errors: RankError on all ranks, with ConfigError's exit code where no checkpoint is the best, there is none of that
    step, or ``which`` is neither a word nor a number; with CheckpointError's where it is damaged.
    """
    if which == "newest":
        found = newest_valid(run_dir, group)
        return found and found[:2]
    best, steps = group.all_gather_object((read_best(run_dir), steps_saved(run_dir)))[0]

    def choose() -> tuple[Path, Progress]:
        if which == "best" and best is None:
            raise ConfigError(f"{run_dir} has no best checkpoint: checkpoint.keep_best was off, or nothing validated")
        if which != "best" and not (which.isascii() and which.isdigit()):
            raise ConfigError(f"--checkpoint {which}: give newest, best or the number of a step")
        step = best[0] if which == "best" else int(which)
        if step not in steps:
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise ConfigError(f"{run_dir} has no checkpoint of step {step}; there: {there}")
        folder = folder_of(run_dir, step)
        return folder, read_progress(folder, group.rank, group.size)

    return group.together(choose)


def newest_valid(run_dir: Path, group: Group) -> tuple[Path, Progress, list[str]] | None:
    """The newest whole checkpoint (collective), with what was wrong with newer ones; None: there is none.

    A run that goes on meanwhile may drop what is being read here: that was no damage, and newer ones are there.
    """
    damaged: list[str] = []
    seen: set[int] = set()
    while left := [step for step in group.all_gather_object(steps_saved(run_dir))[0] if step not in seen]:
        folder = folder_of(run_dir, left[0])
        seen.add(left[0])
        progress, problem = judge(folder, group)
        if problem is None:
            return folder, progress, damaged
        if group.all_gather_object(os.path.lexists(folder))[0]:
            damaged.append(problem)
    return None


def set_aside_damaged(run_dir: Path, step: int, group: Group) -> bool:
    """Rename what lies beyond ``step``, the newest whole checkpoint: it is damaged, and kept (collective; by the run
    folder's owner). Each is read once more first. False: one is whole after all, and is the one to go on from.

    Errors: OutputError where one cannot be renamed.
    """
    for newer in group.all_gather_object([s for s in steps_saved(run_dir) if s > step])[0]:
        folder = folder_of(run_dir, newer)
        _, problem = judge(folder, group)
        if problem is None:
            return False
        group.on_main(partial(set_aside, folder))
    return True


def judge(folder: Path, group: Group) -> tuple[Progress | None, str | None]:
    """Read a checkpoint (collective): its progress, or the first problem that a rank has with it."""
    progress, problem = None, None
    try:
        progress = read_progress(folder, group.rank, group.size)
    except CheckpointError as error:
        problem = str(error)
    return progress, next((other for other in group.all_gather_object(problem) if other), None)


def read_progress(folder: Path, rank: int = 0, size: int = 1) -> Progress:
    """Check a checkpoint and return where it stands; ``rank`` of ``size`` digests its share of the parts.

    Errors: CheckpointError that names the file; see ``cannot_read``.
    """
    manifest = read_manifest(folder)
    progress, parts = manifest.progress, manifest.parts
    if folder_of(folder.parent.parent, progress.step).name != folder.name:
        raise CheckpointError(f"{folder / 'manifest.json'} is that of step {progress.step}")
    try:
        for number, part in enumerate(parts):
            path = folder / part.file
            try:
                found_bytes = check_is_file(path)
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing") from None
            if found_bytes != part.bytes:
                raise CheckpointError(f"{path} has {found_bytes} bytes instead of {part.bytes}")
            if number % size == rank and file_sha256(path) != part.sha256:
                raise CheckpointError(f"{path} does not match its digest")
        strangers = {path.name for path in listed(folder, "part-*.safetensors")} - {part.file for part in parts}
    except OSError as error:
        raise cannot_read(folder, error) from None
    if strangers:
        raise CheckpointError(f"{folder / min(strangers)} is not in the manifest: it belongs to another checkpoint")
    return progress
