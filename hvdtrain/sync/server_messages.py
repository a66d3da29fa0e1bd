"""What workers and servers send one another: gradients there, weights back, a message for each bucket and pair.

    worker 0   [bucket 0: a | b][bucket 1: a | b]      every bucket is cut into as many parts as there are servers
    worker 1   [bucket 0: a | b][bucket 1: a | b]
    server a   [0: a + a][1: a + a]                    pushes: summed in the order of the workers
    server b   [0: b + b][1: b + b]
               [0: a] [1: a] -> all workers            pulls: posted before the server can send

A pair's messages are matched by their turn: pushes leave in the order of the buckets, whichever backward fills first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.ranks import Pending
from hvdtrain.comm.waiting import wait_for
from hvdtrain.sync.buckets import ALIGNED, Run

AT_ONCE = 4  # buckets that a server has room for


@dataclass(frozen=True)
class Roles:
    """Who trains and who keeps parameters. servers: of ``ranks``, the last so many; 0: each is both."""

    ranks: int
    servers: int

    @property
    def workers(self) -> range:
        return range(self.ranks - self.servers)

    @property
    def keepers(self) -> range:
        return range(self.ranks - (self.servers or self.ranks), self.ranks)

    def parts(self, length: int) -> list[tuple[int, int]]:
        """Where the part of each of ``keepers`` begins and ends in so many numbers."""
        count = len(self.keepers)
        begins = [length * number // count // ALIGNED * ALIGNED for number in range(count)]
        return list(zip(begins, [*begins[1:], length], strict=True))

    def part(self, rank: int, length: int) -> tuple[int, int]:
        """That of ``rank``, which is empty where it keeps nothing."""
        return self.parts(length)[rank - self.keepers.start] if rank in self.keepers else (0, 0)


class Pushes:
    """Gradients from the workers to the servers. ``sums``: of this rank's part of each run, after ``finish``.

    flats: this rank's gradients of each run; none where it is no worker.
    """

    def __init__(self, axis: Axis, roles: Roles, runs: Sequence[Run], flats: Sequence[torch.Tensor]):
        self._axis, self._roles, self._runs, self._flats = axis, roles, runs, flats
        own = [roles.part(axis.rank, run.length) for run in runs]
        self._own = own
        device = runs[0].members[0][1].device
        self.sums = [torch.zeros(end - begin, device=device) for begin, end in own]
        largest = max(end - begin for begin, end in own)
        rooms = min(AT_ONCE, len(runs)) if axis.rank in roles.keepers else 0
        self._rooms = [torch.zeros(len(roles.workers), largest, device=device) for _ in range(rooms)]
        self._filled, self._next = set[int](), 0
        self._sent, self._arriving = list[Pending](), dict[int, list[Pending]]()

    def begin(self) -> None:
        """A step begins: there is room for the first buckets."""
        self._filled, self._next = set(), 0
        for number in range(len(self._rooms)):
            self._receive(number)

    def offer(self, number: int) -> None:
        """This rank's gradients of a run are all there."""
        self._filled.add(number)
        while self._next in self._filled:
            self._send(self._next)
            self._next += 1

    def finish(self) -> None:
        """All is offered: sum what the workers send, and wait until what this rank sent has gone."""
        for number in range(len(self._runs) if self._rooms else 0):
            for pending in self._arriving.pop(number):
                pending.wait()
            numbers_WP = self._room(number)
            if self._flats:
                begin, end = self._own[number]
                numbers_WP[self._axis.rank].copy_(self._flats[number][begin:end])
            torch.sum(numbers_WP, dim=0, out=self.sums[number])
            if number + len(self._rooms) < len(self._runs):
                self._receive(number + len(self._rooms))
        for pending in self._sent:
            pending.wait()
        self._sent.clear()

    @property
    def sent_bytes(self) -> int:
        """By this rank in a step."""
        kept = sum(map(len, self.sums))
        return 4 * (sum(map(len, self._flats)) - kept) if self._flats else 0

    def _send(self, number: int) -> None:
        for server, (begin, end) in zip(self._roles.keepers, self._roles.parts(self._runs[number].length), strict=True):
            if server != self._axis.rank and begin < end:
                self._sent.append(self._axis.send(self._flats[number][begin:end], server))

    def _receive(self, number: int) -> None:
        self._arriving[number] = [
            self._axis.receive(row, worker)
            for worker, row in zip(self._roles.workers, self._room(number), strict=True)
            if worker != self._axis.rank and len(row)
        ]

    def _room(self, number: int) -> torch.Tensor:
        """[workers, this rank's part of a run]"""
        room, (begin, end) = self._rooms[number % len(self._rooms)], self._own[number]
        return room.view(-1)[: len(room) * (end - begin)].view(len(room), end - begin)


class Pulls:
    """Weights from the servers to whom they serve. weights: of each run, of which a server has its part."""

    def __init__(self, axis: Axis, roles: Roles, weights: Sequence[torch.Tensor]):
        self._axis, self._roles, self._weights = axis, roles, weights
        self._arriving: list[Pending] = []

    @torch.no_grad()
    def post(self, takers: Sequence[int]) -> None:
        """Be ready for what the servers will send; until ``deliver`` the weights of others' parts are undefined."""
        if self._axis.rank not in takers:
            return
        for weights in self._weights:
            for server, (begin, end) in zip(self._roles.keepers, self._roles.parts(len(weights)), strict=True):
                if server != self._axis.rank and begin < end:
                    self._arriving.append(self._axis.receive(weights[begin:end], server))

    def wait(self, hear: Callable[[Pending], None] = wait_for) -> None:
        """Asleep, until all that was posted is here. hear: waits for a message."""
        for pending in self._arriving:
            hear(pending)
        self._arriving.clear()

    @torch.no_grad()
    def deliver(self, takers: Sequence[int]) -> None:
        """Send this rank's parts to ``takers``, and wait for what was posted."""
        sent = []
        for weights in self._weights:
            begin, end = self._roles.part(self._axis.rank, len(weights))
            if begin < end:
                mine = weights[begin:end]
                sent += [self._axis.send(mine, taker) for taker in takers if taker != self._axis.rank]
        for pending in [*sent, *self._arriving]:
            pending.wait()
        self._arriving.clear()

    def sent_bytes(self, takers: Sequence[int]) -> int:
        """By this rank to ``takers``."""
        parts = [self._roles.part(self._axis.rank, len(weights)) for weights in self._weights]
        others = sum(taker != self._axis.rank for taker in takers)
        return 4 * others * sum(end - begin for begin, end in parts)
