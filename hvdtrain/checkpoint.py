"""Checkpoints: written beside their final name, listed with digests last, loaded on any rank count.

    RUN_DIR/checkpoints/step-00000200/part-00000-of-00002.safetensors    each rank its share of the tensors
                                      part-00001-of-00002.safetensors
                                      manifest.json                      step, rows consumed, digests; written last

Everything happens in ``.step-00000200.partial`` and is renamed when it is whole. Tensors are named after parameters
(``model.NAME``, ``optimizer.KEY.NAME``, ``ema.NAME``), whole and without any trace of the ranks, so that any number of
them may read. Where weights are averaged, ``ema_began`` (int64 scalar) is the step that the average began with.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hvdtrain.comm.group import Group
from hvdtrain.data.shards import file_sha256, sync_folder, write_json
from hvdtrain.errors import CheckpointError, OutputError
from hvdtrain.optim.ema import Ema
from hvdtrain.options import Options, option

FORMAT_VERSION = 1
Weights = Literal["raw", "ema"]  # of the last step; averaged over the last steps
_NAME = re.compile(r"step-(\d{8,})")
# Fields that came later: in a manifest only where they say something, so that those of runs without them stay the same.
_WHERE_SET = {"averaged_from", "loss_scale", "noise", "guard"}


class CheckpointOptions(Options):
    every: int = option(500, "steps between checkpoints; 0: only at the end", ge=0)
    keep_last: int = option(2, "newest checkpoints that are kept; 0: all", ge=0)


@dataclass(frozen=True)
class Progress:
    """Where a run stands, apart from its tensors. ``identity``: the settings that a resumed run must share.

    ``loss_scale``: see LossScale.state, of fp16 runs.
    ``noise``, ``guard``: see NoiseScale.state and Guard.state.
    ``averaged_from``: the steps whose weights were averaged (``hvdtrain average``); nothing can go on from there.
    A field that an older manifest lacks has its default.
    """

    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    fingerprint: int = 0
    best_val_loss: float | None = None
    identity: Mapping[str, Any] | None = None
    world_size: int = 1
    versions: Mapping[str, str] | None = None
    averaged_from: tuple[int, ...] | None = None
    loss_scale: tuple[float, int] | None = None
    noise: tuple[float, float] | None = None
    guard: tuple[float, ...] | None = None

    __pydantic_config__ = ConfigDict(extra="forbid")


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps_saved(run_dir: Path) -> list[int]:
    """Steps of the checkpoints under ``run_dir``, newest first, valid or not."""
    names = [_NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted((int(match[1]) for match in names if match), reverse=True)


# --- saving ------------------------------------------------------------------------------------------------------


def save(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    group: Group,
    options: CheckpointOptions,
    ema: Ema | None = None,
) -> Path:
    """Write one checkpoint (collective: every rank writes its share) and drop those that are too old.

    Without ``ema`` the bytes are those of a run that knows nothing of averages. Errors: see ``save_tensors``.
    """
    return save_tensors(run_dir, _named_tensors(model, optimizer, ema), progress, group, options)


def save_tensors(
    run_dir: Path, tensors: Mapping[str, torch.Tensor], progress: Progress, group: Group, options: CheckpointOptions
) -> Path:
    """Write a checkpoint of ``tensors``, the same on all ranks (collective), and drop those that are too old.

    Errors: on all ranks, exit 74 where any of them could not write; what was saved before is untouched.
    """
    final = folder_of(run_dir, progress.step)
    partial = final.with_name(f".{final.name}.partial")
    part = f"part-{group.rank:05d}-of-{group.size:05d}.safetensors"

    def make_folder() -> None:
        if group.rank == 0:
            _writing(final, lambda: (shutil.rmtree(partial, ignore_errors=True), partial.mkdir(parents=True)))

    def write_part() -> dict[str, Any]:
        return _writing(final, lambda: _write_part(partial / part, _share(tensors, group)))

    def finish() -> None:
        if group.rank == 0:
            missing = [entry["file"] for entry in parts if not (partial / entry["file"]).exists()]
            if missing:
                raise OutputError(
                    f"{partial / missing[0]} was written but rank 0 does not see it: "
                    "the run folder must be on a file system that all nodes share"
                )
            saved = {k: v for k, v in asdict(progress).items() if v is not None or k not in _WHERE_SET}
            fields = {"format": FORMAT_VERSION, **saved, "parts": parts}
            fields["fingerprint"] = f"{progress.fingerprint:016x}"
            write_json(partial / "manifest.json", {**fields, "manifest_sha256": _digest(fields)})
            _writing(final, lambda: _publish(partial, final))
            _writing(run_dir, lambda: _drop_old(run_dir, options.keep_last))

    try:
        group.together(make_folder)
        entry = group.together(write_part)
        parts = group.all_gather_object(entry)
        group.together(finish)
    except Exception:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _writing(path: Path, work: Any) -> Any:
    try:
        return work()
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot save {path}: {getattr(error, 'strerror', None) or error}") from error


def _write_part(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _publish(partial: Path, final: Path) -> None:
    sync_folder(partial)
    if final.exists():  # an unfinished or damaged one of the same step: keep it, out of the way
        os.replace(final, _free_name(final))
    os.replace(partial, final)
    sync_folder(final.parent)


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def set_aside(run_dir: Path, step: int) -> None:
    """Rename what lies beyond ``step``, the newest whole checkpoint: it is damaged, and kept (rank 0)."""
    for newer in (s for s in steps_saved(run_dir) if s > step):
        folder = folder_of(run_dir, newer)
        _writing(folder, lambda folder=folder: os.replace(folder, _free_name(folder)))


def _free_name(path: Path) -> Path:
    number = 0
    while (name := path.with_name(f"damaged-{path.name}-{number}")).exists():
        number += 1
    return name


def _drop_old(run_dir: Path, keep_last: int) -> None:
    for step in steps_saved(run_dir)[keep_last:] if keep_last else []:
        folder = folder_of(run_dir, step)
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)  # it is either whole under its name or gone from it
        shutil.rmtree(doomed, ignore_errors=True)


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
    """This rank's tensors: the largest first, each to the rank that has least so far."""
    load = [0] * group.size
    mine = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        rank = load.index(min(load))
        load[rank] += tensors[name].numel() * tensors[name].element_size()
        if rank == group.rank:
            mine[name] = tensors[name].cpu().contiguous()
    return mine


