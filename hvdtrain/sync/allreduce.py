"""Synchronous data parallelism: sum the gradients of all replicas while backward still runs.

Gradients live in flat buckets, filled in the order in which backward makes them (last layer first). A bucket whose
gradients are all there starts its ring all-reduce at once:

    backward    [layer 4][layer 3][layer 2][layer 1]
    all-reduce           [bucket 0 ------][bucket 1 -----][bucket 2 -----]
    finish                                                                [sums of loss, targets, flags]
    step                                                                  [divide, clip, optimizer]

Under accumulation the buckets gather the microbatches' sums, and only the last microbatch sends them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from hvdtrain.comm.group import Group
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.optim.update import Agreed, Gradient, Summed, Update
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Bucket, Buckets
from hvdtrain.sync.sync import EXACT, Drift, Told
from hvdtrain.sync.wire import make_wire


class AllReduceOptions(Options):
    bucket_mib: float = option(16.0, "gradients sent as one all-reduce (MiB)", gt=0)
    wire: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "numbers in which gradients travel between ranks; the two-byte ones are for slow links"
    )


_OF_PARTS = slice(3, 6)  # of the sums: see PartNorms
_OTHERS = 6  # loss, targets, flags, and those of parts


class AllReduceSync:
    """Replicas are equal after every step: each applies the same global gradient. See ``Sync``.

    slices: of the model, those that are not trained among them; computing: see ``Buckets``; group: the same place in
    every replica.

    A parameter that no rank used in the step ends with ``grad = None``, so that the optimizer leaves it alone; one that
    some ranks used gets the sum of theirs.
    """

    def __init__(
        self, slices: Sequence[Slice], computing: Sequence[torch.Tensor], group: Group, options: AllReduceOptions
    ):
        self.moves: Sequence[Slice] = [piece for piece in slices if piece.tensor.requires_grad]
        trained = [parameter for parameter in computing if parameter.requires_grad]
        self.drift = EXACT if options.wire == "fp32" else Drift(False, f"two roundings to {options.wire} a step")
        self._group, self._wire = group, make_wire(options.wire, group)
        self._device = self.moves[0].tensor.device
        self._parts = PartNorms(group.size, self._device)
        bucket_bytes = int(options.bucket_mib * (1 << 20))
        self._buckets = Buckets(self.moves, trained, bucket_bytes, self._send, self._parts.after_first_pass)
        self._summed: Summed | None = None

    def begin(self, passes: int) -> None:
        self._buckets.begin(passes)
        self._parts.begin()

    def finish(self, told: Told) -> None:
        self._buckets.send_rest()
        used = self._buckets.used
        sums = torch.zeros(_OTHERS + len(used), dtype=torch.float64, device=self._device)
        sums[0], sums[1], sums[2] = told.loss.double(), sum(told.weights), told.flags
        self._parts.tell(sums[_OF_PARTS], told.weights, self._buckets.is_complete)
        sums[_OTHERS:] = used
        self._group.all_reduce_sum(sums, "hvdtrain.sums")
        for bucket in self._buckets.all:
            bucket.wait()
        self._buckets.drop_unused(sums[_OTHERS:])
        gradients = [Gradient(bucket.flat, bucket.copies) for bucket in self._buckets.all]
        self._summed = Summed(gradients, sums[0], sums[1], sums[2], sums[_OF_PARTS])

    def step(self, update: Update, lr: float) -> Agreed:
        assert self._summed is not None, "finish comes first"
        agreed = update.divide(self._summed)
        update.apply(lr)
        return agreed

    def settle(self, update: Update) -> None:
        """They are one after every step."""

    def viewed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> Sequence[Slice]:
        return ()

    def report(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        self._buckets.close()

    def _send(self, bucket: Bucket) -> None:
        self._parts.as_it_leaves(bucket.flat)
        bucket.pending = self._wire.start(bucket.flat, bucket.name)
