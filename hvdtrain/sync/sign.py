"""Signum with majority vote (Bernstein et al. 2018, 1802.04434 and 1810.05291): one bit of a gradient travels.

    momentum   v = momentum * v + (1 - momentum) * mean gradient of this rank's own targets        each rank by itself
    vote       v > 0?                                        one bit a number, 32 in a word
    count      rank i counts part i of all ranks' votes      all-to-all
    hand on    which way most voted                          all-gather, one bit a number
    step       w = w - lr (+-1 + weight_decay * w)           optim.name=sgd without a momentum of its own

Both ways together are 1/32 of the bytes of a ring all-reduce. Where v is 0, and where as many are for as against, it
goes up and down by turns: from step to step, and from place to place.

What says how large the gradient is: the root of the mean of the squared norms of the ranks' own mean gradients. It is
not clipped, for signs have no size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice, whole_slice
from hvdtrain.sync.buckets import Bucket
from hvdtrain.sync.compressed import CompressedSync
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.sums import Totals
from hvdtrain.sync.sync import Drift, Told
from hvdtrain.sync.traffic import of_all_gather, of_all_to_all

_BITS = 32  # of a word


class SignOptions(Options):
    momentum: float = option(0.9, "decay of the momentum that each rank keeps of its own gradients", ge=0, lt=1)


def needs_of_sign(options: SignOptions, trained: Trained) -> Needs:
    n, words = trained.count, 4 * _words_of(trained.count, trained.ranks)
    return Needs(
        gradients=4 * n,
        moved=n,
        kept=4 * n,
        buffers=4 * n + 2 * trained.ranks * words,
        passing=n,
        sent=of_all_to_all(trained.ranks * words, trained.ranks) + of_all_gather(words, trained.ranks),
    )


def _words_of(count: int, ranks: int) -> int:
    """Of one of as many parts as there are ranks."""
    return -(-count // (_BITS * ranks))


class SignSync(CompressedSync):
    """See ``CompressedSync``: what is kept is the momentum."""

    keeps = "momentum"

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: SignOptions,
        uses: Sequence[int] | None = None,
    ):
        super().__init__(slices, computing, mesh, uses)
        self.drift = Drift(False, "signs: at a third of AdamW's learning rate the validation loss is within 3 %")
        self._momentum = options.momentum
        self._lengths = [bucket.run.length for bucket in self._buckets.all]
        ranks, words = self._group.size, _words_of(sum(self._lengths), self._group.size)
        # Side by side, for all buckets at once are voted on; behind them up to the last word's end, zeros.
        self._momenta = torch.zeros(ranks * words * _BITS, device=self._device)
        self._next = list(self._momenta[: sum(self._lengths)].split(self._lengths))
        self._votes = torch.zeros(ranks, words, dtype=torch.int32, device=self._device)
        self._arrived = torch.zeros_like(self._votes)
        self._turn = torch.zeros((), dtype=torch.int64)
        self._norm = torch.zeros((), dtype=torch.float64, device=self._device)

    def step(self, update: Update, lr: float) -> Agreed:
        return replace(super().step(update, lr), grad_norm=self._norm)

    def state(self) -> Sequence[Slice]:
        return [*super().state(), whole_slice("sync.turn", self._turn, self._group)]

    def _leaves(self, bucket: Bucket) -> None:
        self._parts.as_it_leaves(bucket.flat)

    def _combine(self, told: Told, totals: Totals) -> None:
        scale = 1.0 if told.loss_scale is None else told.loss_scale
        own = (1 - self._momentum) / (max(sum(told.weights), 1) * scale)
        for bucket, kept, following in zip(self._buckets.all, self._kept, self._next, strict=True):
            torch.mul(bucket.flat, own, out=following).add_(kept, alpha=self._momentum)
        self._vote()
        square, _, told_by = totals.parts.unbind()
        self._norm = (square / told_by).sqrt() / scale
        # Nothing of a sign says that a gradient overflowed: the norm does.
        size = torch.where(square.isfinite(), totals.weight * scale, torch.nan).float()
        signs = _opened(self._arrived).view(-1)
        for bucket, of_bucket in zip(self._buckets.all, signs[: sum(self._lengths)].split(self._lengths), strict=True):
            bucket.flat.copy_(of_bucket).mul_(2).sub_(1).mul_(size)

    def _vote(self) -> None:
        """Fill ``_arrived`` with what most ranks are for (collective)."""
        ranks, words = self._votes.shape
        turn = int(self._turn) % 2
        self._turn += 1
        momenta_pbw = self._momenta.view(ranks, _BITS, words)
        self._votes.zero_()
        most = torch.zeros(1, words, dtype=torch.int32, device=self._device)
        for bit in range(_BITS):
            # What is 0 counts as a number above 0 in half of the places; the other half, on every second rank.
            is_up = (bit + turn + self._group.rank) % 2 == 1
            of_bit = momenta_pbw[:, bit]
            self._votes |= (of_bit >= 0 if is_up else of_bit > 0).to(torch.int32) << bit
        self._group.all_to_all_async(self._votes, self._arrived, "hvdtrain.sign.votes").wait()
        for bit in range(_BITS):
            least = (ranks + 1) // 2 if (bit + turn) % 2 == 1 else ranks // 2 + 1  # votes that carry a number
            count = ((self._arrived >> bit) & 1).sum(dim=0, keepdim=True)
            most |= (count >= least).to(torch.int32) << bit
        self._group.all_gather_async(most, self._arrived, "hvdtrain.sign.most").wait()
        self._sent_bytes = of_all_to_all(self._votes.nbytes, ranks) + of_all_gather(most.nbytes, ranks)


# p ranks, b bits of a word, w words of a rank's part. Bit b of word w is number b * (words of a part) + w of the part.


def _opened(words_pw: torch.Tensor) -> torch.Tensor:
    """[p, w] int32 -> [p, b, w] uint8 of 0 and 1."""
    ranks, words = words_pw.shape
    bits = torch.empty(ranks, _BITS, words, dtype=torch.uint8, device=words_pw.device)
    for bit in range(_BITS):
        bits[:, bit] = (words_pw >> bit) & 1
    return bits
