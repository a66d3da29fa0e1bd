"""Writes checkpoints: everything beside its final name, each rank its share, the manifest last.

Everything happens in ``.step-00000200.partial`` and is renamed when it is whole. See manifest.py for what is in it.
"""

import errno
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hvdtrain.checkpoint.manifest import PartFile, Progress, fields_of, key_of, kind_of, part_name
from hvdtrain.checkpoint.retention import (
    Score,
    best_of,
    drop_old,
    folder_of,
    free_name,
    is_better,
    mark_best,
    partial_of,
    remove,
    remove_left_over,
)
from hvdtrain.comm.group import Group
from hvdtrain.errors import OutputError
from hvdtrain.files import again, fields_sha256, file_sha256, is_there, move_folder, optional, sync_folder, write_json
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice

_NOT_YET = (errno.ENOENT,)  # NFS shows what another node has just made a little later
_OS_ERROR = re.compile(r"os error ([0-9]+)")  # in the text of an error of safetensors


class CheckpointOptions(Options):
    every: int = option(500, "steps between checkpoints; 0: only at the end", ge=0)
    keep_last: int = option(2, "newest checkpoints that are kept; 0: all", ge=0)
    keep_every: int = option(0, "checkpoints of every so many steps are kept for ever; 0: none", ge=0)
    keep_best: bool = option(
        False, "an evaluation better than all before saves, and that checkpoint is kept until there is a better one"
    )
    best: str = option("val_loss", "the evaluation's score that keep_best goes by; which there are, the task says")
    asynchronous: bool = option(
        False, "write while training goes on, from a copy in the host's memory as large as the rank's part"
    )
    on_error: Literal["stop", "continue"] = option(
        "stop", "where a checkpoint cannot be written: stop with exit 74, or go on; the run's last one must be written"
    )
    mtbf_hours: float = option(
        0.0,
        "hours between failures of the job that are to be expected; checkpoints are then as far apart as loses least "
        "time (Daly 2006), `every` is the first interval; 0: not known",
        ge=0,
    )


