"""Sums of buckets of which each rank gets its own part: half of an all-reduce.

    bucket, fp32    [ part 0 | part 1 | part 2 ]      on each of 3 ranks
    sent              to 0     to 1     to 2          all-to-all: fp32, or two-byte numbers as in wire.py
    summed, fp32    rank 0   rank 1   rank 2          each its part, in the order of the ranks

What arrives of a bucket takes as much room as what is sent of it, so that only a few may be under way. Ranks that wait
for one another's buckets must not do so in a circle: all send them in one order, round after round.

    rounds 0, 1 of buckets a, b, c:     a0 b0 c0 a1 b1 c1
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm.ranks import Pending
from hvdtrain.sync.buckets import Run
from hvdtrain.sync.wire import Form, open_words, scaled


class Room:
    """Tensors that are used again. peak_bytes: the most that was lent at a time, and ``held`` besides."""

    def __init__(self, held: int = 0):
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._bytes = self.peak_bytes = held

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Of any values, until it is given back (local)."""
        free = self._free.setdefault((torch.Size(shape), dtype), [])
        tensor = free.pop() if free else torch.empty(shape, dtype=dtype, device=device)
        self._bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        return tensor

    def give(self, tensor: torch.Tensor) -> None:
        self._bytes -= tensor.nbytes
        self._free[tensor.shape, tensor.dtype].append(tensor)


@dataclass
class _Flight:
    """A bucket that is under way. lent: what has to be given back when it has arrived."""

    number: int
    received: torch.Tensor
    lent: list[torch.Tensor]
    pending: Pending


class Scatter:
    """Sends the buckets of ``runs`` once in each of a step's rounds, in one order.

    One step: ``begin()``; ``offer(number)`` when a bucket is full; ``finish(rounds)`` sends what was not offered, too.
    flat_of: gives a bucket's numbers up to be sent. land: gets those of all ranks for this rank's part, fp32 [ranks,
    part]. at_once: how many may be under way.

    passes: gradients are not kept: flat tensors come from ``room`` and go back there; and where as many buckets as may
    are under way, ``offer`` waits for one, so that no more fill up meanwhile.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        form: Form | None,
        room: Room,
        flat_of: Callable[[int], torch.Tensor],
        land: Callable[[int, torch.Tensor], None],
        at_once: int,
        passes: bool,
    ):
        self._runs, self._form, self._room = runs, form, room
        self._flat_of, self._land, self._at_once, self._passes = flat_of, land, at_once, passes
        self._flights: deque[_Flight] = deque()
        self.begin()

    def begin(self) -> None:
        """A step begins (local)."""
        self._sent = 0
        self._offered = [0] * len(self._runs)

    def offer(self, number: int) -> None:
        """What the next round sends of this bucket is there."""
        self._offered[number] += 1
        self._advance(waits=self._passes)

    def finish(self, rounds: int) -> None:
        """Send all that is left of so many rounds, and wait for it."""
        self._offered = [rounds] * len(self._runs)
        self._advance(waits=True)
        while self._flights:
            self._arrive()

    def _advance(self, waits: bool) -> None:
        while True:
            turn, number = divmod(self._sent, len(self._runs))
            if self._offered[number] <= turn:
                return
            while self._flights and (self._flights[0].pending.done() or (waits and self._is_full())):
                self._arrive()
            if self._is_full():
                return
            self._send(number)
            self._sent += 1

    def _is_full(self) -> bool:
        return len(self._flights) == self._at_once

    def _send(self, number: int) -> None:
        run, flat = self._runs[number], self._flat_of(number)
        words = flat.view(torch.int32).view(run.holders.size, -1)
        lent = [flat] if self._passes else []
        if self._form is not None:
            words = self._rounded(flat.view(run.holders.size, -1), self._form)
            for tensor in lent:
                self._room.give(tensor)
            lent = [words]
        received = self._room.take(words.shape, torch.int32, flat.device)
        pending = run.holders.all_to_all_async(words, received, f"{run.name}.parts")
        self._flights.append(_Flight(number, received, [*lent, received], pending))

    def _rounded(self, numbers_pc: torch.Tensor, form: Form) -> torch.Tensor:
        ranks, part = numbers_pc.shape
        words = self._room.take((ranks, part // 2 + 1), torch.int32, numbers_pc.device)
        parts, scales = open_words(words, form.dtype)
        if form.scaled:
            scales.copy_(scaled(numbers_pc))
        parts.copy_(numbers_pc)
        return words

    def _arrive(self) -> None:
        flight = self._flights.popleft()
        flight.pending.wait()
        if self._form is None:
            self._land(flight.number, flight.received.view(torch.float32))
        else:
            parts, scales = open_words(flight.received, self._form.dtype)
            numbers = self._room.take(parts.shape, torch.float32, parts.device)
            numbers.copy_(parts)
            if self._form.scaled:
                numbers.mul_(scales)
            self._land(flight.number, numbers)
            self._room.give(numbers)
        for tensor in flight.lent:
            self._room.give(tensor)
