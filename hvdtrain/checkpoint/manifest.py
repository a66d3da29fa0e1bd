"""The format of a checkpoint, and its manifest: where the run stands, what each part holds, and its digest.

    RUN_DIR/checkpoints/step-00000200/part-00000-of-00002.safetensors    each rank its share of the tensors
                                      part-00001-of-00002.safetensors
                                      manifest.json                      written last; believed only when checked

    "parts": [{"file": "part-00000-of-00002.safetensors", "bytes": 9664, "sha256": "5e88...",
               "tensors": {"model.norm.weight": "F32[48]",                              all of it
                           "model.blocks.0.qkv.weight[0:16,0:48]": "F32[144,48]"}},     16 rows of 144

A tensor is called ``model.NAME``, ``optimizer.KEY.NAME`` or ``ema.NAME``, after the parameter that it belongs to;
``ema_began`` (int64 scalar) is the step that the average began with. A part holds it whole, or a rectangle of it with
the place in its name; beside it the manifest has the type and the shape of the whole tensor. Nothing says how many
ranks there were, so that any number of them may read.

Format 1 knew whole tensors only, and its manifest does not list them: the parts' own headers do.

A manifest may come from anywhere. Nothing in it leads out of its folder, and what does not fit is a CheckpointError.
"""

import errno
import json
import math
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import ConfigDict, Field, TypeAdapter

from hvdtrain.errors import CheckpointError, HvdtrainError, OutputError
from hvdtrain.files import PASSING, again, fields_sha256, read_text
from hvdtrain.slices import Rect, Slice, whole_rect

FORMAT_VERSION = 2
_MOST_BYTES = 1 << 28  # of a manifest: two million tensors
_MOST_NUMBERS = 1 << 48  # of a tensor: whatever is made of a shape, no count of bytes overflows
# By safetensors' names, in which its headers say it too.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CUT = re.compile(r"(.*)\[((?:[0-9]+:[0-9]+(?:,[0-9]+:[0-9]+)*)?)\]", re.DOTALL)
_KIND = re.compile(r"([A-Z0-9]+)\[((?:[0-9]+(?:,[0-9]+)*)?)\]")
# Fields that came later: in a manifest only where they say something, so that those of runs without them stay the same.
_WHERE_SET = {"averaged_from", "loss_scale", "noise", "guard", "run_steps"}
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Progress:
    """Where a run stands, apart from its tensors. ``identity``: the settings that a resumed run must share.

    ``loss_scale``: see LossScale.state, of fp16 runs.
    ``noise``, ``guard``: see NoiseScale.state and Guard.state.
    ``run_steps``: the length that the run had then, on which its learning rate depends.
    ``averaged_from``: the steps whose weights were averaged (``hvdtrain average``); nothing can go on from there.
    A field that an older manifest lacks has its default.
    """

    step: Count = 0
    rows_consumed: Count = 0
    tokens: Count = 0
    fingerprint: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    best_val_loss: Finite | None = None
    identity: Mapping[str, Any] | None = None
    world_size: Annotated[int, Field(ge=1, lt=1 << 31)] = 1
    versions: Mapping[str, str] | None = None
    averaged_from: tuple[Count, ...] | None = None
    loss_scale: tuple[Annotated[Finite, Field(ge=0)], Count] | None = None
    noise: tuple[Finite, Finite] | None = None
    guard: Annotated[tuple[Finite, ...], Field(min_length=7, max_length=7)] | None = None
    run_steps: Count | None = None

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class PartFile:
    """One rank's file. ``tensors``: what it holds, see above; None: it is of format 1, and its header says so."""

    file: str
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tensors: Mapping[str, str] | None = None

    __pydantic_config__ = _STRICT


class Stored(NamedTuple):
    """A rectangle of a tensor, and where it is stored: as ``key`` in the file ``part``."""

    part: str
    key: str
    name: str
    place: Rect
    whole: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Manifest:
    """``tensors``: what is stored of each, by name; None: of format 1, where each part's header says it."""

    progress: Progress
    parts: Sequence[PartFile]
    tensors: Mapping[str, Sequence[Stored]] | None


# --- as text -----------------------------------------------------------------------------------------------------


