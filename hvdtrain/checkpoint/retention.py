"""The checkpoints of a run folder: what they are called, and which of them are kept.

RUN_DIR/checkpoints/step-00000100/             a multiple of keep_every: kept for ever
                    step-00000300/             the best so far, which best.json names (keep_best)
                    step-00000400/  ...500/    the newest (keep_last)
                    best.json                  {"step": 300, "val_loss": 1.25}, or another score of checkpoint.best
                    damaged-step-00000450-0/   set aside; never deleted
                    .step-00000600.partial/    being written, or left by a run that was killed
                    .step-00000200.old/        being deleted, or left likewise
"""

import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hvdtrain.errors import OutputError
from hvdtrain.files import listed, move_folder, optional, read_text, write_json

_NAME = re.compile(r"step-([0-9]{8,})")
# What the run's owner alone writes: among the checkpoints, and in the run folder itself.
_LEFT_OVER = (".step-*.partial", ".step-*.old", ".best.json.*.tmp")
_LEFT_OVER_OF_RUN = (".config.yaml.*.tmp", ".from.json.*.tmp", ".metrics.jsonl.*.tmp", ".summary.json.*.tmp")


@dataclass(frozen=True)
class Score:
    """What tells a better checkpoint from a worse one. ``direction``: 1 where more is better, -1 where less is."""

    name: str
    value: float
    direction: int


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def partial_of(run_dir: Path, step: int) -> Path:
    """Where a checkpoint is written, until it is whole."""
    return run_dir / "checkpoints" / f".step-{step:08d}.partial"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(_NAME.fullmatch(folder.name)[1])


def steps_saved(run_dir: Path) -> list[int]:
    """Steps of the checkpoints under ``run_dir``, newest first, valid or not.

    Errors: OutputError where the folder cannot be read: none that is seen is not none that is there.
    """
    folder = run_dir / "checkpoints"
    try:
        names = [_NAME.fullmatch(path.name) for path in listed(folder, "step-*")]
    except OSError as error:
        raise OutputError(f"cannot read {folder}: {error.strerror}") from None
    return sorted((int(match[1]) for match in names if match), reverse=True)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, where it is still there; it is kept (rank 0). Errors: OutputError."""
    try:
        move_folder(folder, free_name(folder))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"cannot set aside the damaged {folder}: {error.strerror}") from error


def free_name(path: Path) -> Path:
    """A name for what is damaged and in the way at ``path``."""
    number = 0
    while os.path.lexists(name := path.with_name(f"damaged-{path.name}-{number}")):
        number += 1
    return name


def remove_left_over(run_dir: Path) -> None:
    """Remove what a killed run was writing or deleting (rank 0, while nothing is being saved). Never fails."""
    for folder, patterns in ((run_dir / "checkpoints", _LEFT_OVER), (run_dir, _LEFT_OVER_OF_RUN)):
        for path in optional(lambda folder=folder: listed(folder, ".*"), f"cannot look for leftovers in {folder}", []):
            if any(fnmatchcase(path.name, pattern) for pattern in patterns):
                remove(path)


def remove(path: Path) -> None:
    """Remove a folder, file or link, where it is there and that can be done."""
    with suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def drop_old(run_dir: Path, keep_last: int, keep_every: int = 0, keep_best: bool = False) -> None:
    """Delete all but the ``keep_last`` newest (0: none), multiples of ``keep_every`` (0: none) and the best (rank 0).

    Errors: OutputError where one cannot be deleted, or it cannot be told which.
    """
    best = read_best(run_dir) if keep_best else None
    for step in steps_saved(run_dir)[keep_last:] if keep_last else []:
        if (keep_every and step % keep_every == 0) or (best is not None and step == best[0]):
            continue
        folder = folder_of(run_dir, step)
        doomed = folder.with_name(f".{folder.name}.old")
        try:
            remove(doomed)
            os.replace(folder, doomed)  # it is either whole under its name or gone from it
        except OSError as error:
            raise OutputError(f"cannot delete {folder}: {error.strerror}") from error
        remove(doomed)


def mark_best(run_dir: Path, step: int, score: Score) -> None:
    """Name the best checkpoint so far (rank 0). Errors: OutputError."""
    write_json(run_dir / "checkpoints" / "best.json", {"step": step, score.name: score.value})


def read_best(run_dir: Path, name: str = "") -> tuple[int, float] | None:
    """Step and score of the best one; None where none is named, or what is named is not there.

    name: of the score; one that was chosen by another is none. Empty: by whichever.

    Errors: OutputError where the file cannot be read: the best one would lose its name, and be deleted.
    """
    path = run_dir / "checkpoints" / "best.json"
    try:
        fields = json.loads(read_text(path)) if path.stat().st_size < 1 << 16 else None
        step, value = fields.pop("step"), fields.pop(name) if name else fields.popitem()[1]
        if type(step) is int and type(value) is float and math.isfinite(value) and step >= 0:
            return (step, value) if step in steps_saved(run_dir) else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def is_better(score: Score | None, best: float | None) -> bool:
    """Is a score better than the best so far (None: there is none)? What is no finite number never is."""
    if score is None or not math.isfinite(score.value):
        return False
    return best is None or score.direction * score.value > score.direction * best


def best_of(run_dir: Path, name: str) -> float | None:
    """The score of that name of the checkpoint that is kept as the best one by it."""
    best = read_best(run_dir, name)
    return None if best is None else best[1]
