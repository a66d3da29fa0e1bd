"""The gradient noise scale: from which batch on do more samples in it gain little?

Source: McCandlish et al. 2018 (1812.06162), section 2 and appendix A.1. A gradient of b targets is the true one, G,
plus noise of covariance S / b, so that E|g_b|^2 = |G|^2 + tr(S) / b. Two sizes of batch give both unknowns, and a step
has two sizes at hand: what one rank (or one microbatch) has summed, and the sum of all.

    tr(S) = (|g_small|^2 - |g_big|^2) / (1/b - 1/B)      |G|^2 = |g_big|^2 - tr(S) / B      noise scale = tr(S) / |G|^2

A run at B targets an update needs 1 + B / noise times the targets of one at a tiny batch, and 1 + noise / B times the
updates of one at an endless batch. Noise of neighbouring steps is averaged, both terms by themselves: the quotient of
averages is what has little bias. The unit is target tokens (rows, for labels); tokens of a row are not independent, so
it is the batch in rows times their length that counts, not the tokens as such.
"""

from collections.abc import Sequence

import torch

_DECAY = 0.99  # of a step: an average over about 100


class NoiseScale:
    """Smoothed over steps; all on the device, which is asked only by ``value`` and ``state``."""

    def __init__(self, device: torch.device):
        self._moments = torch.zeros(2, dtype=torch.float64, device=device)  # tr(S), |G|^2

    def update(
        self, small_square: torch.Tensor, small_inverse: torch.Tensor, big_square: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Note one step: scalars, fp64. One that has a number that is not finite, or one size of batch, is left out.

        small_square, small_inverse: means over the small batches of |gradient|^2 and of 1 / targets; big_square,
        weight: |gradient|^2 and targets of the whole batch. Gradients are means over targets.
        """
        noise = (small_square - big_square) / (small_inverse - 1 / weight)
        now = torch.stack([noise, big_square - noise / weight])
        self._moments = torch.where(now.isfinite().all(), torch.lerp(now, self._moments, _DECAY), self._moments)

    def value(self) -> float | None:
        """Targets; None where nothing was measured, or noise hides the gradient altogether (|G|^2 not above 0)."""
        noise, signal = self._moments.tolist()
        return noise / signal if noise > 0 and signal > 0 else None

    def why_not(self) -> str:
        """Why there is no value; empty where there is one."""
        if self.value() is not None:
            return ""
        if self.state() is None:
            return (
                "no step had gradients of two sizes of batch, which takes two replicas or two microbatches, and a "
                "sync.name that sums gradients as they are"
            )
        return "so far the noise hides the gradient: train longer, or with a larger batch"

    def state(self) -> tuple[float, float] | None:
        """For a checkpoint: what ``load`` takes. None where nothing was measured."""
        noise, signal = self._moments.tolist()
        return (noise, signal) if noise or signal else None

    def load(self, state: tuple[float, float]) -> None:
        self._moments.copy_(torch.tensor(state, dtype=torch.float64))


class PartNorms:
    """Squares of the gradients of parts of a step's batch: of each replica's share, or where there is one replica, of
    the first of its microbatches. It watches the gradients on their way; see sync/buckets.py.

    speaks: of a replica that is cut over ranks, each adds the squares of what it holds, and one of them the rest.
    of_first: where nobody ever has a replica's whole share, the first microbatch of each replica it is.
    """

    def __init__(self, replicas: int, device: torch.device, speaks: bool = True, of_first: bool = False):
        self._has_peers, self._of_first, self._speaks = replicas > 1, of_first or replicas == 1, speaks
        self._square = torch.zeros((), dtype=torch.float64, device=device)

    def begin(self) -> None:
        """A step begins."""
        self._square.zero_()

    def after_first_pass(self, flat: torch.Tensor, copies: int = 1) -> None:
        """A bucket as the first of several microbatches has left it. copies: ranks of the replica that hold it."""
        if self._of_first:
            self._square += torch.dot(flat, flat) / copies

    def as_it_leaves(self, flat: torch.Tensor, copies: int = 1) -> None:
        """A bucket as this replica's whole share has filled it."""
        if not self._of_first:
            self._square += torch.dot(flat, flat) / copies

    def tell(self, sums: torch.Tensor, weights: Sequence[int], is_complete: bool) -> None:
        """Put what this rank adds into ``sums`` [3]: of its replica's part |mean gradient|^2, 1 / its targets, 1.
        By ``fill_``: ``sums[1] = number`` would wait for a GPU.

        weights: targets of its microbatches. is_complete: each of them gave every parameter a gradient; else nobody
        knows which the first was of, and it is left out.
        """
        is_part = len(weights) > (0 if self._has_peers else 1)
        weight = 0 if not is_part else weights[0] if self._of_first else sum(weights)
        if self._of_first and not is_complete:
            sums[0].fill_(torch.nan)  # the other ranks of the replica may know no better
        elif weight:
            sums[0].copy_(self._square / weight**2)
            if self._speaks:
                sums[1].fill_(1 / weight)
                sums[2].fill_(1)
