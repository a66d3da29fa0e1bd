"""Feeds a loop whose rows are dealt to whoever asks: a fast rank takes more of them than a slow one.

    rows of the training   | step 1: a b c d | step 2: a b c d | ...     a step has as many parts as ranks that train
    rank 0                   1a    1c    1d    2b
    rank 1                     1b       2a        2c
    rank 2                       (1d, lost)

Who deals (see ``Tickets``) sees to it that each part is consumed once. Together they are the rows of every other run,
and their proof is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hvdtrain.data.batch import AnyBatch
from hvdtrain.data.loader import Source


@dataclass(frozen=True)
class Ticket:
    """Part ``part`` of the rows of ``step``."""

    step: int
    part: int


@dataclass(frozen=True)
class Turn:
    """What a rank does next. step: where the run is, never less than before. ticket: the rows to compute; None: none,
    because this rank has taken nothing of ``step``, keeps no rows, or meets the others.
    """

    step: int
    ticket: Ticket | None = None


class Tickets(Protocol):
    """Deals the rows of a run."""

    @property
    def fingerprint(self) -> int:
        """Of the rows that were consumed, as far as this rank answers for them; modulo 2**64."""

    def next_turn(self) -> Turn | None:
        """Waits for it; None: the run is over."""

    def took(self, fingerprint: int) -> None:
        """The rows of the last ticket have this one."""


class TicketLoader:
    """What ``TrainLoader`` is, for rows that are dealt. source: of any rank's share of a step.

    Steps are made when they are asked for: which ones, nobody knows before.
    """

    def __init__(self, source: Source, device: torch.device, tickets: Tickets):
        self._source, self._device, self._tickets = source, device, tickets
        self.rows_consumed = 0
        self._parts: dict[int, Source] = {}
        self._turn = Turn(0)

    @property
    def epoch(self) -> int:
        return self.rows_consumed // self._source.rows_per_epoch

    @property
    def fingerprint(self) -> int:
        return self._tickets.fingerprint

    @property
    def place(self) -> tuple[int, int] | None:
        """Step and share that the random numbers of the last rows belong to."""
        ticket = self._turn.ticket
        return None if ticket is None else (ticket.step, ticket.part)

    def steps(self, steps: range) -> Iterator[int]:
        """The steps that this rank takes part in, some of them several times, in order."""
        first_row = self.rows_consumed
        while (turn := self._tickets.next_turn()) is not None:
            self._turn = turn
            self._first_row = first_row + (0 if turn.ticket is None else self._rows(turn.ticket.step - steps.start))
            self.rows_consumed = first_row + self._rows(turn.step - steps.start + 1)
            yield turn.step

    def next_step(self) -> Sequence[AnyBatch]:
        """The microbatches of this turn, on the device; valid until the next is asked for."""
        if self._turn.ticket is None:
            return ()
        part = self._turn.ticket.part
        source = self._parts.setdefault(part, self._source.for_rank(part))
        (step,) = source.block(self._first_row, 1, 0)
        self._tickets.took(step.fingerprint)
        return source.batches(step.content, self._device)

    @property
    def rows_of_step(self) -> int:
        """Over all ranks."""
        return self._source.rows_per_step

    def deal(self, speeds: tuple[float, ...]) -> None:
        raise NotImplementedError("whoever asks gets rows")

    def close(self) -> None:
        """There is no thread to end."""

    def _rows(self, steps: int) -> int:
        return steps * self._source.rows_per_step
