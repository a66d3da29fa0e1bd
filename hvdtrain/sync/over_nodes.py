"""A two-byte wire where several ranks share a node's network: fp32 within nodes, two bytes between them.

    node 0   rank 0   [half 0 | half 1]  \\  pieces: each rank gets its half of both,      in memory, fp32
             rank 1   [half 0 | half 1]  /  and adds it up
    node 1   ranks 2, 3: the same

    half 0   ranks 0, 2                     the wire of both phases, of two-byte numbers   between nodes
    half 1   ranks 1, 3                     the same at the same time

    node 0   ranks 0, 1                     each hands its half to the other               in memory, fp32

So each number of a bucket leaves a node once and comes back once, whatever the number of ranks on it. Where every rank
sent to all others, it would leave as often as the node has ranks: from three on more bytes than a ring of fp32 sends.
Two roundings, as before.
"""

from dataclasses import dataclass

import torch

from hvdtrain.comm.group import Rows
from hvdtrain.comm.ranks import Done, Pending
from hvdtrain.sync.flights import Flights
from hvdtrain.sync.traffic import of_all_reduce

# n ranks on a node, c numbers of a piece


@dataclass(eq=False)
class _Trip:
    """whole_nc: the bucket's own numbers, or a copy of them where n does not divide it."""

    name: str
    arrived_nc: torch.Tensor
    piece_c: torch.Tensor
    copy_nc: torch.Tensor | None
    flat: torch.Tensor
    pending: Pending
    phase: int = 0

    @property
    def whole_nc(self) -> torch.Tensor:
        return self.flat.view(self.arrived_nc.shape) if self.copy_nc is None else self.copy_nc


class OverNodes(Flights[_Trip]):
    """near: the ranks of a node; far: the wire between this rank and those of its place on the other nodes."""

    def __init__(self, near: Rows, far: Flights):
        super().__init__()
        self._near, self._far = near, far

    def advance(self) -> None:
        self._far.advance()
        super().advance()

    def sent_bytes(self, numbers: int) -> float:
        """To its node and to others."""
        ranks = self._near.size
        return of_all_reduce(4 * numbers, ranks) + self._far.sent_bytes(-(-numbers // ranks))

    def _make(self, flat: torch.Tensor, name: str) -> _Trip:
        count, rest = divmod(len(flat), self._near.size)
        arrived = flat.new_empty(self._near.size, count + (rest > 0))
        copy = torch.zeros_like(arrived) if rest else None  # what lies beyond the bucket's end stays 0
        return _Trip(name, arrived, torch.empty_like(arrived[0]), copy, flat, Done())

    def _depart(self, trip: _Trip, flat: torch.Tensor) -> None:
        trip.flat, trip.phase = flat, 0
        if trip.copy_nc is not None:
            trip.copy_nc.view(-1)[: len(flat)].copy_(flat)
        words, arrived = (tensor.view(torch.int32) for tensor in (trip.whole_nc, trip.arrived_nc))
        trip.pending = self._near.all_to_all_async(words, arrived, f"{trip.name}.pieces")

    def _go_on(self, trip: _Trip) -> bool:
        trip.phase += 1
        if trip.phase == 1:
            torch.sum(trip.arrived_nc, dim=0, out=trip.piece_c)
            trip.pending = self._far.start(trip.piece_c, trip.name)
        elif trip.phase == 2:
            piece, whole = (tensor.view(torch.int32) for tensor in (trip.piece_c[None], trip.whole_nc))
            trip.pending = self._near.all_gather_async(piece, whole, f"{trip.name}.handed")
        elif trip.copy_nc is not None:
            trip.flat.copy_(trip.copy_nc.view(-1)[: len(trip.flat)])
        return trip.phase == 3
