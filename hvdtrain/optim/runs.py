"""Optimizers that go through their parameters in runs: a few small tensors, or one large one, at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Run = tuple[list[Tensor], dict[str, Any]]  # parameters that are updated together, and their group

# Elements (4 bytes each) that are updated together. On a CPU: few, so that they are still in the cache when they are
# needed again, or a step would read memory twice as often. On a GPU: many, for few kernels, but memory is not endless.
_CPU_RUN = 1 << 18
_GPU_RUN = 1 << 26


def in_runs(weights: Iterable[Tensor], on_cpu: int = 0) -> Iterator[list[Tensor]]:
    """``weights`` in order, cut into runs on one device. on_cpu: numbers of a run there, where others are better."""
    run: list[Tensor] = []
    size = 0
    for weight in weights:
        most = (on_cpu or _CPU_RUN) if weight.device.type == "cpu" else _GPU_RUN
        is_full = size + weight.numel() > most
        if run and (is_full or weight.device != run[0].device):
            yield run
            run, size = [], 0
        run.append(weight)
        size += weight.numel()
    if run:
        yield run


class Room:
    """Memory for what a run is updated by, which is used again for the next."""

    def __init__(self) -> None:
        self._rooms: dict[torch.device, Tensor] = {}

    def like(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """fp32 tensors of any values in the shapes of ``weights``, which are on one device, until the next call."""
        if not weights:
            return []
        device = weights[0].device
        sizes = [weight.numel() for weight in weights]
        aligned = [-(-size // 32) * 32 for size in sizes]  # GPUs read four neighbours at once only where they may
        total = sum(aligned)
        room = self._rooms.get(device)
        if room is None or room.numel() < total:
            room = self._rooms[device] = torch.empty(total, device=device)
        pieces = room[:total].split(aligned)
        return [piece[:size].view(w.shape) for piece, size, w in zip(pieces, sizes, weights, strict=True)]


class InRuns(torch.optim.Optimizer):
    """Base of ours. Parameters are fp32 and contiguous. Nothing waits for the GPU.

    ``found_inf``, where it is set (fp32 scalar; 1: the gradients overflowed), is what it is for torch's fused
    optimizers: 1 leaves everything as it is.
    """

    # torch hides its own from its compiler, and to do so loads the compiler: seconds, and 70 MiB of every
    # process. No step is compiled here.
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any]):
        # fused: how torch calls it that ``step`` counts on the parameter's device
        super().__init__(groups, {**defaults, "fused": True})
        parameters = [p for group in self.param_groups for p in group["params"]]
        assert all(p.dtype == torch.float32 for p in parameters), "the fp32 weights are moved, not copies"
        assert all(p.is_contiguous() for p in parameters)
        self._room = Room()

    def _runs(self, group: dict[str, Any]) -> Iterator[Run]:
        """Those of its parameters that have gradients, in order, cut into runs on one device."""
        for weights in in_runs(weight for weight in group["params"] if weight.grad is not None):
            yield weights, group

    def _overflow(self, device: torch.device) -> Tensor | None:
        found = getattr(self, "found_inf", None)
        return None if found is None else found.to(device, non_blocking=True)

    def _sgd(self, weights: list[Tensor], updates: list[Tensor], group: dict[str, Any], momentum: float = 0.0) -> None:
        """One step along ``updates``, by torch's fused kernel; with ``momentum`` into what ``_momentum`` keeps."""
        torch._fused_sgd_(
            weights,
            updates,
            [self._momentum(weight) for weight in weights] if momentum else [],
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=self._overflow(weights[0].device),
        )

    def _momentum(self, weight: Tensor) -> Tensor:
        """Of one that has it: zeros, where it begins."""
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum_buffer"]
        return momentum
