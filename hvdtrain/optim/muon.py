"""Muon: a matrix moves by what is left of its momentum when all its singular values are made about 1 (Jordan et al.
2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, "Muon is scalable for LLM training", 2502.16982).

    m <- momentum m + (1 - momentum) g          u = g + momentum (m - g) (nesterov), or m
    w <- w - lr (scale NS(u) + decay w)         NS(u): about the nearest matrix with orthonormal rows or columns

    scale = 0.2 sqrt(max(rows, columns))        rms: an update is as large as AdamW's, whose rates and decay fit
            sqrt(max(1, rows / columns))        original

NS is five steps of a polynomial that five products make of a matrix's singular values (Newton and Schulz; its
coefficients lift small ones fast, and leave them between 0.7 and 1.2). It needs whole matrices: where a rank has pieces
of them, or the ranks share the work, ``Matrices`` is a collective (sync/matrices.py).

All but the matrices of blocks (embeddings, heads, norms, biases) moves as AdamW moves it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hvdtrain.optim.adam import AdamSteps, Moments
from hvdtrain.optim.runs import Room, in_runs
from hvdtrain.options import Options, option

STEPS = 5
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024
_EPS = 1e-7
# Numbers of matrices of one shape that are multiplied at once. On a GPU: more, for few kernels that fill it.
_CPU_TOGETHER = 1 << 20
_GPU_TOGETHER = 1 << 24

# Writes what is to be made orthogonal, of these weights, into tensors of their shapes.
Write = Callable[[list[Tensor], list[Tensor]], None]


class MuonOptions(Options):
    momentum: float = option(0.95, "share of the last steps' mean that stays", ge=0, lt=1)
    nesterov: bool = option(True, "look ahead: the gradient counts once more")
    scale: Literal["rms", "original"] = option(
        "rms", "size of an update; rms: as large as AdamW's, whose lr fits then (Liu et al. 2025); original: Jordan's"
    )
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "of Newton-Schulz steps; auto: bf16 on GPUs and on CPUs that multiply it faster, else fp32"
    )
    share: Literal["auto", "always", "never"] = option(
        "auto", "ranks that hold the same matrices share them, each making some for all; auto: where that is faster"
    )


class NewtonSchulz:
    """Makes matrices orthogonal (local). dtype: of the products; scale: see ``MuonOptions``."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: str = "rms"):
        self.dtype, self._scale = dtype, scale

    def __call__(self, matrices: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Write what becomes of each matrix, scaled, into the tensor at its place, which may be itself."""
        alike: dict[tuple[torch.Size, torch.device], list[int]] = defaultdict(list)
        for number, matrix in enumerate(matrices):
            alike[matrix.shape, matrix.device].append(number)
        for (shape, device), numbers in alike.items():
            together = _CPU_TOGETHER if device.type == "cpu" else _GPU_TOGETHER
            count = max(1, together // max(1, shape.numel()))
            for first in range(0, len(numbers), count):
                these = numbers[first : first + count]
                made = orthogonal(torch.stack([matrices[n] for n in these]), self.scale_of(shape), self.dtype)
                torch._foreach_copy_([into[n] for n in these], list(made.unbind()))

    def scale_of(self, shape: Sequence[int]) -> float:
        rows, columns = shape
        return 0.2 * math.sqrt(max(rows, columns)) if self._scale == "rms" else math.sqrt(max(1.0, rows / columns))


def orthogonal(matrices_KMN: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """K matrices of fp32 -> ``scale`` times what Newton-Schulz steps in ``dtype`` make of each."""
    is_tall = matrices_KMN.shape[1] > matrices_KMN.shape[2]
    x_KMN = matrices_KMN.mT if is_tall else matrices_KMN
    norms_K = torch.linalg.vector_norm(torch.linalg.vector_norm(matrices_KMN, dim=2), dim=1)
    x_KMN = (x_KMN / norms_K.clamp(min=_EPS)[:, None, None]).to(dtype)
    for step in range(1, STEPS + 1):
        a, b, c = (number * scale if step == STEPS else number for number in _COEFFICIENTS)
        gram_KMM = x_KMN @ x_KMN.mT
        of_gram_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        x_KMN = torch.baddbmm(x_KMN, of_gram_KMM, x_KMN, beta=a)
    return x_KMN.mT if is_tall else x_KMN


def working_bytes(numbers: int, largest: int, on_cpu: bool, narrow: bool) -> int:
    """That one call of ``NewtonSchulz`` takes, and the updates that it is called with. numbers: of all matrices;
    largest: of a weight among them; narrow: are products in 16 bits?
    """
    together = min(numbers, max(largest, _CPU_TOGETHER if on_cpu else _GPU_TOGETHER))
    return together * (4 + 4 + 2 * (2 if narrow else 4))


class Matrices(Protocol):
    """Which parameters are matrices of blocks, or pieces of such, and how they become orthogonal."""

    def has(self, weight: Tensor) -> bool:
        """Is it one? (local)"""

    def updates(self, weights: list[Tensor], write: Write) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """``weights``, some at a time, with what moves them at rate 1: fp32, until the next are asked for.

        Where ranks share the work it is a collective, which all ranks go through once a step, to its end; weights that
        have no gradient have none on any rank.
        """


class WholeMatrices:
    """See ``Matrices``: each is whole on this rank, which makes them all (local).

    parts: of each, the rows of the matrices that lie in it one behind another.
    """

    def __init__(self, parts: Mapping[Tensor, Sequence[int]], newton_schulz: NewtonSchulz):
        self._parts = {id(weight): list(rows) for weight, rows in parts.items()}
        self._newton_schulz, self._room = newton_schulz, Room()

    def has(self, weight: Tensor) -> bool:
        return id(weight) in self._parts

    def updates(self, weights: list[Tensor], write: Write) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        for run in in_runs(weights, _CPU_TOGETHER):
            updates = self._room.like(run)
            write(run, updates)
            matrices = [
                part
                for weight, update in zip(run, updates, strict=True)
                for part in update.split(self._parts[id(weight)])
            ]
            self._newton_schulz(matrices, matrices)
            yield run, updates


class Muon(AdamSteps):
    """Muon and AdamW in one. State of a matrix of a block: ``momentum_buffer``; of others: see ``AdamSteps``.

    A group has ``is_orthogonal``: are its tensors in ``matrices``?
    """

    def __init__(
        self, groups: Iterable[Any], lr: float, moments: Moments, options: MuonOptions, matrices: Matrices
    ):  # fmt: skip
        defaults = {
            "lr": lr,
            "betas": (moments.beta1, moments.beta2),
            "eps": moments.eps,
            "bias_correction": moments.bias_correction,
            "weight_decay": 0.0,
            "is_orthogonal": True,
        }
        super().__init__(groups, defaults)
        self._options, self._matrices = options, matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient (collective where ``matrices`` is)."""
        runs = [run for group in self.param_groups for run in self._runs(group)]
        orthogonal = [run for run in runs if run[1]["is_orthogonal"]]
        for weights, _ in orthogonal:
            self._average(weights)
        groups = {id(weight): group for weights, group in orthogonal for weight in weights}
        for weights, updates in self._matrices.updates([w for run, _ in orthogonal for w in run], self._write):
            pairs = zip(weights, updates, strict=True)
            for _, of_group in groupby(pairs, key=lambda pair: id(groups[id(pair[0])])):
                moved, by = zip(*of_group, strict=True)
                self._move_matrices(list(moved), list(by), groups[id(moved[0])])
        for weights, group in runs:
            if not group["is_orthogonal"]:
                self._adamw(weights, weights, group, group["lr"], group["weight_decay"])

    def _average(self, weights: list[Tensor]) -> None:
        """The momenta of these, where the gradients have not overflowed."""
        momenta, gradients = [self._momentum(weight) for weight in weights], [weight.grad for weight in weights]
        share, overflow = 1 - self._options.momentum, self._overflow(weights[0].device)
        if overflow is None:
            torch._foreach_lerp_(momenta, gradients, share)
            return
        for momentum, gradient in zip(momenta, gradients, strict=True):
            momentum.copy_(torch.where(overflow > 0, momentum, momentum.lerp(gradient, share)))

    def _write(self, weights: list[Tensor], into: list[Tensor]) -> None:
        """See ``Write``; 0 where there is no gradient."""
        for weight, update in zip(weights, into, strict=True):
            if weight.grad is None:
                update.zero_()
            elif self._options.nesterov:
                torch.lerp(weight.grad, self._momentum(weight), self._options.momentum, out=update)
            else:
                update.copy_(self._momentum(weight))

    def _move_matrices(self, weights: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        self._sgd(weights, updates, group)
