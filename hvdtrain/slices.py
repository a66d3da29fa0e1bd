"""What a rank holds of a named tensor: all of it, or rectangles cut out of it.

    whole tensor  [6, 4]      rank 0 holds                rank 1 holds
    a fused qkv, two ranks    Rect((0, 0), (1, 4))        Rect((1, 0), (1, 4))     its rows of q
                              Rect((2, 0), (1, 4))        Rect((3, 0), (1, 4))     of k
                              Rect((4, 0), (1, 4))        Rect((5, 0), (1, 4))     of v

A name and a place say nothing of how many ranks there are: what one run wrote in slices, another reads in others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import nn

from hvdtrain.comm.group import Group


class Rect(NamedTuple):
    """A rectangle of a tensor: where it begins in each dim, and how far it goes; ``((), ())`` of a scalar."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def common(self, other: "Rect") -> "Rect | None":
        """What both cover; None: nothing."""
        offset, shape = [], []
        for a, length_a, b, length_b in zip(*self, *other, strict=True):
            offset.append(max(a, b))
            shape.append(min(a + length_a, b + length_b) - offset[-1])
        return Rect(tuple(offset), tuple(shape)) if all(length > 0 for length in shape) else None

    def index_in(self, outer: "Rect") -> tuple[slice, ...]:
        """Where it lies in a tensor that holds ``outer``."""
        return tuple(slice(a - o, a - o + n) for a, n, o in zip(*self, outer.offset, strict=True))


def whole_rect(shape: Sequence[int]) -> Rect:
    return Rect((0,) * len(shape), tuple(shape))


def tile(rects: Sequence[Rect], whole: Rect) -> bool:
    """Do ``rects``, each within ``whole``, cover every place of it, and none twice?"""
    if sum(rect.numel for rect in rects) != whole.numel:
        return False
    if len(rects) <= 1:
        return True
    # Along the dim in which they begin at most places, few of them lie beside one another.
    dim = max(range(len(whole.shape)), key=lambda dim: len({rect.offset[dim] for rect in rects}))
    rects = sorted(rects, key=lambda rect: rect.offset[dim])
    for number, rect in enumerate(rects):
        for later in range(number + 1, len(rects)):
            if rects[later].offset[dim] >= rect.offset[dim] + rect.shape[dim]:
                break
            if rect.common(rects[later]) is not None:
                return False
    return True


class Tensors(Protocol):
    """Whole tensors by name, of which each rank reads what it holds."""

    def whole(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and type of a tensor. Errors: KeyError where there is none of that name."""

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        """What lies at ``places`` of a tensor (None: all of it), one after another along its first dim; on the CPU."""


@dataclass(frozen=True, eq=False)
class Slice:
    """This rank's piece of the tensor that is called ``name`` in every replica.

    tensor: the piece itself, not a copy; whole: shape of the tensor that it is cut from.
    places: where it lies there. The rectangles follow one another in the piece, along its first dim.
    holders: ranks whose gradients of it add up: one in each replica.
    copies: ranks of one replica that hold the same numbers; a norm over the replica counts them once.
    """

    name: str
    tensor: torch.Tensor
    whole: torch.Size
    places: tuple[Rect, ...]
    holders: Group
    copies: int = 1

    @property
    def is_whole(self) -> bool:
        return self.tensor.shape == self.whole

    def rectangles(self) -> "list[Slice]":
        """The same, as slices of one rectangle each."""
        if len(self.places) == 1:
            return [self]
        parts = self.tensor.split([place.shape[0] for place in self.places])
        return [replace(self, tensor=part, places=(place,)) for part, place in zip(parts, self.places, strict=True)]


def whole_slice(name: str, tensor: torch.Tensor, holders: Group) -> Slice:
    """A tensor that every replica holds whole, on one rank."""
    return Slice(name, tensor, tensor.shape, (whole_rect(tensor.shape),), holders)


def whole_slices(model: nn.Module, holders: Group) -> Sequence[Slice]:
    """The parameters of a model that each replica holds whole, in order; a tied one once."""
    return [whole_slice(name, parameter, holders) for name, parameter in model.named_parameters()]