def save(
    run_dir: Path,
    state: Sequence[Slice],
    progress: Progress,
    group: Group,
    options: CheckpointOptions,
    score: Score | None = None,
    check_owner: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint of ``state`` (collective: every rank what it holds of it), and drop those that are too old.

    score: see ``finish``. check_owner: raises where the run folder is not this run's any more (rank 0).
    Errors: on all ranks, exit 74 where any of them could not write; what was saved before is untouched.
    """
    step = progress.step

    def conclude(parts: list[PartFile]) -> None:
        check_owner()
        finish(run_dir, progress, parts, options, score)

    try:
        group.on_main(lambda: begin(run_dir, step))
        mine = share(state, group)
        part = group.together(lambda: write_part(run_dir, step, mine, group.rank, group.size))
        parts = group.all_gather_object(part)
        group.on_main(lambda: conclude(parts))
    except Exception:
        if group.rank == 0:
            remove(partial_of(run_dir, step))
        raise
    return folder_of(run_dir, step)


def share(state: Sequence[Slice], group: Group) -> list[Slice]:
    """The rectangles that this rank writes of what it holds; themselves, not copies (collective).

    Each is written by one of the ranks that hold it: the largest first, each by whoever has least so far. Every rank
    must know who holds what: all tell a digest, and of those that hold the same, one tells what it is. Where all hold
    everything, the digests are enough.
    """
    held = {key_of(piece): piece for whole in state for piece in whole.rectangles()}
    sizes = {key: piece.tensor.numel() * piece.tensor.element_size() for key, piece in held.items()}
    digest = hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()
    digests = group.all_gather_object(digest)
    if set(digests) == {digest}:
        told = {digest: sizes}
    else:
        is_speaker = digests.index(digest) == group.rank
        told = {
            key: value
            for one in group.all_gather_object({digest: sizes} if is_speaker else {})
            for key, value in one.items()
        }
    return [held[key] for key in _assign(told, digests)[group.rank]]


def _assign(told: Mapping[str, Mapping[str, int]], digests: Sequence[str]) -> list[list[str]]:
    """For each rank, what it writes. told: digest -> the bytes of each piece that those ranks hold who have it."""
    sizes: dict[str, int] = {}
    holders: dict[str, np.ndarray] = {}
    for digest, pieces in told.items():
        ranks = np.array([rank for rank, other in enumerate(digests) if other == digest])
        for key in pieces:
            holders[key] = np.concatenate([holders[key], ranks]) if key in holders else ranks
        sizes |= pieces
    load, shares = np.zeros(len(digests), dtype=np.int64), [[] for _ in digests]
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        rank = holders[key][load[holders[key]].argmin()]
        load[rank] += sizes[key]
        shares[rank].append(key)
    return shares


def begin(run_dir: Path, step: int) -> None:
    """Make the folder to write into (rank 0, before any part), where killed runs left nothing. Errors: OutputError."""
    partial = partial_of(run_dir, step)

    def make() -> None:
        remove_left_over(run_dir)
        remove(partial)
        partial.mkdir(parents=True)

    try:
        again(make, partial)
    except OSError as error:
        raise _cannot_save(run_dir, step, error) from error


def write_part(run_dir: Path, step: int, pieces: Sequence[Slice], rank: int, size: int) -> PartFile:
    """Write this rank's share, flush it to disk and return what the manifest shall say of it (local).

    Errors: OutputError.
    """
    path = partial_of(run_dir, step) / part_name(rank, size)
    kinds = {key_of(piece): kind_of(piece.whole, piece.tensor.dtype) for piece in pieces}

    def write() -> PartFile:
        path.unlink(missing_ok=True)  # what one fsync could not write is lost, and the next would say that all is well
        _save_file({key: piece.tensor.cpu().contiguous() for key, piece in zip(kinds, pieces, strict=True)}, path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read, whatever the umask
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return PartFile(path.name, path.stat().st_size, file_sha256(path), kinds)

    try:
        return again(write, path, _NOT_YET)
    except (OSError, SafetensorError) as error:
        raise _cannot_save(run_dir, step, error) from error


def finish(
    run_dir: Path,
    progress: Progress,
    parts: Sequence[PartFile],
    options: CheckpointOptions,
    score: Score | None = None,
) -> None:
    """When all ``parts`` are on disk (rank 0): the manifest, the final name; then drop what is too old.

    score: of the validation of this very step, for ``keep_best``; None: not known.
    Errors: OutputError; up to the final name, nothing else was changed. What is too old and cannot be dropped stays.
    """
    partial, final = partial_of(run_dir, progress.step), folder_of(run_dir, progress.step)
    for part in parts:
        try:
            again((partial / part.file).stat, partial / part.file, _NOT_YET)
        except FileNotFoundError:
            raise OutputError(
                f"{partial / part.file} was written but rank 0 does not see it: "
                "the run folder must be on a file system that all nodes share"
            ) from None
        except OSError as error:
            raise _cannot_save(run_dir, progress.step, error) from error
    fields = fields_of(progress, parts)
    write_json(partial / "manifest.json", {**fields, "manifest_sha256": fields_sha256(fields)})
    try:
        _publish(partial, final)
    except OSError as error:
        raise _cannot_save(run_dir, progress.step, error) from error
    if options.keep_best and score is not None and is_better(score, best_of(run_dir, score.name)):
        mark_best(run_dir, progress.step, score)
    keep = options.keep_last, options.keep_every, options.keep_best
    optional(lambda: drop_old(run_dir, *keep), "old checkpoints stay until the next is saved", None)


def _cannot_save(run_dir: Path, step: int, error: OSError | SafetensorError) -> OutputError:
    return OutputError(f"cannot save {folder_of(run_dir, step)}: {getattr(error, 'strerror', None) or error}")


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Errors: OSError; SafetensorError only where the system has not said why."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if (number := _OS_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _publish(partial: Path, final: Path) -> None:
    again(lambda: sync_folder(partial), partial)
    if again(lambda: is_there(final), final):  # an unfinished or damaged one of the same step: keep it, out of the way
        move_folder(final, free_name(final))
    move_folder(partial, final)
