"""The contract of a replica: what can be done with it, however it is spread over ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hvdtrain.data.batch import AnyBatch
from hvdtrain.slices import Slice
from hvdtrain.tasks.task import Task


@dataclass(frozen=True)
class Passed:
    """What forward and backward over a step's microbatches have given.

    loss: scalar fp64, the SUM over targets, not scaled, on all ranks of the replica; weights: targets of each
    microbatch; flops: model FLOPs of this rank (see models/flops.py).
    """

    loss: torch.Tensor
    weights: Sequence[int]
    flops: int


class Replica(Protocol):
    """One replica of the model, or this rank's piece of it.

    slices: the fp32 weights, which optimizer and checkpoints know, by name. computing: for each slice the parameter
    that backward gives a gradient: its own tensor, or a copy in fewer bits. uses: for each slice how many such
    gradients a microbatch gives; more than 1 where a rank's stages share it. device: where they lie.
    answering: what a task asks for texts, see ``Answers``; under a cut all ranks of the replica ask it together.
    """

    slices: Sequence[Slice]
    computing: Sequence[torch.Tensor]
    uses: Sequence[int]
    device: torch.device
    answering: Any

    def forward_backward(
        self, microbatches: Sequence[AnyBatch], task: Task, seed: int, loss_scale: torch.Tensor | None
    ) -> Passed:
        """Add up loss and gradients over the microbatches; gradients may travel meanwhile.

        seed: of dropout in this step. loss_scale: what the gradients, not the loss that comes back, are multiplied by.
        """

    def measure(self, batches: Iterable[AnyBatch], task: Task) -> torch.Tensor | None:
        """The task's sums over batches in evaluation, fp64 [k], on all ranks of the replica; None where there was no
        batch.
        """

    def publish(self) -> None:
        """Hand the weights on to the copy that computes; after every change of them (local)."""
