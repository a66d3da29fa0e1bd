"""LARS: every tensor has a learning rate of its own (You et al. 2017, 1708.03888, Algorithm 1).

    local rate   ratio = trust_coefficient |w| / (|g| + decay |w|)      norms over the whole tensor
    momentum     v <- momentum v + lr ratio (g + decay w)
    step         w <- w - v

In a large batch the rate that one tensor needs makes another diverge: the ratio ties what a tensor moves in a step to
its size. Biases and norms keep ratio 1, as in MLPerf's references. As in the paper the rate is inside of the momentum
(in torch's SGD it is outside): what a step has added is not scaled again when the rate changes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# Takes tensors, returns their fp32 norms [tensors]. Where a tensor's parts lie on several ranks, it is to sum the
# squares of all: it is asked once a step for each group of parameters, with the same tensors on all ranks.
Norms = Callable[[list[Tensor]], Tensor]

# Elements (4 bytes each) that are updated together. On a CPU: few, so that they are still in the cache when they are
# needed again, or a step would read memory twice as often. On a GPU: many, for few kernels, but memory is not endless.
_RUN = {"cpu": 1 << 18}
_GPU_RUN = 1 << 26


def whole_norms(tensors: list[Tensor]) -> Tensor:
    """Norms of tensors that are whole on every rank (local)."""
    if tensors[0].device.type == "cpu":  # row by row first: there one long sum loses 1e-4 over 4 M elements
        tensors = [torch.linalg.vector_norm(tensor, dim=-1) for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors))


def trust_ratios(above: Tensor, below: Tensor, clip: float) -> Tensor:
    """``above / below``, at most ``clip`` (0: any); 1 where either is 0, or a tensor of zeros would never move."""
    ratios = torch.where(torch.minimum(above, below) > 0, above / below, 1.0)
    return ratios.clamp(max=clip) if clip else ratios


class Layerwise(torch.optim.Optimizer):
    """Base of LARS and LAMB: goes through the parameters in runs, with room for a run's updates that is used again.

    Parameters are fp32 and contiguous. A group has ``is_adapted``: whether its tensors have trust ratios of their own
    or all have 1 (norms, biases). Nothing waits for the GPU. ``found_inf``, where it is set (fp32 scalar; 1: the
    gradients overflowed), is what it is for torch's fused optimizers: 1 leaves everything as it is.
    """

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any], norms: Norms):
        # fused: how torch calls it that ``step`` counts on the parameter's device
        super().__init__(groups, {"is_adapted": True, **defaults, "fused": True})
        parameters = [p for group in self.param_groups for p in group["params"]]
        assert all(p.dtype == torch.float32 for p in parameters), "the fp32 weights are moved, not copies"
        assert all(p.is_contiguous() for p in parameters)
        self._norms = norms
        self._rooms: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient (collective where ``norms`` is)."""
        for group in self.param_groups:
            for run in self._runs([p for p in group["params"] if p.grad is not None]):
                self._update(run, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _runs(self, weights: list[Tensor]) -> Iterator[list[Tensor]]:
        """``weights`` in order, cut into runs on one device; not cut where others are asked for norms."""
        run: list[Tensor] = []
        size = 0
        for weight in weights:
            most = _RUN.get(weight.device.type, _GPU_RUN) if self._norms is whole_norms else math.inf
            if run and (size + weight.numel() > most or weight.device != run[0].device):
                yield run
                run, size = [], 0
            run.append(weight)
            size += weight.numel()
        if run:
            yield run

    def _room(self, weights: list[Tensor]) -> list[Tensor]:
        """A tensor of any values for each of ``weights``, until the next call."""
        device = weights[0].device
        sizes = [weight.numel() for weight in weights]
        aligned = [-(-size // 32) * 32 for size in sizes]  # GPUs read four neighbours at once only where they may
        total = sum(aligned)
        room = self._rooms.get(device)
        if room is None or room.numel() < total:
            room = self._rooms[device] = torch.empty(total, device=device)
        pieces = room[:total].split(aligned)
        return [piece[:size].view(w.shape) for piece, size, w in zip(pieces, sizes, weights, strict=True)]

    def _overflow(self, device: torch.device) -> Tensor | None:
        found = getattr(self, "found_inf", None)
        return None if found is None else found.to(device, non_blocking=True)


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

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [weight.grad for weight in weights]
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        updates = self._room(weights)
        torch._foreach_copy_(updates, gradients)
        if decay:
            torch._foreach_add_(updates, weights, alpha=decay)
        if group["is_adapted"]:
            weight_norms, gradient_norms = self._norms([*weights, *gradients]).chunk(2)
            above, below = weight_norms * group["trust_coefficient"], gradient_norms + weight_norms * decay
            rates = trust_ratios(above, below, group["trust_clip"]) * lr
            torch._foreach_mul_(updates, list(rates.unbind()))
        else:
            torch._foreach_mul_(updates, lr)
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
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return [self.state[weight]["momentum_buffer"] for weight in weights]
