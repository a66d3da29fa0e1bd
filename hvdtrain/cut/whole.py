"""The replica that has all layers on this rank: whole ones, or its part of each."""

import copy
from collections.abc import Iterable, Sequence

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.cut.compiling import compile_model, uncompiled
from hvdtrain.cut.cut import Passed
from hvdtrain.cut.precision import Precision
from hvdtrain.data.batch import AnyBatch
from hvdtrain.models.draws import mixed
from hvdtrain.models.pieces import Staged
from hvdtrain.slices import Slice, whole_slices
from hvdtrain.tasks.task import Task, run


class Whole:
    """See ``Replica``. model: its fp32 weights. slices: what they are of the whole model; None: they are the whole.

    compute: what computes: the model, or a copy of it in the type of ``precision.weights``.
    """

    def __init__(
        self,
        model: Staged,
        mesh: Mesh,
        precision: Precision,
        compile: str = "none",
        slices: Sequence[Slice] | None = None,
    ):
        self._weights, self._precision, self._parts = model, precision, mesh.tensor.size
        self.device = next(model.parameters()).device
        self.compute = copy.deepcopy(model).to(precision.weights) if precision.weights else model
        self.answering = self.compute
        self.slices: Sequence[Slice] = whole_slices(model, mesh.replica) if slices is None else slices
        copies = {id(w): c for w, c in zip(model.parameters(), self.compute.parameters(), strict=True)}
        self.computing: Sequence[torch.Tensor] = [copies[id(piece.tensor)] for piece in self.slices]
        self.uses: Sequence[int] = [1] * len(self.slices)
        compile_model(self.compute, compile)

    def forward_backward(
        self, microbatches: Sequence[AnyBatch], task: Task, seed: int, loss_scale: torch.Tensor | None = None
    ) -> Passed:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        weights, flops = [], 0
        for number, batch in enumerate(microbatches):
            self.compute.draws.begin(mixed(seed, number), self.device)
            with self._precision.autocasting(self.device):
                loss = task.loss(self.compute, self.compute(*task.inputs(batch)), batch)
            (loss.total if loss_scale is None else loss.total * loss_scale).backward()
            total += loss.total.detach()
            weights.append(loss.weight)
            flops += task.training_flops(self._weights, batch)
        return Passed(total, weights, flops // self._parts)

    @torch.no_grad()
    def measure(self, batches: Iterable[AnyBatch], task: Task) -> torch.Tensor | None:
        sums = None
        self.compute.eval()
        with uncompiled():  # other shapes than in training would be compiled anew
            for batch in batches:
                with self._precision.autocasting(self.device):
                    measured = self._measured(batch.to(self.device), task)
                sums = measured if sums is None else sums + measured
        self.compute.train()
        return sums

    def _measured(self, batch: AnyBatch, task: Task) -> torch.Tensor:
        output = run(self.compute, task.inputs(batch), batch.rows_at_once)
        sums, decoded = task.measure(self.compute, output, batch), task.measure_decoded(self.compute, batch)
        return sums if decoded is None else torch.cat([sums, decoded.to(sums.device)])

    @torch.no_grad()
    def publish(self) -> None:
        if self.compute is not self._weights:
            torch._foreach_copy_(list(self.compute.parameters()), list(self._weights.parameters()))
