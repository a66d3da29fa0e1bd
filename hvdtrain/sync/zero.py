"""ZeRO (Rajbhandari et al. 2020, 1910.02054): replicas share the optimizer's state, and of stage 2 on the gradient too.

    backward     [gradients of all]              each rank: of its own batches
    all-to-all   [1/p: summed]                   each rank: its part of every bucket
    optimizer    [1/p: weights, state]
    all-gather   [weights of all]

    bytes of a rank for each of n parameters, fp32, AdamW, p replicas
                  weights   gradients         state
    all-reduce    4         4                 8
    stage 1       4         4                 8/p
    stage 2       4         4/p + 3 buckets   8/p

An all-to-all and an all-gather send what an all-reduce sends. Stage 2 sums the gradients of every microbatch: with k of
them the all-to-all is made k times, (k + 1) / 2 of an all-reduce's bytes.

Weights lie in flat buckets, divided evenly among the ranks that hold the same; where a boundary falls into a tensor,
each of two ranks has a few rectangles of it. Each of these is a parameter of the optimizer, and a slice of what is
saved. Where the model computes with a copy in two bytes, that is what is gathered: of the fp32 weights each rank then
has its own part, and of the others' their rounding, until ``settle``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.errors import ConfigError
from hvdtrain.optim.lars import Norms
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.optim.update import Agreed, Gradient, Summed, Update
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Run, make_runs
from hvdtrain.sync.needs import Needs, Trained, bucket_of
from hvdtrain.sync.norms import SpreadNorms
from hvdtrain.sync.sharded import AT_ONCE, KeptGradients, PassedGradients, ShardedGradients
from hvdtrain.sync.shards import Shares, in_one, shard_of
from hvdtrain.sync.sums import Sums
from hvdtrain.sync.sync import EXACT, Drift, Told
from hvdtrain.sync.traffic import mib
from hvdtrain.sync.wire import FORMS, WireName

_MIB = 1 << 20


class ZeroOptions(Options):
    stage: Literal[1, 2] = option(
        1, "what replicas share; 1: the optimizer's state; 2: gradients too, which are summed at every microbatch"
    )
    bucket_mib: float = option(0.0, "gradients sent together (MiB); 0: 1/32 of them, 2 to 16 MiB", ge=0)
    wire: WireName = option(
        "fp32", "numbers in which gradients travel between ranks; the two-byte ones are for slow links"
    )


@dataclass(frozen=True)
class ZeroBytes:
    """Of one rank. gradients: with buffers, at the peak. sent: in a step."""

    state: int
    gradients: int
    sent: int


def bytes_of(
    parameters: int, largest: int, state_bytes: int, replicas: int, options: ZeroOptions, microbatches: int = 1,
    narrow_weights: bool = False,
) -> ZeroBytes:  # fmt: skip
    """What ZeRO needs for ``parameters`` that a rank trains, from the settings alone.

    largest: numbers in the largest tensor. state_bytes: of the optimizer, for all of them. narrow_weights: a
    copy in two bytes computes.
    """
    form = FORMS[options.wire]
    of_number = 4 if form is None else form.dtype.itemsize
    bucket = 4 * bucket_of(parameters, largest, options.bucket_mib)
    mine = -(-parameters // replicas)
    if options.stage == 1:
        arriving = min(AT_ONCE, -(-4 * parameters // bucket)) * bucket
        opened = 0 if form is None else bucket
        gradients, rounds = 4 * parameters + arriving + opened, 1
    else:  # one fills up, one is sent, one arrives; or half of one, half of one, and one is opened
        gradients, rounds = 4 * mine + 3 * bucket, microbatches
    sent = (parameters - mine) * (rounds * of_number + (2 if narrow_weights else 4))
    return ZeroBytes(-(-state_bytes // replicas), gradients, sent)


def needs_of_zero(options: ZeroOptions, trained: Trained) -> Needs:
    sizes = trained.count, trained.largest, trained.state_bytes, trained.ranks
    found = bytes_of(*sizes, options, trained.microbatches, trained.narrow_weights)
    return Needs(found.gradients, -(-trained.count // trained.ranks), sent=found.sent)


class ZeroSync:
    """See ``Sync``, and ``AllReduceSync`` for its arguments: of several replicas."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: ZeroOptions,
        uses: Sequence[int] | None = None,
    ):
        trained = [number for number, piece in enumerate(slices) if piece.tensor.requires_grad]
        whole = [slices[number] for number in trained]
        copies = [computing[number] for number in trained]
        of_pass = uses and [uses[number] for number in trained]
        self._mesh, self._options, self._device = mesh, options, whole[0].tensor.device
        mesh.world.together(self._check)
        self.notes: list[str] = []
        self.drift = EXACT if options.wire == "fp32" else Drift(False, f"one rounding to {options.wire} a step")
        if options.stage == 2 and options.wire != "fp32":
            self.drift = Drift(False, f"one rounding to {options.wire} a microbatch")
        self._runs = make_runs(whole, int(options.bucket_mib * _MIB), in_parts=True)
        self._narrow = copies[0].dtype if copies[0].dtype != whole[0].tensor.dtype else None
        self._is_whole = True
        self._weights = [in_one(run) for run in self._runs]
        self._sums = Sums(mesh, whole)
        self._parts = PartNorms(mesh.replicas, self._device, mesh.speaks, of_first=options.stage == 2)
        kind = KeptGradients if options.stage == 1 else PassedGradients
        self._gradients: ShardedGradients = kind(
            whole, copies, self._runs, self._parts, mesh, FORMS[options.wire], of_pass
        )
        self._shares = self._make_shares(whole)
        self.moves: Sequence[Slice] = self._shares.moves
        self.norms: Norms = SpreadNorms(self.moves, mesh.world, self._over_ranks, self._device)
        self._summed: Summed | None = None
        self._sent = 0

    def _check(self) -> None:
        """Errors: ConfigError. NCCL wants the collectives of a cut and those of gradients one after the other."""
        if self._options.stage == 2 and self._device.type == "cuda" and self._mesh.own.size > 1:
            raise ConfigError(
                "sync.zero.stage=2 sends gradients during backward, and beside a model that is cut a GPU cannot; "
                "set sync.zero.stage=1"
            )

    def begin(self, passes: int) -> None:
        self._parts.begin()
        self._gradients.begin(passes)

    def finish(self, told: Told) -> None:
        rounds = self._gradients.finish()
        used = self._gradients.used
        totals = self._sums.over_ranks(told, self._parts, used, self._gradients.is_complete)
        self._shares.give_gradients(used, totals.users)
        gradients = [
            Gradient(shard, run.copies * self._mesh.replicas // run.holders.size, run.is_one_piece(self._mesh.replicas))
            for run, shard in zip(self._runs, self._gradients.shards, strict=True)
        ]
        self._summed = Summed(gradients, totals.loss, totals.weight, totals.flags, totals.parts, self._over_ranks)
        of_number = rounds * self._wire_bytes + (4 if self._narrow is None else self._narrow.itemsize)
        self._sent = sum(of_number * run.length * (run.holders.size - 1) // run.holders.size for run in self._runs)

    def step(self, update: Update, lr: float) -> Agreed:
        assert self._summed is not None, "finish comes first"
        agreed = update.divide(self._summed)
        update.apply(lr)
        self._gather(self._narrow)
        return agreed

    def settle(self, update: Update) -> None:
        self._make_whole()

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        return {}

    def viewed(self) -> AbstractContextManager[None]:
        self._make_whole()
        return nullcontext()

    def hand_on(self) -> None:
        self._gather(None)

    def state(self) -> Sequence[Slice]:
        return ()

    def report(self) -> Mapping[str, float]:
        """MiB of one rank: what it sends in a step, the gradients that it holds at their peak, and the weights whose
        state it keeps.
        """
        moved = sum(piece.tensor.nbytes for piece in self.moves)
        held = {"zero_gradients_mib": mib(self._gradients.room.peak_bytes), "zero_moved_mib": mib(moved)}
        return {"sent_mib": mib(self._sent), **held}

    def close(self) -> None:
        self._gradients.close()

    def _make_shares(self, whole: Sequence[Slice]) -> Shares:
        """The parameters of this rank's optimizer, each with the place of its gradient."""
        shares = Shares()
        for run, weights, shard in zip(self._runs, self._weights, self._gradients.shards, strict=True):
            shares.add(shard_of(run, whole, weights, self._mesh.replicas), shard)
        have = self._mesh.world.all_gather_object(len(shares.moves))
        if not all(have):
            raise ConfigError(
                f"sync.name=zero: so few parameters are trained that rank {have.index(0)} would have none of them; "
                "take sync.name=allreduce"
            )
        return shares

    def _make_whole(self) -> None:
        if not self._is_whole:
            self._gather(None)

    @torch.no_grad()
    def _gather(self, narrow: torch.dtype | None) -> None:
        """Each rank's part of the weights to all; of the others' what is left of them in ``narrow`` (None: all)."""
        for first in range(0, len(self._runs), AT_ONCE):
            pairs = zip(self._runs[first : first + AT_ONCE], self._weights[first : first + AT_ONCE], strict=True)
            for arrived in [_start_gather(run, weights, narrow) for run, weights in pairs]:
                arrived()
        self._is_whole = narrow is None

    def _over_ranks(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._mesh.world.all_reduce_sum(numbers, "hvdtrain.zero")

    @property
    def _wire_bytes(self) -> int:
        form = FORMS[self._options.wire]
        return 4 if form is None else form.dtype.itemsize


def _start_gather(run: Run, weights: torch.Tensor, narrow: torch.dtype | None) -> Callable[[], None]:
    """Returns what waits until all parts of ``weights`` are here; this rank's own stays as it is."""
    rank, rows = run.holders.rank, weights.view(run.holders.size, -1)
    row = rows[rank : rank + 1].to(narrow or weights.dtype, copy=True).view(torch.int32)
    arrived = rows.view(torch.int32) if narrow is None else row.new_empty(len(rows), row.shape[1])
    pending = run.holders.all_gather_async(row, arrived, f"{run.name}.weights")

    def wait() -> None:
        pending.wait()
        if narrow is not None:
            for others in (slice(rank), slice(rank + 1, None)):
                rows[others].copy_(arrived[others].view(narrow))

    return wait
