"""Checkpoints: written beside their final name, listed with digests last, loaded on any rank count.

    RUN_DIR/checkpoints/step-00000200/part-00000-of-00002.safetensors    each rank its share of the tensors
                                      part-00001-of-00002.safetensors
                                      manifest.json                      step, rows consumed, digests; written last

Everything happens in ``.step-00000200.partial`` and is renamed when it is whole. Tensors are named after parameters
(``model.NAME``, ``optimizer.KEY.NAME``, ``ema.NAME``), whole and without any trace of the ranks, so that any number of
them may read. Where weights are averaged, ``ema_began`` (int64 scalar) is the step that the average began with.
"""

import errno
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hvdtrain.checkpoint.manifest import Part, Progress, cannot_read, check_is_file, fields_of, part_name, read_manifest
from hvdtrain.checkpoint.retention import (
    drop_old,
    folder_of,
    free_name,
    mark_best,
    partial_of,
    read_best,
    remove,
    remove_left_over,
    step_of,
    steps_saved,
)
from hvdtrain.checkpoint.retention import set_aside as set_aside  # callers know checkpoints by this module alone
from hvdtrain.comm.group import Group
from hvdtrain.errors import CheckpointError, ConfigError, OutputError
from hvdtrain.files import (
    again,
    fields_sha256,
    file_sha256,
    is_there,
    listed,
    move_folder,
    optional,
    sync_folder,
    write_json,
)
from hvdtrain.optim.ema import Ema
from hvdtrain.options import Options, option

Weights = Literal["raw", "ema"]  # of the last step; averaged over the last steps
_NOT_YET = (errno.ENOENT,)  # NFS shows what another node has just made a little later
_OS_ERROR = re.compile(r"os error ([0-9]+)")  # in the text of an error of safetensors


class CheckpointOptions(Options):
    every: int = option(500, "steps between checkpoints; 0: only at the end", ge=0)
    keep_last: int = option(2, "newest checkpoints that are kept; 0: all", ge=0)
    keep_every: int = option(0, "checkpoints of every so many steps are kept for ever; 0: none", ge=0)
    keep_best: bool = option(
        False, "an evaluation better than all before saves, and that checkpoint is kept until there is a better one"
    )
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


# --- saving ------------------------------------------------------------------------------------------------------


def save(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    group: Group,
    options: CheckpointOptions,
    ema: Ema | None = None,
    val_loss: float | None = None,
    check_owner: Callable[[], None] = lambda: None,
) -> Path:
    """Write one checkpoint (collective: every rank writes its share) and drop those that are too old.

    Without ``ema`` the bytes are those of a run that knows nothing of averages. ``val_loss``, errors: see ``finish``,
    ``save_tensors``. check_owner: raises where the run folder is not this run's any more (rank 0).
    """
    return save_tensors(run_dir, _named_tensors(model, optimizer, ema), progress, group, options, val_loss, check_owner)


def share(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, group: Group) -> dict[str, torch.Tensor]:
    """The tensors that this rank writes, under their names; themselves, not copies (local)."""
    return _share(_named_tensors(model, optimizer, ema), group)


