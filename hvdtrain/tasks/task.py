"""The contract of a task: how a batch becomes a loss, and how sums become scores."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from hvdtrain.data.batch import Batch


@dataclass(frozen=True)
class LossSum:
    """``total``: a scalar tensor, the SUM of the loss over the batch's targets. ``weight``: how many there were.

    Sums, never means: they are added over microbatches and ranks and divided once, so that padding, uneven ranks and
    accumulation cannot bias the gradient.
    """

    total: torch.Tensor
    weight: int


class Task(Protocol):
    """What the loop needs to know of a task."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Loss of one microbatch; called under autograd in training, without it in evaluation."""

    def scores(self, total: float, weight: float) -> dict[str, float]:
        """Scores of a whole split from its global sums; ``val_loss`` (nats per target) is always among them."""
