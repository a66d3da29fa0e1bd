"""Buckets in phases: all go on while one is waited for, none is waited for that another rank may not have begun."""

from dataclasses import dataclass, field

import pytest
import torch

from hvdtrain.comm.ranks import Done, Pending
from hvdtrain.sync import flights
from hvdtrain.sync.flights import Flights


class Others:
    """A phase that others end: after so many looks, or when it is waited for."""

    def __init__(self, said: list[str], name: str, looks: int):
        self.said, self.name, self.looks = said, name, looks

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.said.append(f"{self.name} over" if self.looks < 0 else f"{self.name} waited for")
        self.looks = 0


@dataclass(eq=False)
class Bucket:
    name: str
    phases: list[int]  # looks until each of them ends
    pending: Pending = field(default_factory=Done)


class Scripted(Flights[Bucket]):
    """phases: of each bucket, by name."""

    def __init__(self, phases: dict[str, list[int]]):
        super().__init__()
        self.phases, self.said = phases, list[str]()

    def sent_bytes(self, numbers: int) -> float:
        return 0.0

    def _make(self, flat: torch.Tensor, name: str) -> Bucket:
        return Bucket(name, [])

    def _depart(self, flight: Bucket, flat: torch.Tensor) -> None:
        flight.phases = list(self.phases[flight.name])
        self._go_on(flight)

    def _go_on(self, flight: Bucket) -> bool:
        if not flight.phases:
            self.said.append(f"{flight.name} landed")
            return True
        looks = flight.phases.pop(0)
        flight.pending = Others(self.said, f"{flight.name}{len(flight.phases)}", looks)
        return False


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    found: list[None] = []
    monkeypatch.setattr(flights, "nap", lambda: found.append(None))
    return found


FLAT = torch.zeros(4)


def test_all_go_on_while_one_is_waited_for(naps: list[None]):
    """b's phases come and go while a's only one lasts; once a is alone it is waited for."""
    wire = Scripted({"a": [30], "b": [0, 0]})
    a, b = wire.start(FLAT, "a"), wire.start(FLAT, "b")
    a.wait()
    assert wire.said == ["b1 over", "b0 over", "b landed", "a0 waited for", "a0 over", "a landed"]
    assert a.done() and b.done()


def test_the_last_one_is_waited_for_asleep(naps: list[None]):
    wire = Scripted({"a": [1000]})
    wire.start(FLAT, "a").wait()
    assert "a0 waited for" in wire.said
    assert not naps


def test_one_of_several_is_looked_after_and_never_waited_for(naps: list[None]):
    wire = Scripted({"a": [20], "b": [40]})
    a, b = wire.start(FLAT, "a"), wire.start(FLAT, "b")
    a.wait()
    assert wire.said == ["a0 over", "a landed"]
    assert len(naps) >= 9
    assert a.done() and not b.done()


def test_a_bucket_that_leaves_lets_the_others_go_on():
    wire = Scripted({"a": [0, 5], "b": [5]})
    wire.start(FLAT, "a")
    wire.start(FLAT, "b")
    assert wire.said == ["a1 over"]


def test_a_bucket_goes_once_at_a_time():
    wire = Scripted({"a": [5]})
    first = wire.start(FLAT, "a")
    with pytest.raises(AssertionError, match="a is under way"):
        wire.start(FLAT, "a")
    first.wait()
    wire.start(FLAT, "a")  # and again in the next step
