"""What a rank holds of a named tensor: all of it, or rectangles cut out of it.

    whole tensor  [6, 4]      rank 0 holds                rank 1 holds
    a fused qkv, two ranks    Rect((0, 0), (1, 4))        Rect((1, 0), (1, 4))     its rows of q
                              Rect((2, 0), (1, 4))        Rect((3, 0), (1, 4))     of k
                              Rect((4, 0), (1, 4))        Rect((5, 0), (1, 4))     of v

A name and a place say nothing of how many ranks there are: what one run wrote in slices, another reads in others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hvdtrain.comm.group import Group


class Rect(NamedTuple):
    """A rectangle of a tensor: where it begins in each dim, and how far it goes; ``((), ())`` of a scalar."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


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


def whole_slice(name: str, tensor: torch.Tensor, holders: Group) -> Slice:
    """A tensor that every replica holds whole, on one rank."""
    shape = tuple(tensor.shape)
    return Slice(name, tensor, tensor.shape, (Rect((0,) * len(shape), shape),), holders)


def whole_slices(model: nn.Module, holders: Group) -> Sequence[Slice]:
    """The parameters of a model that each replica holds whole, in order; a tied one once."""
    return [whole_slice(name, parameter, holders) for name, parameter in model.named_parameters()]
