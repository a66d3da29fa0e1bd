"""Who has which rows, and how old the weights are that a gradient comes from: what a server that does not wait keeps.

    tickets     0 1 2 3 | 4 5 6 7 | ...       a step has one for each worker, dealt to whoever asks
    updates     0 -> 1 -> 2 -> 3 -> ...       one for each push
    worker      pulls at 2, pushes at 5: its gradient is 3 updates old, its staleness

A push that is too old may be refused: its ticket goes to another worker. So does that of a worker that is lost.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Totals(NamedTuple):
    """Of all pushes since the run began or went on. norms: of their gradients, before clipping. staleness: the sum, and
    the most; late: pushes that were too old; refused: those of them that were not taken. flags: see ``Told``. lost:
    workers.
    """

    loss: float = 0.0
    weight: float = 0.0
    norms: float = 0.0
    pushes: float = 0.0
    staleness: float = 0.0
    most: float = 0.0
    late: float = 0.0
    refused: float = 0.0
    flags: float = 0.0
    lost: float = 0.0


class Book:
    """workers: their ranks. steps: that the run has behind it. Tickets are numbered from its beginning."""

    def __init__(self, workers: Iterable[int], steps: int):
        self._pulled = dict.fromkeys(workers, 0)
        self.parts = len(self._pulled)
        self.dealt = self.finished = steps * self.parts
        self.updates = 0
        self._held: dict[int, int] = {}
        self._returned: list[tuple[int, int]] = []  # ticket, who did not finish it

    def deal(self, worker: int, last_step: int) -> int | None:
        """A ticket that nobody has, of ``last_step`` at most; None: there is none."""
        assert worker not in self._held, "it has one"
        found = next((one for one in self._returned if one[1] != worker), None)
        if found is None and self.dealt >= last_step * self.parts:
            found = next(iter(self._returned), None)  # better its own again than none
            if found is None:
                return None
        if found is not None:
            self._returned.remove(found)
            self._held[worker] = found[0]
        else:
            self._held[worker] = self.dealt
            self.dealt += 1
        return self._held[worker]

    def staleness(self, worker: int) -> int:
        """Updates that the weights of ``worker`` know nothing of."""
        return self.updates - self._pulled[worker]

    def holds(self, worker: int) -> bool:
        """Has it a ticket?"""
        return worker in self._held

    def finish(self, worker: int, is_update: bool) -> None:
        """Its push was taken. is_update: it had targets."""
        del self._held[worker]
        self.finished += 1
        self.updates += is_update

    def take_back(self, worker: int) -> None:
        """Another one shall compute its ticket, where it has one."""
        if worker in self._held:
            self._returned.append((self._held.pop(worker), worker))

    def note_pull(self, worker: int) -> None:
        """It gets the weights as they are now."""
        self._pulled[worker] = self.updates
