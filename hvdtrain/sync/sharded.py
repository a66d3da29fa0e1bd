"""Gradients of which each rank gets its own part, summed: kept whole until the step's last backward, or never whole.

kept       [bucket 0 ........][bucket 1 ........]   filled by all microbatches, sent by the last    ZeRO, stage 1
               | own part                           which then holds the sum
passing    [bucket][bucket][bucket]                 filled, sent and given back, in each            ZeRO, stage 2
           [part 0][part 1]                         to which each adds its sum
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Bucket, Buckets, Run
from hvdtrain.sync.passing import PassingGradients
from hvdtrain.sync.scatter import Room, Scatter
from hvdtrain.sync.wire import Form

AT_ONCE = 4  # buckets that are kept and may be under way; of those that pass it is one, beside one that fills up


class ShardedGradients(Protocol):
    """shards: this rank's part of each run, flat: the sum, after ``finish``. room: of the buffers."""

    shards: Sequence[torch.Tensor]
    room: Room

    def begin(self, passes: int) -> None:
        """Empty the gradients for a step of ``passes`` backwards."""

    def finish(self) -> int:
        """After the last backward: send the rest and wait for it (collective). How often each bucket was sent."""

    @property
    def used(self) -> torch.Tensor:
        """Of each parameter: has it had a gradient? bool, on the host."""

    @property
    def is_complete(self) -> bool:
        """See ``Buckets``."""

    def close(self) -> None: ...


class KeptGradients:
    """See ``ShardedGradients``. slices, computing, uses: see ``Buckets``; form: of the wire, None: fp32."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        runs: Sequence[Run],
        parts: PartNorms,
        mesh: Mesh,
        form: Form | None,
        uses: Sequence[int] | None,
    ):
        self._parts, self._replicas = parts, mesh.replicas
        holds = mesh.own.size > 1 and slices[0].tensor.is_cuda
        self._buckets = Buckets(slices, computing, runs, self._send, lambda bucket: None, uses, holds)
        self._numbers = {bucket: number for number, bucket in enumerate(self._buckets.all)}
        flats = [bucket.flat for bucket in self._buckets.all]
        self.shards: Sequence[torch.Tensor] = [_own_part(run, flat) for run, flat in zip(runs, flats, strict=True)]
        self.room = Room(held=sum(flat.nbytes for flat in flats))
        self._scatter = Scatter(runs, form, self.room, flats.__getitem__, self._land, AT_ONCE, passes=False)

    def begin(self, passes: int) -> None:
        self._buckets.begin(passes)
        self._scatter.begin()

    def finish(self) -> int:
        self._buckets.send_rest()
        self._scatter.finish(rounds=1)
        return 1

    @property
    def used(self) -> torch.Tensor:
        return self._buckets.used

    @property
    def is_complete(self) -> bool:
        return self._buckets.is_complete

    def close(self) -> None:
        self._buckets.close()

    def _send(self, bucket: Bucket) -> None:
        if bucket.run.is_one_piece(self._replicas):
            self._parts.as_it_leaves(bucket.flat, bucket.run.copies)
        self._scatter.offer(self._numbers[bucket])

    def _land(self, number: int, numbers_pc: torch.Tensor) -> None:
        torch.sum(numbers_pc, dim=0, out=self.shards[number])


class PassedGradients:
    """See ``ShardedGradients``, and ``KeptGradients`` for the arguments.

    Replicas may have different numbers of microbatches, and each sends as often as the one with most.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        runs: Sequence[Run],
        parts: PartNorms,
        mesh: Mesh,
        form: Form | None,
        uses: Sequence[int] | None,
    ):
        self._parts, self._mesh = parts, mesh
        self.shards: Sequence[torch.Tensor] = [_own_part(run, run.empty()).clone() for run in runs]
        self.room = Room(held=sum(shard.nbytes for shard in self.shards))
        self._scatter = Scatter(runs, form, self.room, self._take, self._land, at_once=1, passes=True)
        self._passing = PassingGradients(slices, computing, runs, self.room, self._scatter.offer, self._observe, uses)

    def begin(self, passes: int) -> None:
        self._passing.begin(passes)
        self._scatter.begin()
        for shard in self.shards:
            shard.zero_()
        world = self._mesh.world
        self._rounds = torch.zeros(world.size, dtype=torch.int64)
        self._rounds[world.rank] = passes
        self._told = world.all_reduce_sum_async(self._rounds, "hvdtrain.rounds")

    def finish(self) -> int:
        self._told.wait()
        rounds = int(self._rounds.max())
        self._scatter.finish(rounds)
        return rounds

    @property
    def used(self) -> torch.Tensor:
        return self._passing.used

    @property
    def is_complete(self) -> bool:
        return self._passing.is_complete

    def close(self) -> None:
        self._passing.close()

    def _take(self, number: int) -> torch.Tensor:
        return self._passing.take(number)

    def _observe(self, run: Run, flat: torch.Tensor) -> None:
        if run.is_one_piece(self._mesh.replicas):
            self._parts.after_first_pass(flat, run.copies)

    def _land(self, number: int, numbers_pc: torch.Tensor) -> None:
        for numbers_c in numbers_pc:  # a sum of them first would need room of its own
            self.shards[number].add_(numbers_c)


def _own_part(run: Run, flat: torch.Tensor) -> torch.Tensor:
    return flat.view(run.holders.size, -1)[run.holders.rank]
