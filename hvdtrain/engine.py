"""Composes a run: one replica (the cut) and how replicas agree (the sync).

Two independent questions. A cut or a sync is one file and one line in its table; the loop never learns its name.
"""

import contextlib
import copy
from dataclasses import replace

import torch
from torch import nn

from hvdtrain.comm.group import Group
from hvdtrain.cut.compiling import compile_model, uncompiled
from hvdtrain.cut.precision import PRECISIONS, LossScale
from hvdtrain.data.batch import Batch
from hvdtrain.data.sampler import derive
from hvdtrain.errors import DivergedError
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.sync import SYNCS, SyncOptions
from hvdtrain.sync.allreduce import StepSums
from hvdtrain.tasks.task import Task


class Plan:
    """One replica per rank, kept equal by ``sync``. Making it copies rank 0's parameters to all (collective).

    ``model``: the fp32 weights, which optimizer and checkpoints know. ``compute``: what computes; the same, or a copy
    of it in another type. ``replicas`` and ``replica``: how many share the data, and which of them this rank is in.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        options: SyncOptions,
        precision: str,
        seed: int,
        compile: str = "none",
        guard: GuardOptions | None = None,
    ):
        self.model, self.group = model, group
        self.replicas, self.replica = group.size, group.rank
        self.device = next(model.parameters()).device
        self.precision, self._seed = PRECISIONS[precision], seed
        for number, parameter in enumerate(model.parameters()):
            group.broadcast(parameter.data, 0, f"hvdtrain.start.{number}")
        self.compute = copy.deepcopy(model).to(self.precision.weights) if self.precision.weights else model
        self.loss_scale = LossScale(self.device) if self.precision.scaled else None
        self.guard = Guard(guard, self.device) if guard is not None and guard.policy == "skip" else None
        self._overflowed: torch.Tensor | None = None
        self.sync = SYNCS[options.name](model, group, getattr(options, options.name), self.compute)
        compile_model(self.compute, compile)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._weight = 0
        self.flops = 0  # of this rank's last step, see models/flops.py

    def forward_backward(self, microbatches: list[Batch], task: Task, step: int) -> None:
        """Sums of loss and gradient over this rank's microbatches; gradients already travel while backward runs.

        Dropout's random numbers depend on (seed, step, replica) alone, so a resumed run draws the same ones and no
        random state has to be stored.
        """
        torch.manual_seed(derive(self._seed, step, self.replica, 2))
        self.sync.start()
        self._loss_sum.zero_()
        self._weight = self.flops = 0
        for number, batch in enumerate(microbatches):
            with self.autocast():
                loss = task.loss(self.compute, batch)
            if number == len(microbatches) - 1:
                self.sync.last()
            (loss.total if self.loss_scale is None else loss.total * self.loss_scale.scale).backward()
            self._loss_sum += loss.total.detach()
            self._weight += loss.weight
            if number == 0 and len(microbatches) > 1:
                self.sync.part(self._weight)
            self.flops += task.training_flops(self.model, batch)

    def finish(self, max_norm: float, flags: int = 0) -> StepSums:
        """Global loss and gradient norm of the step; gradients summed, divided by the global weight, clipped.

        flags: what this rank adds to the sum of flags, see StepSums.
        """
        scale = None if self.loss_scale is None else self.loss_scale.scale
        sums = self.sync.finish(self._loss_sum, self._weight, max_norm, scale, flags)
        if self.loss_scale is not None:
            sums = replace(sums, loss_scale=self.loss_scale.scale.clone())
            self._overflowed = ~sums.grad_norm.isfinite()
            self.loss_scale.update(self._overflowed)
        if self.guard is not None:
            self.guard.judge(sums.loss, sums.grad_norm, self._overflowed)
        return sums

    def step(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Update the weights, where the gradient did not overflow and the guard lets it pass (local: alike on all)."""
        refused = [flag for flag in (self._overflowed, self.guard and self.guard.skip) if flag is not None]
        if refused:  # torch's fused optimizers then leave everything as it is
            optimizer.found_inf = torch.stack(refused).any().float()
        self.sync.step(optimizer, lr if self.guard is None else (lr * self.guard.factor).float())
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Hand the weights on to the copy that computes; also after they were changed from outside (local)."""
        if self.compute is not self.model:
            torch._foreach_copy_(list(self.compute.parameters()), list(self.model.parameters()))

    def check_finite(self, step: int) -> None:
        """Before parameters are saved: are they numbers? Errors: DivergedError, on all ranks alike (local)."""
        if self.guard is not None:
            self.guard.check(step)
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not bool(norms.isfinite().all()):
            raise DivergedError(
                f"step {step}: parameters are no longer finite numbers; lower optim.lr or lengthen "
                "schedule.warmup_steps; the last checkpoint is from before"
            )

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision.autocast)

    @torch.no_grad()
    def evaluate(self, batches, task: Task) -> dict[str, float]:
        """Scores of a split whose batches are shared by the ranks: exact for any number of them (collective)."""
        sums = None
        self.compute.eval()
        with uncompiled():  # other shapes than in training would be compiled anew
            for batch in batches:
                with self.autocast():
                    measured = task.measure(self.compute, batch.to(self.device))
                sums = measured if sums is None else sums + measured
        self.compute.train()
        if self.group.size > 1:
            # A rank may have had no batch at all: it learns from the others how many sums there are.
            lengths = self.group.all_gather_object(0 if sums is None else len(sums))
            sums = torch.zeros(max(lengths), dtype=torch.float64, device=self.device) if sums is None else sums
        self.group.all_reduce_sum(sums, "hvdtrain.evaluation")
        return task.scores(sums.tolist())