def save_tensors(
    run_dir: Path,
    tensors: Mapping[str, torch.Tensor],
    progress: Progress,
    group: Group,
    options: CheckpointOptions,
    val_loss: float | None = None,
    check_owner: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint of ``tensors``, the same on all ranks (collective), and drop those that are too old.

    Errors: on all ranks, exit 74 where any of them could not write; what was saved before is untouched.
    """
    step, is_main = progress.step, group.rank == 0

    def conclude(parts: list[Part]) -> None:
        check_owner()
        finish(run_dir, progress, parts, options, val_loss)

    try:
        group.together(lambda: begin(run_dir, step) if is_main else None)
        part = group.together(lambda: write_part(run_dir, step, _share(tensors, group), group.rank, group.size))
        parts = group.all_gather_object(part)
        group.together(lambda: conclude(parts) if is_main else None)
    except Exception:
        if is_main:
            remove(partial_of(run_dir, step))
        raise
    return folder_of(run_dir, step)


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


def write_part(run_dir: Path, step: int, tensors: Mapping[str, torch.Tensor], rank: int, size: int) -> Part:
    """Write this rank's share, flush it to disk and return what the manifest shall say of it (local).

    Errors: OutputError.
    """
    path = partial_of(run_dir, step) / part_name(rank, size)

    def write() -> Part:
        path.unlink(missing_ok=True)  # what one fsync could not write is lost, and the next would say that all is well
        _save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read, whatever the umask
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return Part(path.name, path.stat().st_size, file_sha256(path))

    try:
        return again(write, path, _NOT_YET)
    except (OSError, SafetensorError) as error:
        raise _cannot_save(run_dir, step, error) from error


def finish(
    run_dir: Path,
    progress: Progress,
    parts: list[Part],
    options: CheckpointOptions,
    val_loss: float | None = None,
) -> None:
    """When all ``parts`` are on disk (rank 0): the manifest, the final name; then drop what is too old.

    val_loss: of the validation of this very step, for ``keep_best``; None: not known.
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
    if options.keep_best and is_better(val_loss, best_of(run_dir)):
        mark_best(run_dir, progress.step, val_loss)
    keep = options.keep_last, options.keep_every, options.keep_best
    optional(lambda: drop_old(run_dir, *keep), "old checkpoints stay until the next is saved", None)


def is_better(val_loss: float | None, best: float | None) -> bool:
    """Is a validation loss lower than the best one so far (None: there is none)? What is no finite number never is."""
    return val_loss is not None and math.isfinite(val_loss) and (best is None or val_loss < best)


def best_of(run_dir: Path) -> float | None:
    """The validation loss of the checkpoint that is kept as the best one."""
    best = read_best(run_dir)
    return None if best is None else best[1]


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


def _named_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Ema | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under its name; a tied parameter once."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        if optimizer is not None:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
    if ema is not None:
        tensors |= {f"ema.{name}": average for name, average in ema.named_averages().items()}
        tensors["ema_began"] = torch.tensor(ema.began)
    return tensors


def _share(tensors: Mapping[str, torch.Tensor], group: Group) -> dict[str, torch.Tensor]:
    """This rank's tensors, where they lie: the largest first, each to the rank that has least so far."""
    load = [0] * group.size
    mine = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        rank = load.index(min(load))
        load[rank] += tensors[name].numel() * tensors[name].element_size()
        if rank == group.rank:
            mine[name] = tensors[name]
    return mine


# --- loading -----------------------------------------------------------------------------------------------------


def read_progress(folder: Path, rank: int = 0, size: int = 1) -> Progress:
    """Check a checkpoint and return where it stands; ``rank`` of ``size`` digests its share of the parts.

    Errors: CheckpointError that names the file; see ``cannot_read``.
    """
    progress, parts = read_manifest(folder)
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


def judge(folder: Path, group: Group) -> tuple[Progress | None, str | None]:
    """Read a checkpoint (collective): its progress, or the first problem that a rank has with it."""
    progress, problem = None, None
    try:
        progress = read_progress(folder, group.rank, group.size)
    except CheckpointError as error:
        problem = str(error)
    return progress, next((other for other in group.all_gather_object(problem) if other), None)


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
        group.together(lambda folder=folder: set_aside(folder) if group.rank == 0 else None)
    return True


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


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Ema | None = None,
    weights: Weights = "raw",
) -> None:
    """Copy a checkpoint's tensors into ``model`` and, if given, ``optimizer`` and ``ema`` (local; files were checked).

    ema: its average, warm-up and all; where the checkpoint has none, the average begins with the weights loaded here.
    Averages that nobody asks for are left in the file: a run goes on without them.
    weights: ``ema`` puts the averages into ``model``; a parameter without one was not trained, and is as it was.

    Errors: CheckpointError where a parameter is missing or has another shape or type, a state is missing or has a shape
    that cannot be, or averages are asked for and missing; or where ``optimizer`` is to go on from ``hvdtrain average``.
    """
    if optimizer is not None:
        check_resumable(folder)
    asked = {"model.": True, "optimizer.": optimizer is not None, "ema": ema is not None or weights == "ema"}
    tensors = read_tensors(folder, tuple(prefix for prefix, is_asked in asked.items() if is_asked))
    if weights == "ema":
        if "ema_began" not in tensors:
            raise CheckpointError(f"{folder} has no averaged weights")
        averages = {name: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
        tensors |= {f"model.{name.removeprefix('ema.')}": average for name, average in averages.items()}
    states: dict[str, set[str]] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _copy(folder, name, tensors.get(f"model.{name}"), parameter)
            if optimizer is not None:
                states[name] = _load_state(folder, optimizer, parameter, name, tensors)
        if optimizer is not None:
            _check_states(folder, states)
        if ema is not None:
            ema.restart(step_of(folder))
            if "ema_began" in tensors:
                ema.began = _began(folder, tensors["ema_began"])
                for name, average in ema.named_averages().items():
                    if f"ema.{name}" in tensors:
                        _copy(folder, name, tensors[f"ema.{name}"], average)


def read_tensors(folder: Path, prefixes: str | tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors whose names begin so, on the CPU (local; the files were checked before)."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in listed(folder, "part-*.safetensors"):
            with again(lambda path=path: safe_open(path, framework="pt", device="cpu"), path) as file:
                names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
                if twice := tensors.keys() & set(names):
                    raise CheckpointError(f"{path} holds {min(twice)}, which another part holds too")
                tensors.update({name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder}: {error}") from None
    return tensors


def has_ema(folder: Path) -> bool:
    """Does a checkpoint hold averaged weights beside those of its step?"""
    return "ema_began" in read_tensors(folder, "ema_began")


def check_resumable(folder: Path) -> None:
    """Errors: CheckpointError where the checkpoint is an average of others, which has no optimizer state."""
    steps = read_manifest(folder)[0].averaged_from
    if steps is not None:
        raise CheckpointError(
            f"{folder} is the average of steps {', '.join(map(str, steps))}, without optimizer state: "
            "evaluate and generate take it, training goes on from the run that it was made of"
        )


def _copy(folder: Path, name: str, tensor: torch.Tensor | None, target: torch.Tensor) -> None:
    if tensor is None or tensor.shape != target.shape:
        found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{folder}: {name} needs shape {tuple(target.shape)}, found {found}")
    if tensor.dtype != target.dtype:
        raise CheckpointError(f"{folder}: {name} needs {target.dtype}, found {tensor.dtype}")
    target.copy_(tensor)


def _began(folder: Path, tensor: torch.Tensor) -> int:
    if tensor.shape != () or tensor.dtype != torch.int64:
        raise CheckpointError(f"{folder}: ema_began needs one int64, found {tensor.dtype} {tuple(tensor.shape)}")
    return int(tensor)


def _load_state(
    folder: Path, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str, tensors: dict[str, torch.Tensor]
) -> set[str]:
    """Returns the names of what there is of this parameter."""
    found = set()
    suffix = f".{name}"
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer.") and full_name.endswith(suffix):
            key = full_name[len("optimizer.") : -len(suffix)]
            if "." not in key:  # else it is the state of a longer name that ends alike
                if tensor.shape not in (parameter.shape, ()) or not tensor.is_floating_point():
                    raise CheckpointError(
                        f"{folder}: {full_name} needs shape {tuple(parameter.shape)} or one number, "
                        f"found {tensor.dtype} {tuple(tensor.shape)}"
                    )
                # A scalar is the fused optimizer's step count; it lives beside the parameter, as torch makes it.
                optimizer.state[parameter][key] = tensor.to(parameter.device)
                found.add(key)
    return found


def _check_states(folder: Path, states: dict[str, set[str]]) -> None:
    """An optimizer keeps the same things of every parameter that it has moved."""
    every = set().union(*states.values())
    for name, keys in states.items():
        if keys and keys != every:
            raise CheckpointError(f"{folder}: the optimizer's {min(every - keys)} of {name} is missing")
