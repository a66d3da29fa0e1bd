"""Which places of its tensors a rank has, where it has a range of a flat bucket that several tensors share.

    bucket     [ q [6, 4]          | k [2, 4]| bias |   ]     two ranks: 20 numbers each
    rank 0     [ 0 ............ 20 )
    rank 1                     [ 20 .............. 40 )       q[5:6,0:4], k, bias

A range of a tensor is a few rectangles, at most 2 x dims - 1: the end of a row, whole rows, the beginning of one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from hvdtrain.slices import Rect, Slice
from hvdtrain.sync.buckets import Run


def rectangles_of(start: int, stop: int, shape: Sequence[int]) -> list[Rect]:
    """Those that cover the numbers ``start`` to ``stop`` of a tensor in row-major order, in that order."""
    if start >= stop:
        return []
    if not shape:
        return [Rect((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if len(shape) == 1:
        return [Rect((start,), (stop - start,))]
    if first > last:  # all within one row
        return _within(last, start - last * row, stop - last * row, shape)
    head = _within(first - 1, start - (first - 1) * row, row, shape) if start < first * row else []
    rows = [Rect((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))] if first < last else []
    return [*head, *rows, *_within(last, 0, stop - last * row, shape)]


def shard_of(run: Run, slices: Sequence[Slice], flat: torch.Tensor, replicas: int) -> list[tuple[int, int, Slice]]:
    """This rank's part of ``flat``, as slices of one rectangle each, which are views of it: (number of the parameter,
    place in the part, slice). A slice's ``copies`` are counted over all ranks.

    slices: whose numbers ``run`` has. replicas: of the whole run.
    """
    part = run.length // run.holders.size
    begin = run.holders.rank * part
    return range_of(run, slices, flat, begin, begin + part, run.copies * replicas // run.holders.size)


def range_of(
    run: Run, slices: Sequence[Slice], flat: torch.Tensor, begin: int, end: int, copies: int = 1
) -> list[tuple[int, int, Slice]]:
    """The same of the numbers ``begin`` to ``end`` of ``flat``."""
    found = []
    for (number, _), offset in zip(run.members, run.offsets, strict=True):
        at = offset
        for piece in slices[number].rectangles():
            place, size = piece.places[0], piece.tensor.numel()
            start, stop = max(begin - at, 0), min(end - at, size)
            for inner in rectangles_of(start, stop, place.shape):
                where = at + start - begin
                view = flat[begin + where : begin + where + inner.numel].view(inner.shape)
                outer = Rect(tuple(a + b for a, b in zip(inner.offset, place.offset, strict=True)), inner.shape)
                found.append((number, where, replace(piece, tensor=view, places=(outer,), copies=copies)))
                start += inner.numel
            at += size
    return found


class Shares:
    """``moves``: what a rank's optimizer moves, ranges of tensors; and where the gradient of each lies."""

    def __init__(self) -> None:
        self.moves: list[Slice] = []
        self._gradients: list[tuple[int, torch.Tensor]] = []  # whose they are, and where they lie

    def add(self, found: Iterable[tuple[int, int, Slice]], summed: torch.Tensor) -> None:
        """found: of ``shard_of`` or ``range_of``, in a part whose gradients are summed in ``summed``."""
        for number, at, piece in found:
            tensor = piece.tensor.requires_grad_()
            self.moves.append(piece)
            self._gradients.append((number, summed[at : at + tensor.numel()].view(tensor.shape)))

    def give_gradients(self, used: torch.Tensor, users: torch.Tensor) -> None:
        """Into ``grad``; None where nobody had one. used: by this rank, bool, on the host; users: ranks that did, on
        any device.
        """
        unused = set[int]()
        if not bool(used.all()):  # no need to ask the device: what this rank used, somebody used
            unused = set((users == 0).nonzero().flatten().tolist())
        for piece, (number, gradient) in zip(self.moves, self._gradients, strict=True):
            piece.tensor.grad = None if number in unused else gradient


@torch.no_grad()
def in_one(run: Run) -> torch.Tensor:
    """The weights of a run side by side: a flat tensor, of which its members become views."""
    flat = run.empty()
    for (_, parameter), view in zip(run.members, run.views(flat), strict=True):
        view.copy_(parameter)
        parameter.data = view
    return flat


def _within(row: int, start: int, stop: int, shape: Sequence[int]) -> list[Rect]:
    """Of one row."""
    inner = rectangles_of(start, stop, shape[1:])
    return [Rect((row, *rect.offset), (1, *rect.shape)) for rect in inner]