def part_name(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.safetensors"


def key_of(piece: Slice) -> str:
    """What a slice of one rectangle is called in a part."""
    (place,) = piece.places
    if place == whole_rect(piece.whole) and "[" not in piece.name:
        return piece.name
    return f"{piece.name}[{','.join(f'{start}:{start + length}' for start, length in zip(*place, strict=True))}]"


def kind_of(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{_DTYPE_NAMES[dtype]}[{','.join(map(str, shape))}]"


def parse_stored(part: str, key: str, kind: str) -> Stored:
    """What ``key_of`` says, and ``kind_of`` of the whole tensor. Errors: ValueError."""
    whole, dtype, all_of_it = _parse_kind(kind)
    if (cut := _CUT.fullmatch(key) if "[" in key else None) is None:
        return Stored(part, key, key, all_of_it, whole, dtype)
    ranges = [tuple(map(int, ends.split(":"))) for ends in cut[2].split(",") if ends]
    place = Rect(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))
    if len(ranges) != len(whole) or any(n < 0 or a + n > side for a, n, side in zip(*place, whole, strict=True)):
        raise ValueError(f"{key} is no place in the shape {tuple(whole)}")
    return Stored(part, key, cut[1], place, whole, dtype)


@lru_cache(maxsize=1024)  # of thousands of tensors, few are unlike all others
def _parse_kind(kind: str) -> tuple[torch.Size, torch.dtype, Rect]:
    match = _KIND.fullmatch(kind)
    if match is None or match[1] not in _DTYPES:
        raise ValueError(f"{kind!r} is no type and shape")
    whole = torch.Size(int(side) for side in match[2].split(",") if side)
    if math.prod(max(1, side) for side in whole) >= _MOST_NUMBERS:
        raise ValueError(f"{kind} is too large a shape")
    return whole, _DTYPES[match[1]], whole_rect(whole)


def by_name(stored: Iterable[Stored]) -> dict[str, list[Stored]]:
    """Errors: ValueError where rectangles of one tensor do not belong together, or one is missing or there twice.

    What this lets pass, a gap beside an overlap as large, is found where that tensor is read.
    """
    found: dict[str, list[Stored]] = {}
    keys: set[str] = set()
    for one in stored:
        if one.key in keys:
            raise ValueError(f"{one.part} holds {one.key}, which another part holds too")
        keys.add(one.key)
        others = found.setdefault(one.name, [])
        others.append(one)
        if (one.whole, one.dtype) != (others[0].whole, others[0].dtype):
            raise ValueError(f"{one.key} and {others[0].key} are not of one tensor")
    for name, pieces in found.items():
        numbers, whole = sum(one.place.numel for one in pieces), math.prod(pieces[0].whole)
        if numbers != whole:
            raise ValueError(f"{name} has {whole} numbers, and {numbers} are stored")
    return found


# --- a whole manifest --------------------------------------------------------------------------------------------


def fields_of(progress: Progress, parts: Sequence[PartFile]) -> dict[str, Any]:
    """What a manifest says, without its own digest."""
    if progress.best_val_loss is not None and not math.isfinite(progress.best_val_loss):
        progress = replace(progress, best_val_loss=None)  # no number that a later one could be compared with
    saved = {k: v for k, v in asdict(progress).items() if v is not None or k not in _WHERE_SET}
    fields = {"format": FORMAT_VERSION, **saved, "parts": [asdict(part) for part in parts]}
    return {**fields, "fingerprint": f"{progress.fingerprint:016x}"}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in ``folder``, checked against its own digest; touches no part.

    Errors: CheckpointError that names the file; see ``cannot_read``.
    """
    path = folder / "manifest.json"
    try:
        fields = json.loads(_read_text(path), parse_constant=_refuse)
        version = fields.pop("format")
        if version not in (1, FORMAT_VERSION):
            raise CheckpointError(f"{path} was written by another version of hvdtrain")
        if fields.pop("manifest_sha256") != fields_sha256({"format": version, **fields}):
            raise CheckpointError(f"{path} is damaged (it does not match its own digest)")
        parts = TypeAdapter(list[PartFile]).validate_json(json.dumps(fields.pop("parts"), allow_nan=False))
        fields["fingerprint"] = int(fields["fingerprint"], 16)
        progress = TypeAdapter(Progress).validate_json(json.dumps(fields, allow_nan=False))
        _check_files(path, parts)
        tensors = None if version == 1 else by_name(stored for part in parts for stored in _stored_in(part))
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {_short(error)})") from None
    return Manifest(progress, parts, tensors)


def _check_files(path: Path, parts: Sequence[PartFile]) -> None:
    if [part.file for part in parts] != [part_name(rank, len(parts)) for rank in range(len(parts))] or not parts:
        named = next((part.file for part in parts if Path(part.file).name != part.file), None)
        what = f"names a part outside its folder: {named!r}" if named else "does not name one part of each rank"
        raise CheckpointError(f"{path} is damaged (it {what})")


def _stored_in(part: PartFile) -> list[Stored]:
    """Errors: ValueError."""
    if part.tensors is None:
        raise ValueError(f"it does not say what {part.file} holds")
    found = [parse_stored(part.file, key, kind) for key, kind in part.tensors.items()]
    if sum(one.place.numel * one.dtype.itemsize for one in found) > part.bytes:
        raise ValueError(f"{part.file} is too small for what it holds")
    return found


def check_resumable(folder: Path, progress: Progress) -> None:
    """Errors: CheckpointError where the checkpoint is an average of others, which has no optimizer state."""
    if progress.averaged_from is not None:
        raise CheckpointError(
            f"{folder} is the average of steps {', '.join(map(str, progress.averaged_from))}, without optimizer state: "
            "evaluate and generate take it, training goes on from the run that it was made of"
        )


def cannot_read(path: Path, error: OSError) -> HvdtrainError:
    """A file that is missing, or that its disk does not give back, is damage: CheckpointError; the checkpoint before is
    taken. A file system that does not answer is none: OutputError (exit 74), and the checkpoint stays where it is.
    """
    kind = OutputError if error.errno in PASSING - {errno.EIO} else CheckpointError
    return kind(f"cannot read {error.filename or path}: {error.strerror}")


def check_is_file(path: Path) -> int:
    """Bytes of a file that is one itself: not a link, which leads elsewhere, nor a pipe, which may never end.

    Errors: CheckpointError; OSError where it is not there.
    """
    found = again(path.lstat, path)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file of its own; a link could lead out of the checkpoint")
    return found.st_size


def _read_text(path: Path) -> str:
    size = check_is_file(path)
    if size > _MOST_BYTES:
        raise CheckpointError(f"{path} is damaged (it has {size} bytes)")
    return read_text(path)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _short(error: Exception) -> str:
    """One line, whatever the file holds."""
    return " ".join(str(error).split())[:300]
