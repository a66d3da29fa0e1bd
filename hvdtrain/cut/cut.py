"""The contract of a cut: how one replica of the model is spread over ranks, and what a replica can do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from hvdtrain.comm.mesh import Mesh
from hvdtrain.cut.precision import Precision
from hvdtrain.data.batch import AnyBatch
from hvdtrain.slices import Slice
from hvdtrain.tasks.task import Task


@dataclass(frozen=True)
class Passed:
    """What forward and backward over a step's microbatches have given.

    loss: scalar fp64, the SUM over targets, not scaled; weights: targets of each microbatch; flops: model FLOPs of this
    rank (see models/flops.py).
    """

    loss: torch.Tensor
    weights: Sequence[int]
    flops: int


class Replica(Protocol):
    """One replica of the model, or this rank's piece of it.

    model: the fp32 weights, which optimizer and checkpoints know. slices: these, by name. computing: for each slice the
    parameter that backward gives a gradient: its own tensor, or a copy in fewer bits. device: where they lie.
    """

    model: nn.Module
    slices: Sequence[Slice]
    computing: Sequence[torch.Tensor]
    device: torch.device

    def forward_backward(
        self, microbatches: Sequence[AnyBatch], task: Task, seed: int, loss_scale: torch.Tensor | None
    ) -> Passed:
        """Add up loss and gradients over the microbatches; gradients may travel meanwhile.

        seed: of dropout in this step. loss_scale: what the gradients, not the loss that comes back, are multiplied by.
        """

    def measure(self, batches: Iterable[AnyBatch], task: Task) -> torch.Tensor | None:
        """The task's sums over batches in evaluation, fp64 [k]; None where there was no batch."""

    def publish(self) -> None:
        """Hand the weights on to the copy that computes; after every change of them (local)."""


class Cut(Protocol):
    """Makes a run's replica out of its model, which is on its device and whole: once."""

    def __call__(self, model: nn.Module, mesh: Mesh, precision: Precision, compile: str) -> Replica: ...
