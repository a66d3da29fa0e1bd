"""What becomes of the sums that replicas have agreed on: divide, clip, guard, step. The same for every sync.

sums over microbatches and replicas:  gradient G, loss L, targets W (scaled runs: G and L times the loss scale)

divide    g = G / W          once, so that padding, uneven ranks and accumulation cannot bias it
clip      g = g * min(1, clip_norm / |g|)          |g| over whole tensors, of the divided gradient
guard     leave the step out, or go slower         see guard.py, loss_scale.py
step      w = optimizer(w, g, lr)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvdtrain.optim.guard import Guard
from hvdtrain.optim.loss_scale import LossScale

# Sums fp64 numbers over ranks, in place: the same bits on all (collective among them).
SumOverRanks = Callable[[torch.Tensor], torch.Tensor]

_ROW = 4096  # numbers


@dataclass(frozen=True)
class Gradient:
    """A flat piece of the summed gradient: fp32, what the optimizer's ``grad`` are views of.

    copies: how many of the ranks that share the gradient hold this very piece.
    in_parts: are there squares of it in ``Summed.parts``?
    """

    flat: torch.Tensor
    copies: int = 1
    in_parts: bool = True


@dataclass(frozen=True)
class Summed:
    """Sums over all replicas: gradients, and scalars in fp64. parts: see ``noise_scale.PartNorms``.

    over_ranks: over those that have the other pieces of the gradient; None: all of it is here.
    """

    gradients: Sequence[Gradient]
    loss: torch.Tensor
    weight: torch.Tensor
    flags: torch.Tensor
    parts: torch.Tensor
    over_ranks: SumOverRanks | None = None


@dataclass(frozen=True)
class Agreed:
    """What is known after a step in which the ranks met: scalar fp64 tensors, read when someone needs the number."""

    loss: torch.Tensor  # mean over the global batch's targets
    weight: torch.Tensor  # number of targets in the global batch
    grad_norm: torch.Tensor  # of the global mean gradient, before clipping
    # Of the gradients of parts of the batch (each a mean): means over the parts of |gradient|^2 and of 1 / targets. nan
    # where there is one part. whole_square: |gradient|^2 of the whole batch, of the same tensors. See noise_scale.py.
    part_square: torch.Tensor
    part_inverse: torch.Tensor
    whole_square: torch.Tensor
    flags: torch.Tensor  # the sum of what the ranks had to tell one another, see watch/stopping.py
    loss_scale: torch.Tensor | None = None  # what the loss was multiplied by; an overflow is then no divergence
    is_met: bool = True  # are all ranks here? False: this one has been told, and the others train on


class Update:
    """Moves the weights by a summed gradient: ``divide(summed)``, then ``apply(lr)``. All replicas do the same.

    clip_norm: largest norm of the gradient; 0: any.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        guard: Guard,
        loss_scale: LossScale | None = None,
    ):
        self.optimizer, self.clip_norm, self.guard, self.loss_scale = optimizer, clip_norm, guard, loss_scale
        self._overflowed: torch.Tensor | None = None

    def divide(self, summed: Summed) -> Agreed:
        """Leave the global mean gradient, clipped, where the sums were; and judge it."""
        scale = None if self.loss_scale is None else self.loss_scale.scale.clone()
        divisor = summed.weight if scale is None else summed.weight * scale
        norm, norm_in_parts = _norms(summed)
        grad_norm, norm_in_parts = norm / divisor, norm_in_parts / divisor
        factor = 1.0 / divisor
        if self.clip_norm > 0:
            factor = factor * torch.clamp(self.clip_norm / (grad_norm + 1e-6), max=1.0)
        flats = [gradient.flat for gradient in summed.gradients]
        torch._foreach_mul_(flats, factor.to(flats[0].dtype))
        loss = summed.loss / summed.weight
        if self.loss_scale is not None:
            self._overflowed = ~grad_norm.isfinite()
            self.loss_scale.update(self._overflowed)
        self.guard.judge(loss, grad_norm, self._overflowed)
        square, inverse, parts = summed.parts.unbind()
        square = square / parts if scale is None else square / parts / scale.double() ** 2
        return Agreed(loss, summed.weight, grad_norm, square, inverse / parts, norm_in_parts**2, summed.flags, scale)

    @property
    def refused(self) -> torch.Tensor | None:
        """Is the gradient that was divided last left out? Scalar bool; None where none ever is."""
        flags = [flag for flag in (self._overflowed, self.guard.skip) if flag is not None]
        return torch.stack(flags).any() if flags else None

    def apply(self, lr: float) -> None:
        """Step, where the gradient has not overflowed and the guard lets it pass (local: alike on all).

        A group of parameters may have ``lr_share``: what it takes of ``lr``; without, all of it.
        """
        if (refused := self.refused) is not None:  # torch's fused optimizers then leave everything as it is
            self.optimizer.found_inf = refused.float()  # type: ignore[attr-defined]
        rate = lr if self.guard.skip is None else (lr * self.guard.factor).float()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_share", 1.0)
        self.optimizer.step()


def _norms(summed: Summed) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the whole summed gradient, and of those of its tensors that have squares in ``parts``; fp64."""
    gradients = summed.gradients
    norms = each_norm([gradient.flat for gradient in gradients])
    if summed.over_ranks is None:
        norm = torch.linalg.vector_norm(norms)
        return norm, norm
    squares = norms.square() / norms.new_tensor([gradient.copies for gradient in gradients])
    in_parts = norms.new_tensor([gradient.in_parts for gradient in gradients])
    norm, norm_in_parts = summed.over_ranks(torch.stack([squares.sum(), squares @ in_parts])).sqrt()
    return norm, norm_in_parts


def each_norm(flats: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of flat tensors: fp64 [flats]."""
    if flats[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(flats))).double()
    return torch.stack([_norm_in_rows(flat) for flat in flats])


def _norm_in_rows(flat: torch.Tensor) -> torch.Tensor:
    """On a CPU torch adds up the squares of a long vector one after another in fp32: of 4 million numbers the norm is
    8e-5 off, so that ranks that each have a part would clip otherwise than one that has all. Of rows it is not.
    """
    in_rows, rest = flat.split([len(flat) - len(flat) % _ROW, len(flat) % _ROW])
    norms = torch.linalg.vector_norm(in_rows.view(-1, _ROW), dim=1)
    return torch.linalg.vector_norm(torch.cat([norms, torch.linalg.vector_norm(rest)[None]]).double())
