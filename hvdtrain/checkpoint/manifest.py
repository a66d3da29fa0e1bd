"""A checkpoint's manifest: where the run stands, and each part's digest. Written last; believed only when checked.

A manifest may come from anywhere. Nothing in it leads out of its folder, and what does not fit is a CheckpointError.
"""

import errno
import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from hvdtrain.errors import CheckpointError, HvdtrainError, OutputError
from hvdtrain.files import PASSING, again, fields_sha256, read_text

FORMAT_VERSION = 1
_MOST_BYTES = 1 << 28  # of a manifest: two million parts
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
class Part:
    """One rank's file."""

    file: str
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    __pydantic_config__ = _STRICT


def part_name(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.safetensors"


def fields_of(progress: Progress, parts: Sequence[Part]) -> dict[str, Any]:
    """What a manifest says, without its own digest."""
    if progress.best_val_loss is not None and not math.isfinite(progress.best_val_loss):
        progress = replace(progress, best_val_loss=None)  # no number that a later one could be compared with
    saved = {k: v for k, v in asdict(progress).items() if v is not None or k not in _WHERE_SET}
    fields = {"format": FORMAT_VERSION, **saved, "parts": [asdict(part) for part in parts]}
    return {**fields, "fingerprint": f"{progress.fingerprint:016x}"}


def read_manifest(folder: Path) -> tuple[Progress, list[Part]]:
    """The manifest of the checkpoint in ``folder``, checked against its own digest; touches no part.

    Errors: CheckpointError that names the file; see ``cannot_read``.
    """
    path = folder / "manifest.json"
    try:
        fields = json.loads(_read_text(path), parse_constant=_refuse)
        if fields.pop("format") != FORMAT_VERSION:
            raise CheckpointError(f"{path} was written by another version of hvdtrain")
        if fields.pop("manifest_sha256") != fields_sha256({"format": FORMAT_VERSION, **fields}):
            raise CheckpointError(f"{path} is damaged (it does not match its own digest)")
        parts = TypeAdapter(list[Part]).validate_json(json.dumps(fields.pop("parts"), allow_nan=False))
        fields["fingerprint"] = int(fields["fingerprint"], 16)
        progress = TypeAdapter(Progress).validate_json(json.dumps(fields, allow_nan=False))
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {_short(error)})") from None
    if [part.file for part in parts] != [part_name(rank, len(parts)) for rank in range(len(parts))] or not parts:
        named = next((part.file for part in parts if Path(part.file).name != part.file), None)
        what = f"names a part outside its folder: {named!r}" if named else "does not name one part of each rank"
        raise CheckpointError(f"{path} is damaged (it {what})")
    return progress, parts


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
