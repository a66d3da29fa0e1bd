"""PowerSGD (Vogels et al. 2019, 1905.13727): of each gradient matrix its best approximation of a low rank travels.

One step of a power iteration, which goes on from step to step (warm start). M: gradient + residual [n, m] of a rank.

    P = sum of M Q        [n, r]       one all-reduce for all matrices, and what is sent whole
    P = orthonormal basis of P         the same on all ranks
    Q = sum of M^T P      [m, r]       one all-reduce for all matrices
    sum of M  ~  P Q^T                 what the optimizer gets
    residual = M - P (M^T P)^T         of this rank: what of its own was not in that basis

Vectors, and matrices that would hardly become smaller, are sent whole. All of it is linear in the sum of M: however
many ranks share a batch, they train alike, up to roundings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.data.sampler import derive
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice, whole_slice
from hvdtrain.sync.compressed import CompressedSync
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.sums import Totals
from hvdtrain.sync.sync import Drift, Told
from hvdtrain.sync.traffic import of_all_reduce

_BOUND = "at rank 4 the validation loss is within 5 %, at rank 1 within 10 %"


class PowerSgdOptions(Options):
    rank: int = option(
        4,
        "of what travels of each gradient matrix; more is closer to all-reduce, and more bytes; 1: about a quarter of "
        "those of 4, and a validation loss that is up to 10 % higher rather than 5 %",
        ge=1,
    )


def is_factored(shape: Sequence[int], rank: int) -> bool:
    """Do two factors have less than half the numbers of the matrix?"""
    if len(shape) < 2:
        return False
    n, m = shape[0], prod(shape[1:])
    return (n + m) * rank * 2 < n * m


def numbers_sent(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """That ranks sum up in a step, of gradients of these shapes."""
    return sum((shape[0] + prod(shape[1:])) * rank if is_factored(shape, rank) else prod(shape) for shape in shapes)


def needs_of_powersgd(options: PowerSgdOptions, trained: Trained) -> Needs:
    n, sent = trained.count, numbers_sent(trained.shapes, options.rank)
    factored = [shape for shape in trained.shapes if is_factored(shape, options.rank)]
    bases = 2 * options.rank * sum(prod(shape[1:]) for shape in factored)
    return Needs(
        gradients=4 * n,
        moved=n,
        kept=4 * n,
        buffers=4 * (n + sent + bases),
        sent=of_all_reduce(4 * sent, trained.ranks),
    )


@dataclass(frozen=True)
class _Matrix:
    """Views of one gradient matrix [n, m], of what remains of it, and of its factors.

    basis: Q of the last step, orthonormal [m, r]; left [n, r] and right [m, r] lie in what is summed over the ranks.
    """

    number: int
    gradient: torch.Tensor
    rest: torch.Tensor
    basis: torch.Tensor
    following: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


class PowerSgdSync(CompressedSync):
    """See ``CompressedSync``."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: PowerSgdOptions,
        uses: Sequence[int] | None = None,
    ):
        super().__init__(slices, computing, mesh, uses)
        self.drift = Drift(False, f"gradients of rank {options.rank}: {_BOUND}")
        self._rank = options.rank
        shapes = [piece.tensor.shape for piece in self.moves]
        self._factored = {number for number, shape in enumerate(shapes) if is_factored(shape, self._rank)}
        lefts = sum(shapes[number][0] for number in self._factored) * self._rank
        rights = sum(prod(shapes[number][1:]) for number in self._factored) * self._rank
        others = sum(prod(shape) for number, shape in enumerate(shapes) if number not in self._factored)
        self._first = torch.zeros(lefts + others, device=self._device)
        self._second = torch.zeros(rights, device=self._device)
        self._matrices: list[_Matrix] = []
        self._whole: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._make_views()

    def state(self) -> Sequence[Slice]:
        bases = [
            whole_slice(f"sync.powersgd.rank{self._rank}.{self.moves[one.number].name}", one.basis, self._group)
            for one in self._matrices
        ]
        return [*super().state(), *bases]

    def _make_views(self) -> None:
        first, second, rank = self._first, self._second, self._rank
        for bucket, following in zip(self._buckets.all, self._next, strict=True):
            for (number, _), gradient, rest in zip(
                bucket.members, bucket.views, bucket.run.views(following), strict=True
            ):
                if number not in self._factored:
                    place, first = first.split([gradient.numel(), len(first) - gradient.numel()])
                    self._whole.append((gradient.view(-1), place))
                    continue
                gradient, rest = gradient.view(len(gradient), -1), rest.view(len(rest), -1)
                n, m = gradient.shape
                left, first = first.split([n * rank, len(first) - n * rank])
                right, second = second.split([m * rank, len(second) - m * rank])
                basis = _first_basis(self.moves[number].name, m, rank).to(self._device)
                right = right.view(m, rank)
                self._matrices.append(
                    _Matrix(number, gradient, rest, basis, torch.empty_like(basis), left.view(n, rank), right)
                )

    def _combine(self, told: Told, totals: Totals) -> None:
        unit = self._add_residual(told, totals)
        for one in self._matrices:
            torch.mm(one.gradient, one.basis, out=one.left)
        for gradient, place in self._whole:
            place.copy_(gradient)
        self._group.all_reduce_sum(self._first, "hvdtrain.powersgd.p")
        for one in self._matrices:
            one.left.copy_(torch.linalg.qr(one.left).Q)
            torch.mm(one.gradient.T, one.left, out=one.right)
            torch.addmm(one.gradient, one.left, one.right.T, alpha=-1, out=one.rest)
            one.rest.div_(unit)
        if self._matrices:
            self._group.all_reduce_sum(self._second, "hvdtrain.powersgd.q")
        for one in self._matrices:
            torch.mm(one.left, one.right.T, out=one.gradient)
            is_new = one.number not in self._unused
            one.following.copy_(torch.linalg.qr(one.right).Q if is_new else one.basis)
        for gradient, place in self._whole:
            gradient.copy_(place)
        self._sent_bytes = of_all_reduce(self._first.nbytes + self._second.nbytes, self._group.size)

    def _keeps_of(self, number: int) -> bool:
        return number in self._factored

    def _pairs_kept(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [*super()._pairs_kept(), *((one.basis, one.following) for one in self._matrices)]


def _first_basis(name: str, rows: int, rank: int) -> torch.Tensor:
    """Orthonormal [rows, rank], at random: the same on all ranks, whoever else is there."""
    generator = torch.Generator().manual_seed(derive(*name.encode()))
    return torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
