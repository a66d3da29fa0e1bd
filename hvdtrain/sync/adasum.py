"""Adasum (Maleki et al. 2020, 2006.02924): gradients that agree are averaged, those that do not are added.

    a, b: mean gradients of two ranks' rows, of one parameter

    a + b - (a.b / 2|a|^2) a - (a.b / 2|b|^2) b          a = b: a          a.b = 0: a + b
    rank 0 --.                                           two by two; the results two by two; ...
    rank 1 --+--.
    rank 2 --.  |
    rank 3 --+--+-- the same on all

The idea is a batch that grows without a learning rate that grows: where the ranks' gradients have little in common, the
sum of means is up to as many times as long as the mean of all. So it is no one process's gradient, on purpose.

A rank's mean is known when all of its microbatches are: nothing travels while backward runs. Horovod does it, over MPI,
for all ranks at a time and 2^n of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.comm.ranks import Pending
from hvdtrain.slices import Slice
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.sync.buckets import Bucket
from hvdtrain.sync.sync import Drift, Told


class AdasumSync(AllReduceSync):
    """See ``AllReduceSync``; of replicas that are whole. The noise scale, one of means, is not measured."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: AllReduceOptions,
        uses: Sequence[int] | None = None,
    ):
        assert mesh.own.size == 1 and options.wire == "fp32", "the table of combinations refuses it"
        super().__init__(slices, computing, mesh, options, uses, holds=True)
        self.drift = Drift(False, f"gradients between the mean of {mesh.replicas} replicas' and their sum")
        self.notes.append("sync.allreduce.combine=adasum: the noise scale is not measured")
        self._own_weight = 1

    def finish(self, told: Told) -> None:
        self._own_weight = max(1, sum(told.weights))
        super().finish(told)
        assert self._summed is not None
        # The update divides by the whole weight; and what it would make of the parts' norms says nothing here.
        for gradient in self._summed.gradients:
            gradient.flat.mul_(self._summed.weight.to(gradient.flat.dtype))
        self._summed = replace(self._summed, parts=torch.zeros_like(self._summed.parts))

    def _send(self, bucket: Bucket) -> None:
        bucket.flat.div_(self._own_weight)
        group, name = bucket.run.holders, bucket.run.name
        bucket.pending = _All([group.adasum_async(view, f"{name}.{i}") for i, view in enumerate(bucket.views)])


@dataclass(frozen=True)
class _All:
    pending: Sequence[Pending]

    def done(self) -> bool:
        return all(one.done() for one in self.pending)

    def wait(self) -> None:
        for one in self.pending:
            one.wait()