# --- loading -----------------------------------------------------------------------------------------------------


def read_progress(folder: Path, rank: int = 0, size: int = 1) -> Progress:
    """Check a checkpoint and return where it stands; ``rank`` of ``size`` digests its share of the parts.

    Errors: CheckpointError that names the file.
    """
    path = folder / "manifest.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT_VERSION:
            raise CheckpointError(f"{path} was written by another version of hvdtrain")
        if fields.pop("manifest_sha256") != _digest({"format": FORMAT_VERSION, **fields}):
            raise CheckpointError(f"{path} is damaged (it does not match its own digest)")
        parts = fields.pop("parts")
        fields["fingerprint"] = int(fields["fingerprint"], 16)
        progress = TypeAdapter(Progress).validate_json(json.dumps(fields), strict=True)
        if folder_of(folder.parent.parent, progress.step).name != folder.name:
            raise CheckpointError(f"{path} is that of step {progress.step}")
        for number, part in enumerate(parts):
            file = folder / Path(part["file"]).name
            if not file.exists():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != part["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {part['bytes']}")
            if number % size == rank and file_sha256(file) != part["sha256"]:
                raise CheckpointError(f"{file} does not match its digest")
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    return progress


def newest_valid(run_dir: Path, group: Group) -> tuple[Path, Progress, list[str]] | None:
    """The newest whole checkpoint (collective), with what was wrong with newer ones; None: there is none."""
    damaged: list[str] = []
    for step in group.all_gather_object(steps_saved(run_dir))[0]:
        folder = folder_of(run_dir, step)
        progress, problem = None, None
        try:
            progress = read_progress(folder, group.rank, group.size)
        except CheckpointError as error:
            problem = str(error)
        problems = [other for other in group.all_gather_object(problem) if other]
        if not problems and progress is not None:
            return folder, progress, damaged
        damaged.append(problems[0])
    return None


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

    Errors: CheckpointError where a parameter is missing or has another shape, or averages are asked for and missing; or
    where ``optimizer`` is to go on from ``hvdtrain average``.
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _copy(folder, name, tensors.get(f"model.{name}"), parameter)
            if optimizer is not None:
                _load_state(optimizer, parameter, name, tensors)
        if ema is not None:
            ema.restart(int(_NAME.fullmatch(folder.name)[1]))
            if "ema_began" in tensors:
                ema.began = int(tensors["ema_began"])
                for name, average in ema.named_averages().items():
                    if f"ema.{name}" in tensors:
                        _copy(folder, name, tensors[f"ema.{name}"], average)


def read_tensors(folder: Path, prefixes: str | tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors whose names begin so, on the CPU (local; the files were checked before)."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(folder.glob("part-*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
                tensors.update({name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder}: {error}") from None
    return tensors


def has_ema(folder: Path) -> bool:
    """Does a checkpoint hold averaged weights beside those of its step?"""
    return "ema_began" in read_tensors(folder, "ema_began")


def check_resumable(folder: Path) -> None:
    """Errors: CheckpointError where the checkpoint is an average of others, which has no optimizer state."""
    try:
        steps = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("averaged_from")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / 'manifest.json'}: {error}") from None
    if steps is not None:
        raise CheckpointError(
            f"{folder} is the average of steps {', '.join(map(str, steps))}, without optimizer state: "
            "evaluate and generate take it, training goes on from the run that it was made of"
        )


def _copy(folder: Path, name: str, tensor: torch.Tensor | None, target: torch.Tensor) -> None:
    if tensor is None or tensor.shape != target.shape:
        found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{folder}: {name} needs shape {tuple(target.shape)}, found {found}")
    target.copy_(tensor)


def _load_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str, tensors: dict[str, torch.Tensor]
) -> None:
    suffix = f".{name}"
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer.") and full_name.endswith(suffix):
            key = full_name[len("optimizer.") : -len(suffix)]
            if "." not in key:  # else it is the state of a longer name that ends alike
                # A scalar is the fused optimizer's step count; it lives beside the parameter, as torch makes it.
                optimizer.state[parameter][key] = tensor.to(parameter.device)
