"""Where numbers cross from "each part has its own" to "all parts have the same", and what their gradients do there.

Between blocks of a model that is cut over the tensor axis lies the residual stream, either the same on all parts,
[B, T, D], or (the sequence split) each part's own positions: [1, B, T / parts, D]. The dim in front says so. Attention
and feed-forward read all positions, each part with its own heads and columns.

                    forward             backward
    enter           -                   sum                stream -> what own weights read
                    gather              scatter_sum          a split one
    leave           sum                 -                  products of own weights -> stream
                    scatter_sum         gather               a split one
    begin_split     own positions       gather             the same on all -> split
    end_split       gather              own positions      split -> the same on all

Source: Shoeybi et al. 2019, "Megatron-LM", 3; the split: Korthikanti et al. 2022, "Reducing Activation Recomputation".

What crosses goes through one operator of torch's own, so that a compiled block stays one graph.

Shape letters:  B rows, T positions, D model width
"""

from dataclasses import dataclass
from typing import Any

import torch

from hvdtrain.comm.axis import Axis

_POSITIONS = 2  # the dim that is split
_AXES: list[Axis] = []


@dataclass(frozen=True)
class Parts:
    """A tensor axis as a graph knows it: ``number`` among the axes of this process, this rank's place, how many."""

    number: int
    rank: int
    size: int

    @property
    def axis(self) -> Axis:
        return _AXES[self.number]


def parts_of(axis: Axis) -> Parts:
    """The parts that ``axis`` joins (local)."""
    if axis not in _AXES:
        _AXES.append(axis)
    return Parts(_AXES.index(axis), axis.rank, axis.size)


def is_split(x: torch.Tensor) -> bool:
    """Has each part its own positions of this stream?"""
    return x.dim() == 4


def enter(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """All positions of a stream, for products with weights that each part has its own of."""
    return _cross(x, "gather", "scatter_sum", parts) if is_split(x) else _cross(x, "same", "sum", parts)


def leave(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The parts' products, summed: as the stream is that ``x`` came from."""
    return _cross(x, "scatter_sum", "gather", parts) if is_split(x) else _cross(x, "sum", "same", parts)


def begin_split(x_BTD: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Own positions, [1, B, T / parts, D], of a stream that is the same on all parts, and whose T divides."""
    return _cross(x_BTD[None], "own", "gather", parts)


def end_split(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """A stream the same on all parts again: [B, T, D]. Their gradients of it must be equal."""
    return _cross(x, "gather", "own", parts)[0] if is_split(x) else x


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x``, whose gradient is multiplied."""
    return x.detach() + factor * (x - x.detach())


def sum_gradients(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """``x``, which is the same on all parts, and whose gradient is the sum of theirs."""
    return _cross(x, "same", "sum", parts)


def sum_of_parts(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The sum of the parts' tensors, on all of them; its gradient is each one's."""
    return _cross(x, "sum", "same", parts)


# --- one operator -------------------------------------------------------------------------------------------------


def _cross(x: torch.Tensor, there: str, back: str, parts: Parts) -> torch.Tensor:
    """``x`` taken ``there``; its gradient, ``back``: each of same, own, sum, gather, scatter_sum."""
    return torch.ops.hvdtrain.cross(x, there, back, parts.number)


# Not torch.library.custom_op, which loads torch's compiler when it is first called: 78 MiB of each rank.
_LIBRARY = torch.library.Library("hvdtrain", "FRAGMENT")
_LIBRARY.define("cross(Tensor x, str there, str back, int number) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _crossed(x: torch.Tensor, there: str, back: str, number: int) -> torch.Tensor:
    axis = _AXES[number]
    if there == "gather":
        return axis.gather(x.contiguous(), _POSITIONS)
    if there == "scatter_sum":
        return axis.scatter_sum(x.contiguous(), _POSITIONS)
    if there == "own":
        return x.chunk(axis.size, _POSITIONS)[axis.rank].clone(memory_format=torch.contiguous_format)
    copied = x.clone(memory_format=torch.contiguous_format)
    return axis.sum(copied) if there == "sum" else copied


def _shaped(x: torch.Tensor, there: str, back: str, number: int) -> torch.Tensor:
    """What ``_crossed`` makes, without numbers."""
    if there in ("same", "sum"):
        return x.new_empty(x.shape)
    size, positions = _AXES[number].size, x.shape[_POSITIONS]
    shape = list(x.shape)
    shape[_POSITIONS] = positions * size if there == "gather" else positions // size
    return x.new_empty(shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *ctx.how = inputs


def _go_back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    there, back, number = ctx.how
    return grad if back == "same" else torch.ops.hvdtrain.cross(grad, back, there, number), None, None, None


_LIBRARY.impl("cross", _crossed, "CompositeExplicitAutograd")
torch.library.register_fake("hvdtrain::cross", _shaped, lib=_LIBRARY)
torch.library.register_autograd("hvdtrain::cross", _go_back, setup_context=_remember, lib=_LIBRARY)
