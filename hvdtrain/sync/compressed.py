"""What the syncs that compress gradients share: one step of each, and what a rank keeps from step to step.

    backward     [gradients of this rank, in flat buckets]         nothing travels yet
    finish       [sums of loss, targets, flags]                    the global weight, which sizes the residual
                 [gradient + residual -> few bytes -> the ranks' mean]        ``_combine``
    step         [divide, clip, guard, optimizer]
                 [what is left becomes the residual]               only where the step was not left out

Nothing is sent while backward runs: what is sent depends on the residual, a part of the mean gradient, whose size
depends on how many targets the whole batch has; and there is little left to hide.

A rank keeps one number for each parameter: the residual of what it could not send (error feedback: Seide et al. 2014,
Karimireddy et al. 2019, 1901.09847), or a momentum. It is in units of the mean gradient, without a loss scale, and of
such a size that its MEAN over the ranks counts. So one mean says all of it for any number of ranks, and that is saved.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.optim.lars import Norms, whole_norms
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.optim.update import Agreed, Gradient, Summed, Update
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Bucket, Buckets, make_runs
from hvdtrain.sync.sums import Sums, Totals
from hvdtrain.sync.sync import Drift, Sync, Told
from hvdtrain.sync.traffic import mib

_BUCKET_BYTES = 16 << 20


class CompressedSync(Sync):
    """See ``Sync``, and ``AllReduceSync`` for its arguments: of replicas that are whole, each on its rank.

    The noise scale is not measured: what was compressed has no norm that says anything of noise.

    drift, keeps: set by a subclass; the latter names what a rank keeps of each parameter.
    """

    drift: Drift
    keeps = "residual"

    def __init__(
        self, slices: Sequence[Slice], computing: Sequence[torch.Tensor], mesh: Mesh, uses: Sequence[int] | None
    ):
        assert mesh.own.size == 1, "replicas are whole"
        trained = [number for number, piece in enumerate(slices) if piece.tensor.requires_grad]
        self.moves: Sequence[Slice] = [slices[number] for number in trained]
        assert all(piece.tensor.dtype == torch.float32 for piece in self.moves)
        self.norms: Norms = whole_norms
        self.notes: list[str] = []
        self._group, self._device = mesh.replica, self.moves[0].tensor.device
        self._sums, self._parts = Sums(mesh, self.moves), PartNorms(2, self._device)
        self._buckets = Buckets(
            self.moves,
            [computing[number] for number in trained],
            make_runs(self.moves, _BUCKET_BYTES),
            self._leaves,
            lambda bucket: None,
            uses and [uses[number] for number in trained],
        )
        self._kept = [torch.zeros_like(bucket.flat) for bucket in self._buckets.all]
        # What it will be if the step is not left out.
        self._next = [torch.zeros_like(bucket.flat) for bucket in self._buckets.all]
        self._unused = set[int]()
        self._sent_bytes = 0.0
        self._summed: Summed | None = None

    def begin(self, passes: int) -> None:
        self._buckets.begin(passes)
        self._parts.begin()

    @torch.no_grad()
    def finish(self, told: Told) -> None:
        self._buckets.send_rest()
        used = self._buckets.used
        totals = self._sums.over_ranks(told, self._parts, used, self._buckets.is_complete)
        self._unused = set() if bool(used.all()) else set((totals.users == 0).nonzero().flatten().tolist())
        self._combine(told, totals)
        self._leave_unused()
        self._buckets.drop_unused(totals.users)
        gradients = [Gradient(bucket.flat) for bucket in self._buckets.all]
        self._summed = Summed(gradients, totals.loss, totals.weight, totals.flags, torch.zeros_like(totals.parts))

    @torch.no_grad()
    def step(self, update: Update, lr: float) -> Agreed:
        assert self._summed is not None, "finish comes first"
        agreed = update.divide(self._summed)
        update.apply(lr)
        refused = update.refused
        for kept, following in self._pairs_kept():
            # What comes of a step that is left out may be no number, and would be one of every later step.
            kept.copy_(following if refused is None else torch.where(refused, kept, following))
        return agreed

    @torch.no_grad()
    def settle(self, update: Update) -> None:
        """Every rank goes on with the ranks' mean of what they kept."""
        for number, kept in enumerate(self._kept):
            self._group.all_reduce_sum(kept, f"hvdtrain.{self.keeps}.{number}").div_(self._group.size)

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        if self._group.size == 1:
            return {}
        return {piece.name: piece.tensor for piece in CompressedSync.state(self)}

    def viewed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hand_on(self) -> None:
        """These are the same tensors."""

    def state(self) -> Sequence[Slice]:
        found = {}
        for bucket, kept in zip(self._buckets.all, self._kept, strict=True):
            for (number, _), view in zip(bucket.members, bucket.run.views(kept), strict=True):
                if self._keeps_of(number):
                    piece = self.moves[number]
                    found[number] = replace(piece, name=f"sync.{self.keeps}.{piece.name}", tensor=view)
        return [found[number] for number in sorted(found)]

    def report(self) -> Mapping[str, float]:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._kept)))
        return {"sent_mib": mib(self._sent_bytes), f"{self.keeps}_norm": float(norm)}

    def close(self) -> None:
        self._buckets.close()

    @abstractmethod
    def _combine(self, told: Told, totals: Totals) -> None:
        """Replace the buckets' numbers by sums that stand for those of all ranks, and fill ``_next`` (collective)."""

    def _leaves(self, bucket: Bucket) -> None:
        """The gradients of a bucket are all there (local)."""

    def _keeps_of(self, number: int) -> bool:
        """Is anything kept of this parameter?"""
        return True

    def _pairs_kept(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is kept from step to step, and what follows it where the step is not left out."""
        return list(zip(self._kept, self._next, strict=True))

    def _add_residual(self, told: Told, totals: Totals) -> torch.Tensor:
        """Add it to the gradients; where nobody had a gradient, nothing is sent of it. Returns what one unit of it is
        in these sums.
        """
        divisor = totals.weight if told.loss_scale is None else totals.weight * told.loss_scale
        unit = (divisor / self._group.size).float()
        for bucket, kept in zip(self._buckets.all, self._kept, strict=True):
            bucket.flat.addcmul_(kept, unit)
        for sums, _, _ in self._of_unused():
            sums.zero_()
        return unit

    def _leave_unused(self) -> None:
        """Where nobody had a gradient, nothing is moved and what is kept stays."""
        for sums, kept, following in self._of_unused():
            sums.zero_()
            following.copy_(kept)

    def _of_unused(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for bucket, kept, following in zip(self._buckets.all, self._kept, self._next, strict=True):
            views = zip(bucket.members, bucket.views, bucket.run.views(kept), bucket.run.views(following), strict=True)
            yield from ((sums, old, new) for (number, _), sums, old, new in views if number in self._unused)
