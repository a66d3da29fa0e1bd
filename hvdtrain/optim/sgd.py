"""SGD with momentum, by torch's fused kernel.

b <- momentum b + g + decay w        w <- w - lr b
"""

from collections.abc import Iterable
from typing import Any

import torch

from hvdtrain.optim.runs import InRuns


class Sgd(InRuns):
    """What torch's is, to the bit; but that one loads torch's compiler. State of a parameter: ``momentum_buffer``, b,
    where there is momentum.

    Momenta begin as zeros, which gives the same first step as torch's way, to set them in it. That way leaves them as
    memory happened to be where the first step is skipped (``found_inf``), and fails where a parameter has its first
    gradient later than others.
    """

    def __init__(self, groups: Iterable[Any], lr: float, momentum: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weights, _ in self._runs(group):
                self._sgd(weights, [weight.grad for weight in weights], group, group["momentum"])
