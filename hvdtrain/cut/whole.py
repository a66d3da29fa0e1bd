"""The replica that is whole on its rank."""

import contextlib
import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hvdtrain.comm.mesh import Mesh
from hvdtrain.cut.compiling import compile_model, uncompiled
from hvdtrain.cut.cut import Passed
from hvdtrain.cut.precision import Precision
from hvdtrain.data.batch import AnyBatch
from hvdtrain.slices import Slice, whole_slices
from hvdtrain.tasks.task import Task


class Whole:
    """See ``Replica``. ``compute``: what computes: the model, or a copy of it in the type of ``precision.weights``."""

    def __init__(self, model: nn.Module, mesh: Mesh, precision: Precision, compile: str = "none"):
        self.model, self._precision = model, precision
        self.device = next(model.parameters()).device
        self.compute = copy.deepcopy(model).to(precision.weights) if precision.weights else model
        self.slices: Sequence[Slice] = whole_slices(model, mesh.replica)
        self.computing: Sequence[torch.Tensor] = list(self.compute.parameters())
        compile_model(self.compute, compile)

    def forward_backward(
        self, microbatches: Sequence[AnyBatch], task: Task, seed: int, loss_scale: torch.Tensor | None = None
    ) -> Passed:
        torch.manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        weights, flops = [], 0
        for batch in microbatches:
            with self._autocast():
                loss = task.loss(self.compute, batch)
            (loss.total if loss_scale is None else loss.total * loss_scale).backward()
            total += loss.total.detach()
            weights.append(loss.weight)
            flops += task.training_flops(self.model, batch)
        return Passed(total, weights, flops)

    @torch.no_grad()
    def measure(self, batches: Iterable[AnyBatch], task: Task) -> torch.Tensor | None:
        sums = None
        self.compute.eval()
        with uncompiled():  # other shapes than in training would be compiled anew
            for batch in batches:
                with self._autocast():
                    measured = task.measure(self.compute, batch.to(self.device))
                sums = measured if sums is None else sums + measured
        self.compute.train()
        return sums

    @torch.no_grad()
    def publish(self) -> None:
        if self.compute is not self.model:
            torch._foreach_copy_(list(self.compute.parameters()), list(self.model.parameters()))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._precision.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._precision.autocast)
