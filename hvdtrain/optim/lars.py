"""LARS: every tensor has a learning rate of its own (You et al. 2017, 1708.03888, Algorithm 1).

    local rate   ratio = trust_coefficient |w| / (|g| + decay |w|)      norms over the whole tensor
    momentum     v <- momentum v + lr ratio (g + decay w)
    step         w <- w - v

In a large batch the rate that one tensor needs makes another diverge: the ratio ties what a tensor moves in a step to
its size. Biases and norms keep ratio 1, as in MLPerf's references. As in the paper the rate is inside of the momentum
(in torch's SGD it is outside): what a step has added is not scaled again when the rate changes.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hvdtrain.optim.runs import InRuns, Run

# Takes parameters and as many tensors of their shapes (gradients, updates); returns the fp32 norms of both [2,
# parameters]. Where a parameter's parts lie on several ranks, it is to sum the squares of all: it is asked once a step,
# by all ranks, of all that have trust ratios of their own.
Norms = Callable[[list[Tensor], list[Tensor]], Tensor]


def whole_norms(weights: list[Tensor], others: list[Tensor]) -> Tensor:
    """Of tensors that are whole on every rank (local). See ``Norms``."""
    return norms_of([*weights, *others]).view(2, -1)


def norms_of(tensors: list[Tensor]) -> Tensor:
    """fp32 [tensors]."""
    if tensors[0].device.type == "cpu":  # row by row first: there one long sum loses 1e-4 over 4 M elements
        tensors = [torch.linalg.vector_norm(tensor, dim=-1) for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors))


def trust_ratios(above: Tensor, below: Tensor, clip: float) -> Tensor:
    """``above / below``, at most ``clip`` (0: any); 1 where either is 0, or a tensor of zeros would never move."""
    ratios = torch.where(torch.minimum(above, below) > 0, above / below, 1.0)
    return ratios.clamp(max=clip) if clip else ratios


class Layerwise(InRuns):
    """Base of LARS and LAMB.

    A group has ``is_adapted``: whether its tensors have trust ratios of their own or all have 1 (norms, biases).
    """

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any], norms: Norms):
        super().__init__(groups, {"is_adapted": True, **defaults})
        self._norms = norms

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient (collective where ``norms`` is)."""
        runs = [run for group in self.param_groups for run in self._runs(group)]
        adapted = [run for run in runs if run[1]["is_adapted"]]
        for part in [[run] for run in adapted] if self._norms is whole_norms else [adapted]:
            others = self._others(part)
            counts = [len(weights) for weights, _ in part]
            norms = self._norms([w for weights, _ in part for w in weights], others).split(counts, dim=1)
            for (weights, group), of_run, beside in zip(part, norms, _split(others, counts), strict=True):
                self._move_adapted(weights, beside, group, *of_run)
        for weights, group in runs:
            if not group["is_adapted"]:
                self._move(weights, group)

    def _others(self, part: list[Run]) -> list[Tensor]:
        """For each parameter of ``part`` the tensor whose norm is set against its own."""
        raise NotImplementedError

    def _move_adapted(
        self, weights: list[Tensor], others: list[Tensor], group: dict[str, Any], weight_norms: Tensor, norms: Tensor
    ) -> None:
        """By the ratios of the norms; norms: of ``others``."""
        raise NotImplementedError

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """By ratio 1."""
        raise NotImplementedError


class Lars(Layerwise):
    """LARS. State of a parameter: ``momentum_buffer``, the paper's v; none where ``momentum`` is 0.

    trust_coefficient: the paper's eta; trust_clip: largest ratio, 0: any.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        trust_clip: float = 0.0,
        norms: Norms = whole_norms,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust_clip": trust_clip,
        }
        super().__init__(groups, defaults, norms)

    def _others(self, part: list[Run]) -> list[Tensor]:
        return [weight.grad for weights, _ in part for weight in weights]

    def _move_adapted(
        self, weights: list[Tensor], others: list[Tensor], group: dict[str, Any], weight_norms: Tensor, norms: Tensor
    ) -> None:
        above, below = weight_norms * group["trust_coefficient"], norms + weight_norms * group["weight_decay"]
        rates = trust_ratios(above, below, group["trust_clip"]) * group["lr"]
        self._by_rates(weights, group, list(rates.unbind()))

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        self._by_rates(weights, group, group["lr"])

    def _by_rates(self, weights: list[Tensor], group: dict[str, Any], rates: list[Tensor] | Tensor | float) -> None:
        momentum, decay = group["momentum"], group["weight_decay"]
        updates = self._room.like(weights)
        torch._foreach_copy_(updates, [weight.grad for weight in weights])
        if decay:
            torch._foreach_add_(updates, weights, alpha=decay)
        torch._foreach_mul_(updates, rates)
        torch._fused_sgd_(
            weights,
            updates,
            self._momenta(weights) if momentum else [],
            weight_decay=0.0,
            momentum=momentum,
            lr=1.0,  # it is in the updates already
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=self._overflow(weights[0].device),
        )

    def _momenta(self, weights: list[Tensor]) -> list[Tensor]:
        return [self._momentum(weight) for weight in weights]


def _split(tensors: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    ends = list(accumulate(counts))
    return [tensors[end - count : end] for end, count in zip(ends, counts, strict=True)]
