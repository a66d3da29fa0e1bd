"""The largest numbers of a gradient travel, with their places; the others wait in the residual (Aji and Heafield 2017,
1704.05021; Stich et al. 2018, 1809.07599).

    gradient + residual    [ .1  -3.   0.  .2 | 2.  .3 ]       two buckets of one rank, a share of 1/4 of each
    sent to all            values -3, 2    places 1, 0         all-gather of 8 bytes a number
    residual               [ .1   0.   0.  .2 | 0.  .3 ]

Each rank chooses by itself, and all add up what all have sent. So bytes grow with the number of ranks: 1 % of the
numbers is 1/25 of a ring all-reduce's bytes at 4 ranks, and 1/6 at 16.
"""

import math
from collections.abc import Sequence

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.compressed import CompressedSync
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.sums import Totals
from hvdtrain.sync.sync import Drift, Told
from hvdtrain.sync.traffic import of_all_gather


class TopkOptions(Options):
    share: float = option(0.01, "of the numbers of each gradient bucket, the largest of which are sent", gt=0, le=1)


def needs_of_topk(options: TopkOptions, trained: Trained) -> Needs:
    n, row = trained.count, 8 * math.ceil(trained.count * options.share)
    bucket = trained.bucket()
    return Needs(
        gradients=4 * n,
        moved=n,
        kept=4 * n,
        buffers=4 * n + (trained.ranks + 1) * row,
        passing=4 * bucket + 12 * math.ceil(bucket * options.share),
        sent=of_all_gather(row, trained.ranks),
    )


class TopkSync(CompressedSync):
    """See ``CompressedSync``."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: TopkOptions,
        uses: Sequence[int] | None = None,
    ):
        super().__init__(slices, computing, mesh, uses)
        self.drift = Drift(
            False, f"{options.share:.3g} of each gradient a step: at 0.01 with AdamW, validation loss 27 % higher"
        )
        self._counts = [math.ceil(bucket.run.length * options.share) for bucket in self._buckets.all]
        total = sum(self._counts)
        # Values, as bits, then places; of each bucket in turn.
        self._row = torch.zeros(1, 2 * total, dtype=torch.int32, device=self._device)
        self._rows = torch.zeros(self._group.size, 2 * total, dtype=torch.int32, device=self._device)

    def _combine(self, told: Told, totals: Totals) -> None:
        unit = self._add_residual(told, totals)
        values, places = self._open(self._row)
        for number, bucket in enumerate(self._buckets.all):
            chosen = torch.topk(bucket.flat.abs(), self._counts[number], sorted=False).indices
            values[number][0] = bucket.flat[chosen]
            places[number][0] = chosen
            self._next[number].copy_(bucket.flat)
            self._next[number][chosen] = 0.0
            self._next[number].div_(unit)
        self._group.all_gather_async(self._row, self._rows, "hvdtrain.topk").wait()
        values, places = self._open(self._rows)
        for number, bucket in enumerate(self._buckets.all):
            bucket.flat.zero_()
            for rank in range(self._group.size):  # one after another: in the same order everywhere
                bucket.flat.index_add_(0, places[number][rank], values[number][rank])
        self._sent_bytes = of_all_gather(self._row.nbytes, self._group.size)

    def _open(self, rows: torch.Tensor) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Views: of each bucket the values [rows, count], fp32, and their places."""
        values, places = rows.split(rows.shape[1] // 2, dim=1)
        return values.view(torch.float32).split(self._counts, dim=1), places.split(self._counts, dim=1)
