"""Which tensors of a run are saved, and under which names.

model.NAME             a parameter, whatever the rank holds of it; a tied one once
optimizer.KEY.NAME     what the optimizer keeps of it: at its places where it has its shape, else whole
ema.NAME               its average, where weights are averaged
ema_began              the step that the average began with (int64 scalar)
sync.NAME              what a sync keeps from step to step
own.NAME               what each rank had of its own, [ranks, ...]: of a run that stopped between two saves
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from hvdtrain.comm.group import Group
from hvdtrain.optim.ema import Ema
from hvdtrain.slices import Rect, Slice, whole_slice


def run_state(
    slices: Sequence[Slice],
    optimizer: torch.optim.Optimizer | None = None,
    ema: Ema | None = None,
    moves: Sequence[Slice] | None = None,
) -> list[Slice]:
    """The tensors themselves, not copies (local). slices: this rank's of the model; moves: what the optimizer moves of
    them (None: these).
    """
    state = [replace(piece, name=f"model.{piece.name}", tensor=piece.tensor.detach()) for piece in slices]
    if optimizer is not None:
        state += optimizer_state(slices if moves is None else moves, optimizer)
    if ema is not None:
        state += [replace(average, name=f"ema.{average.name}") for average in ema.averages()]
        state.append(whole_slice("ema_began", torch.tensor(ema.began), slices[0].holders))
    return state


def own_state(own: Mapping[str, torch.Tensor], ranks: Group) -> list[Slice]:
    """Of what each of ``ranks`` has of its own, this one's (local)."""
    found = []
    for name, tensor in own.items():
        place = Rect((ranks.rank, *(0,) * tensor.dim()), (1, *tensor.shape))
        found.append(
            Slice(f"own.{name}", tensor.unsqueeze(0), torch.Size((ranks.size, *tensor.shape)), (place,), ranks)
        )
    return found


def optimizer_state(slices: Sequence[Slice], optimizer: torch.optim.Optimizer) -> list[Slice]:
    """slices: what the optimizer moves; it keeps nothing yet of a parameter that had no gradient."""
    return [
        _state_slice(piece, f"optimizer.{key}.{piece.name}", value)
        for piece in slices
        for key, value in optimizer.state.get(piece.tensor, {}).items()
    ]


def _state_slice(piece: Slice, name: str, value: torch.Tensor) -> Slice:
    if value.shape == piece.tensor.shape:
        return replace(piece, name=name, tensor=value)
    return whole_slice(name, value, piece.holders)
