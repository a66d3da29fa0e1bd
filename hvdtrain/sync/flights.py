"""Buckets that go round in several phases, of which a rank has to begin each.

    bucket 0    [parts ------][sums ------]
    bucket 1         [parts ------][sums ------]      a phase ends when others have done their share: at any time
    this rank   ^    ^       ^     ^ ...              looks after all buckets whenever it comes by

It comes by when another bucket leaves, and as long as it waits for one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from hvdtrain.comm.ranks import Pending
from hvdtrain.comm.waiting import nap


class Flight(Protocol):
    """One bucket's way, and its buffers, kept from step to step. pending: of the phase that it is in."""

    pending: Pending


AnyFlight = TypeVar("AnyFlight", bound=Flight)


class Flights(ABC, Generic[AnyFlight]):
    """A wire (see wire.py) whose buckets have phases; a subclass says which."""

    def __init__(self) -> None:
        self._known: dict[str, AnyFlight] = {}
        self._flying: list[AnyFlight] = []

    def start(self, flat: torch.Tensor, name: str) -> Pending:
        assert flat.dtype == torch.float32 and flat.is_contiguous() and flat.dim() == 1
        if name not in self._known:
            self._known[name] = self._make(flat, name)
        flight = self._known[name]
        assert flight not in self._flying, f"{name} is under way"
        self.advance()
        self._depart(flight, flat)
        self._flying.append(flight)
        return _Landing(self, flight)

    def advance(self) -> None:
        """Let each bucket go on as far as it can without waiting (local)."""
        for flight in list(self._flying):
            if flight.pending.done():
                flight.pending.wait()
                if self._go_on(flight):
                    self._flying.remove(flight)

    def finish(self, flight: AnyFlight) -> None:
        """Wait for one, and look after all meanwhile: only as far as they come by themselves, because another rank may
        not have started them yet.
        """
        while flight in self._flying:
            self.advance()
            if self._flying == [flight]:
                flight.pending.wait()
            elif flight in self._flying and not flight.pending.done():
                nap()

    @abstractmethod
    def sent_bytes(self, numbers: int) -> float:
        """See wire.py."""

    @abstractmethod
    def _make(self, flat: torch.Tensor, name: str) -> AnyFlight:
        """What a bucket needs on its way."""

    @abstractmethod
    def _depart(self, flight: AnyFlight, flat: torch.Tensor) -> None:
        """Begin its first phase."""

    @abstractmethod
    def _go_on(self, flight: AnyFlight) -> bool:
        """A phase is over: begin the next one, or, True, leave the sums where they belong."""


@dataclass(frozen=True)
class _Landing(Generic[AnyFlight]):
    flights: Flights[AnyFlight]
    flight: AnyFlight

    def done(self) -> bool:
        return self.flight not in self.flights._flying

    def wait(self) -> None:
        self.flights.finish(self.flight)
