"""AdamW (Loshchilov and Hutter 2019) by torch's fused kernel: alone, and for optimizers that also do other things."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.optim.runs import InRuns

_LATE = 2.0**40  # a step at which bias correction has gone


@dataclass(frozen=True)
class Moments:
    """``eps``: added to the root of the second; ``bias_correction``: whether to divide by 1 - beta^t."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    bias_correction: bool = True


class AdamSteps(InRuns):
    """State of a parameter, as of torch's fused AdamW: ``exp_avg``, ``exp_avg_sq``, ``step`` (fp32 scalar)."""

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any]):
        super().__init__(groups, defaults)
        self._late: dict[torch.device, Tensor] = {}

    def _adamw(
        self,
        moved: list[Tensor],
        weights: list[Tensor],
        group: dict[str, Any],
        lr: float,
        decay: float,
    ) -> None:
        """One step of AdamW on ``moved``, with gradients and moments of ``weights``."""
        overflow = self._overflow(weights[0].device)
        states = [self._state_of(weight) for weight in weights]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            moved,
            [weight.grad for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps if group["bias_correction"] else [self._late_step(weights[0].device)] * len(steps),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=overflow,
        )
        if overflow is not None:
            torch._foreach_sub_(steps, [overflow] * len(steps))

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state

    def _late_step(self, device: torch.device) -> Tensor:
        if device not in self._late:
            self._late[device] = torch.full((), _LATE, device=device)
        return self._late[device]


class AdamW(AdamSteps):
    """What torch's is, to the bit; but that one loads torch's compiler. State of a parameter: see ``AdamSteps``."""

    def __init__(self, groups: Iterable[Any], lr: float, moments: Moments):
        defaults = {
            "lr": lr,
            "betas": (moments.beta1, moments.beta2),
            "eps": moments.eps,
            "weight_decay": 0.0,
            "bias_correction": moments.bias_correction,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weights, _ in self._runs(group):
                self._adamw(weights, weights, group, group["lr"], group["weight_decay"])
