"""An engine whose step a test takes in halves, to look at the gradient in between."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.cut.whole import Whole
from hvdtrain.data.batch import AnyBatch
from hvdtrain.engine import Engine
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.loss_scale import LossScale
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.slices import whole_slices
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.tasks.task import Task


def allreduce(model: nn.Module, group: Group, options: AllReduceOptions) -> AllReduceSync:
    """The sync alone, of a model that computes by itself."""
    return AllReduceSync(whole_slices(model, group), list(model.parameters()), whole_replicas(group), options)


def update_of(optimizer: torch.optim.Optimizer, max_norm: float = 0.0) -> Update:
    return Update(optimizer, max_norm, Guard(GuardOptions(), torch.device("cpu")))


class InHalves:
    """``forward_backward``, then ``finish``: the mean gradient lies in ``grad``, clipped; then ``step``."""

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        sync: SyncOptions,
        precision: str,
        seed: int,
        compile: str = "none",
        guard: GuardOptions | None = None,
    ):
        mesh = whole_replicas(group)
        whole = Whole(model, mesh, PRECISIONS[precision], compile)
        self.model, self.compute, self.group = model, whole.compute, group
        self.loss_scale = LossScale(whole.device) if PRECISIONS[precision].scaled else None
        self.guard = Guard(guard or GuardOptions(), whole.device)
        update = Update(make_optimizer(model.parameters(), OptimOptions()), 0.0, self.guard, self.loss_scale)
        self.engine = Engine(whole, make_sync(sync, whole.slices, whole.computing, mesh), update, mesh, seed)
        self.sync = self.engine.sync

    def forward_backward(self, microbatches: Sequence[AnyBatch], task: Task, step: int) -> None:
        self.engine.forward_backward(microbatches, task, step)

    def finish(self, max_norm: float, flags: int = 0) -> Agreed:
        self.engine.finish(flags)
        self.engine.update.clip_norm = max_norm
        return self.engine.update.divide(self.sync._summed)

    def step(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        self.engine.update.optimizer = optimizer
        self.engine.update.apply(lr)
        self.publish()

    def publish(self) -> None:
        self.engine.replica.publish()

    def evaluate(self, batches: Iterable[AnyBatch], task: Task) -> dict[str, float]:
        return self.engine.evaluate(batches, task)
