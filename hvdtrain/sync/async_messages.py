"""The small messages of a server that does not wait: fp64 numbers, beside gradients and weights.

worker -> first server    Report: its gradients are on their way
others -> first server    flags of a step (see ``Told``)
first server -> others    Word: a ticket was dealt, a push is to be taken (by all in the same order), a step is over
first server -> worker    Order: rows to compute, or to meet all others
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.ranks import Pending
from hvdtrain.comm.waiting import wait_for

_HALF = 1 << 32


class Report(NamedTuple):
    """loss, weight, flags: see ``Told``. square: of the summed gradient's norm. high, low: halves of the fingerprint of
    the rows. Behind it: for each parameter, whether it had a gradient.
    """

    loss: float
    weight: float
    square: float
    flags: float
    high: float
    low: float

    @property
    def fingerprint(self) -> int:
        return int(self.high) * _HALF + int(self.low)


def halves(fingerprint: int) -> tuple[int, int]:
    """Numbers that fp64 holds."""
    return divmod(fingerprint, _HALF)


class Kind(IntEnum):
    DEALT, PUSHED, OVER = range(3)


class Word(NamedTuple):
    """worker: who got a ticket, or has pushed; of a step that is over, do all meet (1)? factor: on its gradient, 0: it
    is not taken; loss, weight, square: as it reported. Behind it: which parameters had a gradient; the totals.
    """

    kind: float
    worker: float
    factor: float = 0.0
    loss: float = 0.0
    weight: float = 0.0
    square: float = 0.0


MEETING, LEAVE = -1, -2


class Order(NamedTuple):
    """part: of the rows of ``step``, to be computed; MEETING: all meet after the step; LEAVE: it was the last, and some
    cannot come any more. Behind it: the totals.
    """

    step: float
    part: float


def message(*parts: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Their numbers, one after another."""
    return torch.cat([torch.as_tensor(part, dtype=torch.float64) for part in parts])


class Outbox:
    """Sends messages, and keeps them until they have gone."""

    def __init__(self, axis: Axis):
        self._axis, self._leaving = axis, list[Pending]()

    def send(self, tensor: torch.Tensor, to: int) -> None:
        staying = []
        for pending in self._leaving:
            pending.wait() if pending.done() else staying.append(pending)
        self._leaving = [*staying, self._axis.send(tensor, to)]

    def empty(self) -> None:
        """Wait until all have gone."""
        for pending in self._leaving:
            wait_for(pending)
        self._leaving.clear()
