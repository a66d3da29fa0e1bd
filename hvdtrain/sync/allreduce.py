"""Synchronous data parallelism: sum the gradients of all ranks while backward still runs.

Gradients live in flat buckets, filled in the order in which backward makes them (last layer first). A bucket whose
gradients are all there starts its ring all-reduce at once:

    backward    [layer 4][layer 3][layer 2][layer 1]
    all-reduce           [bucket 0 ------][bucket 1 -----][bucket 2 -----]
    finish                                                                [norm, divide, clip]

Under accumulation the buckets gather the microbatches' sums, and only the last microbatch sends them. The gradient is
divided once, by the global weight, after the sum; the norm that clips it is that of the divided global gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hvdtrain.comm.group import Group, Pending
from hvdtrain.options import Options, option
from hvdtrain.sync.wire import make_wire


class AllReduceOptions(Options):
    bucket_mib: float = option(16.0, "gradients sent as one all-reduce (MiB)", gt=0)
    wire: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "numbers in which gradients travel between ranks; the two-byte ones are for slow links"
    )


@dataclass(frozen=True)
class StepSums:
    """What all ranks know after a step: scalar fp64 tensors, read when someone needs the number."""

    loss: torch.Tensor  # mean over the global batch's targets
    weight: torch.Tensor  # number of targets in the global batch
    grad_norm: torch.Tensor  # of the global mean gradient, before clipping
    loss_scale: torch.Tensor | None = None  # what the loss was multiplied by; an overflow is then no divergence
    # Of the gradients of parts of the batch (each a mean): means over the parts of |gradient|^2 and of 1 / targets. nan
    # where there is one part. See optim/noise_scale.py.
    part_square: torch.Tensor | None = None
    part_inverse: torch.Tensor | None = None
    flags: torch.Tensor | None = None  # the sum of what the ranks had to tell one another, see stopping.py


class _Bucket:
    """Some parameters whose gradients are neighbours in one flat buffer."""

    def __init__(self, number: int, members: list[tuple[int, nn.Parameter]]):
        self.name = f"hvdtrain.gradients.{number}"
        self.members = members
        first = members[0][1]
        self.flat = torch.zeros(sum(p.numel() for _, p in members), dtype=first.dtype, device=first.device)
        self.views = [
            piece.view_as(p)
            for piece, (_, p) in zip(self.flat.split([p.numel() for _, p in members]), members, strict=True)
        ]
        self.missing = len(members)
        self.pending: Pending | None = None


class AllReduceSync:
    """Replicas are equal after every step: each applies the same global gradient.

    One step:  ``start()``, then for each microbatch backward (``last()`` before the last one's; ``part(weight)`` after
    the first, where there are more), then ``finish(loss_sum, weight, max_norm)``, then ``step(optimizer, lr)``.
    All ranks of ``group`` do the same.

    A parameter that no rank used in the step ends with ``grad = None``, so that the optimizer leaves it alone; one that
    some ranks used gets the sum of theirs.
    """

    def __init__(self, model: nn.Module, group: Group, options: AllReduceOptions, compute: nn.Module | None = None):
        self._group = group
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        computing = [p for p in (compute or model).parameters() if p.requires_grad]
        self._wire = make_wire(options.wire, group)
        self._is_copy = computing[0] is not self._parameters[0]
        self._buckets = _fill_buckets(self._parameters, int(options.bucket_mib * (1 << 20)))
        self._bucket_of = {number: bucket for bucket in self._buckets for number, _ in bucket.members}
        self._device = self._parameters[0].device
        self._used = torch.zeros(len(self._parameters), dtype=torch.bool)
        self._sent: set[int] = set()
        self._is_last = False
        # |gradient|^2 of a part of the batch and its targets: of this rank's share, or alone, of its first microbatch.
        self._part_square = torch.zeros((), dtype=torch.float64, device=self._device)
        self._part_weight = 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._hook(number)) for number, p in enumerate(computing)]

    def start(self) -> None:
        """Empty the gradients for a new step (local)."""
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.missing, bucket.pending = len(bucket.members), None
            for (_, parameter), view in zip(bucket.members, bucket.views, strict=True):
                parameter.grad = view
        self._used.zero_()
        self._sent.clear()
        self._is_last = False
        self._part_square.zero_()
        self._part_weight = 0

    def part(self, weight: int) -> None:
        """The gradients so far are those of ``weight`` targets, and more will come (local)."""
        if self._group.size == 1:  # otherwise the ranks' shares are the parts
            self._part_weight = weight
            for bucket in self._buckets:
                self._part_square += torch.dot(bucket.flat, bucket.flat)

    def last(self) -> None:
        """From now on gradients are complete as they come: the next backward sends them (local)."""
        self._is_last = True

    def finish(
        self,
        loss_sum: torch.Tensor,
        weight: int,
        max_norm: float,
        loss_scale: torch.Tensor | None = None,
        flags: int = 0,
    ) -> StepSums:
        """Wait for the sums; leave in each ``grad`` the global mean gradient, clipped to ``max_norm`` (0: not).

        loss_sum: scalar, this rank's sum of losses over its microbatches; weight: its number of targets.
        loss_scale: scalar that the gradients, not ``loss_sum``, were multiplied by. flags: see StepSums.
        """
        for bucket in self._buckets:  # those that backward did not fill: somebody else may have
            if bucket.pending is None:
                self._send(bucket)
        sums = torch.zeros(6 + len(self._used), dtype=torch.float64, device=self._device)
        sums[0], sums[1], sums[5] = loss_sum.double(), weight, flags
        part_weight = weight if self._group.size > 1 else self._part_weight
        if part_weight:
            sums[2] = self._part_square / part_weight**2
            sums[3], sums[4] = 1 / part_weight, 1
        sums[6:] = self._used
        self._group.all_reduce_sum(sums, "hvdtrain.sums")
        for bucket in self._buckets:
            bucket.pending.wait()
        self._drop_unused(sums[6:])
        norms = torch._foreach_norm([bucket.flat for bucket in self._buckets])
        divisor = sums[1] if loss_scale is None else sums[1] * loss_scale
        grad_norm = torch.linalg.vector_norm(torch.stack(norms).double()) / divisor
        scale = 1.0 / divisor
        if max_norm > 0:
            scale = scale * torch.clamp(max_norm / (grad_norm + 1e-6), max=1.0)
        torch._foreach_mul_([bucket.flat for bucket in self._buckets], scale.to(self._buckets[0].flat.dtype))
        part_square = sums[2] / sums[4] if loss_scale is None else sums[2] / sums[4] / loss_scale.double() ** 2
        part_inverse = sums[3] / sums[4]
        return StepSums(sums[0] / sums[1], sums[1], grad_norm, None, part_square, part_inverse, sums[5])

    def step(self, optimizer: torch.optim.Optimizer, lr: float | torch.Tensor) -> None:
        """Apply the gradient (local: every rank does the same)."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        bucket = self._bucket_of[number]
        view = next(view for (n, _), view in zip(bucket.members, bucket.views, strict=True) if n == number)

        def gradient_is_there(parameter: torch.Tensor) -> None:
            self._used[number] = True
            if self._is_copy:  # its gradient is in few bits: added up in fp32
                view.add_(parameter.grad)
                parameter.grad = None
            if self._is_last:
                if number in self._sent:  # what comes now would be lost: the sum may be under way
                    raise RuntimeError(
                        "a gradient arrived twice in one backward (reentrant checkpointing of a shared layer?); "
                        "checkpoint with use_reentrant=False"
                    )
                self._sent.add(number)
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._send(bucket)

        return gradient_is_there

    def _send(self, bucket: _Bucket) -> None:
        for (_, parameter), view in zip(bucket.members, bucket.views, strict=True):
            if parameter.grad is not view:  # autograd put another tensor there
                view.copy_(parameter.grad) if parameter.grad is not None else view.zero_()
                parameter.grad = view
        if self._group.size > 1:
            self._part_square += torch.dot(bucket.flat, bucket.flat)
        bucket.pending = self._wire.start(bucket.flat, bucket.name)

    def _drop_unused(self, users: torch.Tensor) -> None:
        if self._used.all():  # no need to ask the device: what this rank used, somebody used
            return
        for number in (users == 0).nonzero().flatten().tolist():
            self._parameters[number].grad = None


def _fill_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Cut the parameters, last first, into runs of at most ``bucket_bytes`` (a larger parameter has its own)."""
    runs: list[list[tuple[int, nn.Parameter]]] = []
    size = 0
    for number in reversed(range(len(parameters))):
        parameter = parameters[number]
        bytes_ = parameter.numel() * parameter.element_size()
        fits = runs and size + bytes_ <= bucket_bytes and runs[-1][0][1].dtype == parameter.dtype
        if fits:
            runs[-1].append((number, parameter))
            size += bytes_
        else:
            runs.append([(number, parameter)])
            size = bytes_
    return [_Bucket(number, run) for number, run in enumerate(runs)]
