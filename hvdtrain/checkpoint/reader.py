"""Reads a checkpoint: of each tensor what this rank holds, from whatever rectangles it was stored in.

stored by 2 ranks     [0:3,0:4]        read by 4    [0:2]   from the first
                      [3:6,0:4]                     [2:4]   one row from each
                                                    ...
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from hvdtrain.checkpoint.manifest import Stored, by_name, check_resumable, kind_of, parse_stored, read_manifest
from hvdtrain.checkpoint.retention import step_of
from hvdtrain.errors import CheckpointError
from hvdtrain.files import again
from hvdtrain.optim.ema import Ema
from hvdtrain.slices import Rect, Slice, tile, whole_rect

T = TypeVar("T")

Weights = Literal["raw", "ema"]  # of the last step; averaged over the last steps


def load(
    folder: Path,
    slices: Sequence[Slice],
    optimizer: torch.optim.Optimizer | None = None,
    ema: Ema | None = None,
    weights: Weights = "raw",
    moves: Sequence[Slice] | None = None,
) -> "Checkpoint":
    """Copy a checkpoint's tensors into ``slices`` of a model and, if given, what ``optimizer`` and ``ema`` keep of them
    (local; files were checked). Nothing else is read. Returns the checkpoint.

    ema: its average, warm-up and all; where the checkpoint has none, the average begins with the weights loaded here.
    weights: ``ema`` puts the averages into the model; a parameter without one was not trained, and is as it was.
    moves: what the optimizer moves of ``slices``; None: these.

    Errors: CheckpointError where a parameter is missing or has another shape or type, a state is missing or has a shape
    that cannot be, or averages are asked for and missing; or where ``optimizer`` is to go on from ``hvdtrain average``.
    """
    saved = Checkpoint(folder)
    if optimizer is not None:
        check_resumable(folder, saved.progress)
    if weights == "ema" and not saved.has_ema:
        raise CheckpointError(f"{folder} has no averaged weights")
    with torch.no_grad():
        for piece in slices:
            is_averaged = weights == "ema" and f"ema.{piece.name}" in saved
            _copy(saved, f"{'ema' if is_averaged else 'model'}.{piece.name}", piece, piece.tensor)
        if optimizer is not None:
            _load_states(saved, slices if moves is None else moves, optimizer)
        if ema is not None:
            _load_ema(saved, ema)
    return saved


def load_kept(saved: "Checkpoint", kept: Sequence[Slice]) -> list[str]:
    """Copy into what a sync keeps from step to step what the checkpoint has of it (local). Returns the names of what it
    has not, because another sync has saved it: that begins anew.

    Errors: CheckpointError for another shape or type.
    """
    for piece in kept:
        if piece.name in saved:
            _copy(saved, piece.name, piece, piece.tensor)
    return [piece.name for piece in kept if piece.name not in saved]


@torch.no_grad()
def load_own(saved: "Checkpoint", own: Sequence[Slice]) -> str:
    """Copy into what this rank has of its own what a run that stopped between two saves had there (local). Returns
    what has to be said about it: that other ranks, or another sync, go on from what all had in the mean.
    """
    names = {name for name in saved if name.startswith("own.")}
    if not names:
        return ""
    if names != {piece.name for piece in own} or any(saved.whole(piece.name)[0] != piece.whole for piece in own):
        return (
            f"{saved.folder} is of {saved.progress.world_size} ranks that stopped between two saves, each with numbers "
            "of its own: this run goes on from their mean"
        )
    for piece in own:
        _copy(saved, piece.name, piece, piece.tensor)
    return ""


class Checkpoint:
    """The tensors of one checkpoint, whose files were checked before (local).

    A part is opened when it is first needed, and mapped, not read: what costs time and memory is what is asked for.
    Errors, of every method: CheckpointError where the files do not hold what the manifest says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = read_manifest(folder)
        self.progress = manifest.progress
        self._parts: dict[str, Any] = {}
        tensors = manifest.tensors
        if tensors is None:
            tensors = self._reading(lambda: by_name(self._headers([part.file for part in manifest.parts])))
        self._tensors: Mapping[str, Sequence[Stored]] = tensors

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def has_ema(self) -> bool:
        """Are there averaged weights beside those of its step?"""
        return "ema_began" in self

    def whole(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """See ``Tensors``."""
        first = self._tensors[name][0]
        return first.whole, first.dtype

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        """See ``Tensors``. It may lie in the mapped file, which nothing written there ever reaches."""
        places = places or [whole_rect(self.whole(name)[0])]
        found = [self._reading(partial(self._read, name, place)) for place in places]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, name: str, place: Rect) -> torch.Tensor:
        stored = [(one, common) for one in self._tensors[name] if (common := one.place.common(place)) is not None]
        if not tile([common for _, common in stored], place):
            raise CheckpointError(f"{self.folder}: what is stored of {name} has a gap or an overlap")
        if len(stored) == 1:
            return self._read_stored(*stored[0])
        target = torch.empty(place.shape, dtype=self.whole(name)[1])
        for one, common in stored:
            target[common.index_in(place)] = self._read_stored(one, common)
        return target

    def _read_stored(self, one: Stored, place: Rect) -> torch.Tensor:
        """What lies at ``place`` of the whole tensor; no more bytes of the file are touched."""
        lazy, expected = self._part(one.part).get_slice(one.key), kind_of(one.place.shape, one.dtype)
        if _kind(lazy) != expected:
            raise CheckpointError(f"{self.folder / one.part}: {one.key} needs {expected}, found {_kind(lazy)}")
        return lazy[place.index_in(one.place)]

    def _headers(self, parts: Iterable[str]) -> Iterator[Stored]:
        """What the parts of a checkpoint of format 1 say that they hold."""
        for part in parts:
            file = self._part(part)
            for key in file.keys():  # noqa: SIM118
                yield parse_stored(part, key, _kind(file.get_slice(key)))

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            path = self.folder / name
            self._parts[name] = again(lambda: safe_open(path, framework="pt", device="cpu"), path)
        return self._parts[name]

    def _reading(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.folder}: {error}") from None


