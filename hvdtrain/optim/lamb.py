"""LAMB: AdamW in which a tensor moves by a share of its own size (You et al. 2020, 1904.00962, Algorithm 2).

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    r  = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    w <- w - lr ratio (r + decay w)         ratio = |w| / |r + decay w|, norms over the whole tensor

The paper's phi is the identity, as in Google's and NVIDIA's code; ``trust_clip`` bounds the ratio itself, not |w|.
Biases and norms keep ratio 1, as in that code: they move as AdamW moves them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvdtrain.optim.adam import AdamSteps, Moments
from hvdtrain.optim.lars import Layerwise, Norms, trust_ratios, whole_norms
from hvdtrain.optim.runs import Run

_MOMENTS = Moments()


class Lamb(Layerwise, AdamSteps):
    """LAMB. State of a parameter: see ``AdamSteps``.

    trust_clip: largest ratio, 0: any.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        moments: Moments = _MOMENTS,
        weight_decay: float = 0.0,
        trust_clip: float = 0.0,
        norms: Norms = whole_norms,
    ):
        defaults = {
            "lr": lr,
            "betas": (moments.beta1, moments.beta2),
            "eps": moments.eps,
            "weight_decay": weight_decay,
            "trust_clip": trust_clip,
            "bias_correction": moments.bias_correction,
        }
        super().__init__(groups, defaults, norms)

    def _others(self, part: list[Run]) -> list[Tensor]:
        """What AdamW would go, without the rate."""
        updates = self._room.like([weight for weights, _ in part for weight in weights])
        rest = updates
        for weights, group in part:
            of_run, rest = rest[: len(weights)], rest[len(weights) :]
            torch._foreach_copy_(of_run, weights)
            # AdamW's w (1 - lr decay) - lr r is, at these two, decay w + r: one kernel in place of a dozen.
            self._adamw(of_run, weights, group, -1.0, group["weight_decay"] - 1.0)
        return updates

    def _move_adapted(
        self, weights: list[Tensor], others: list[Tensor], group: dict[str, Any], weight_norms: Tensor, norms: Tensor
    ) -> None:
        rates = trust_ratios(weight_norms, norms, group["trust_clip"]) * -group["lr"]
        if (overflow := self._overflow(weights[0].device)) is not None:
            rates = torch.where(overflow > 0, 0.0, rates)  # the others are the weights then: w + 0 w
        torch._foreach_addcmul_(weights, others, list(rates.unbind()))

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        self._adamw(weights, weights, group, group["lr"], group["weight_decay"])