def _kind(lazy: Any) -> str:
    return f"{lazy.get_dtype()}[{','.join(map(str, lazy.get_shape()))}]"


def _copy(saved: Checkpoint, name: str, piece: Slice, target: torch.Tensor) -> None:
    """The tensor ``name`` at the places of ``piece``, which is the rank's slice of a parameter."""
    shape, dtype = saved.whole(name) if name in saved else (None, None)
    if shape != piece.whole:
        found = "no such tensor" if shape is None else f"shape {tuple(shape)}"
        raise CheckpointError(f"{saved.folder}: {piece.name} needs shape {tuple(piece.whole)}, found {found}")
    if dtype != target.dtype:
        raise CheckpointError(f"{saved.folder}: {piece.name} needs {target.dtype}, found {dtype}")
    target.copy_(saved.read(name, piece.places))


def _load_states(saved: Checkpoint, slices: Sequence[Slice], optimizer: torch.optim.Optimizer) -> None:
    """An optimizer keeps the same things of every parameter that it has moved in the same way."""
    keys = _state_keys(saved)
    for piece in slices:
        for key in keys[piece.name]:
            optimizer.state[piece.tensor][key] = _read_state(saved, f"optimizer.{key}.{piece.name}", piece)
    orthogonal = {id(w) for group in optimizer.param_groups if group.get("is_orthogonal") for w in group["params"]}
    for way in (True, False):
        alike = [piece for piece in slices if (id(piece.tensor) in orthogonal) == way]
        every = set[str]().union(*(keys[piece.name] for piece in alike))
        for piece in alike:
            if (found := keys[piece.name]) and found != every:
                missing = min(every - found)
                raise CheckpointError(f"{saved.folder}: the optimizer's {missing} of {piece.name} is missing")


def _state_keys(names: Iterable[str]) -> Mapping[str, set[str]]:
    """Parameter name -> KEYs of its ``optimizer.KEY.NAME``. A key has no dot, so that names may end alike."""
    keys: dict[str, set[str]] = defaultdict(set)
    for full_name in names:
        kind, _, rest = full_name.partition(".")
        key, dot, name = rest.partition(".")
        if kind == "optimizer" and dot:
            keys[name].add(key)
    return keys


def _read_state(saved: Checkpoint, name: str, piece: Slice) -> torch.Tensor:
    """A scalar is the fused optimizer's step count; it lives beside the parameter, as torch makes it."""
    shape, dtype = saved.whole(name)
    if shape not in (piece.whole, ()) or not dtype.is_floating_point:
        raise CheckpointError(
            f"{saved.folder}: {name} needs shape {tuple(piece.whole)} or one number, found {dtype} {tuple(shape)}"
        )
    if shape != piece.whole:  # its own: several pieces of a parameter may be here, and each counts for itself
        return saved.read(name).to(piece.tensor.device, copy=True)
    found = saved.read(name, piece.places)
    # On a CPU these are the mapped pages, which the kernel copies when the optimizer writes to them.
    return found.to(piece.tensor.device).contiguous()


def _load_ema(saved: Checkpoint, ema: Ema) -> None:
    ema.restart(step_of(saved.folder))
    if not saved.has_ema:
        return
    shape, dtype = saved.whole("ema_began")
    if shape != () or dtype != torch.int64:
        raise CheckpointError(f"{saved.folder}: ema_began needs one int64, found {dtype} {tuple(shape)}")
    ema.began = int(saved.read("ema_began"))
    for average in ema.averages():
        if f"ema.{average.name}" in saved:
            _copy(saved, f"ema.{average.name}", average, average.tensor)
