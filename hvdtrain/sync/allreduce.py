"""Synchronous data parallelism: sum the gradients of all replicas while backward still runs.

Gradients live in flat buckets, filled in the order in which backward makes them (last layer first). A bucket whose
gradients are all there starts its ring all-reduce at once:

    backward    [layer 4][layer 3][layer 2][layer 1]
    all-reduce           [bucket 0 ------][bucket 1 -----][bucket 2 -----]
    finish                                                                [sums of loss, targets, flags]
    step                                                                  [divide, clip, optimizer]

Under accumulation the buckets gather the microbatches' sums, and only the last microbatch sends them.

Of a replica that is cut over ranks each piece is summed over the ranks that hold it (see ``Slice``), and on GPUs the
buckets wait until the last backward is over.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from hvdtrain.comm.mesh import Mesh, sum_over_replica
from hvdtrain.optim.lars import Norms, whole_norms
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.optim.update import Agreed, Gradient, Summed, Update
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Bucket, Buckets, make_runs
from hvdtrain.sync.needs import Needs, Trained, bucket_of
from hvdtrain.sync.norms import SpreadNorms
from hvdtrain.sync.sums import Sums
from hvdtrain.sync.sync import EXACT, Drift, Told
from hvdtrain.sync.traffic import mib
from hvdtrain.sync.wire import FORMS, WireName, make_wire


class AllReduceOptions(Options):
    bucket_mib: float = option(0.0, "gradients sent as one all-reduce (MiB); 0: 1/32 of them, 2 to 16 MiB", ge=0)
    wire: WireName = option(
        "fp32", "numbers in which gradients travel between ranks; the two-byte ones are for slow links"
    )
    topology: Literal["flat", "hierarchical", "torus"] = option(
        "flat",
        "how Horovod's NCCL goes round on several nodes: flat: one ring of all ranks; hierarchical: within nodes, and "
        "between them; torus: the same, each GPU of a node with those of its number",
    )
    combine: Literal["sum", "adasum"] = option(
        "sum",
        "what becomes of the ranks' gradients; adasum: their mean where they agree, their sum where they have nothing "
        "in common (over MPI, 2^n ranks); no one process's gradient",
    )

    def problems(self, replicas: int, backend: str | None) -> list[str]:
        """What does not fit so many replicas whose gradients travel over ``backend``; None: over any."""
        found = []
        if self.topology != "flat" and backend not in ("nccl", None):
            carrier = "nothing: there is one rank" if backend == "none" else backend
            found.append(
                f"sync.allreduce.topology={self.topology}: Horovod has it over NCCL alone, and gradients travel over "
                f"{carrier} here; set sync.allreduce.topology=flat"
            )
        if self.combine == "adasum" and replicas & (replicas - 1):
            below = 1 << (replicas.bit_length() - 1)
            found.append(
                f"sync.allreduce.combine=adasum combines ranks two by two, and {replicas} are no power of two; start "
                f"{below} or {2 * below} ranks, or set sync.allreduce.combine=sum"
            )
        if self.combine == "adasum" and backend in ("gloo", "nccl"):
            found.append(
                f"sync.allreduce.combine=adasum: Horovod has it over MPI, and gradients travel over {backend} here; "
                "set sync.allreduce.combine=sum"
            )
        return found


def wire_bytes(parameters: int, largest: int, ranks: int, options: AllReduceOptions) -> int:
    """Buffers of a two-byte wire (sync/wire.py): two numbers of 2 bytes for each parameter, and room for the
    ranks' fp32 numbers of the largest bucket's part and their sum. ``largest``: parameters in the largest tensor.
    """
    form = FORMS[options.wire]
    if ranks == 1 or form is None:
        return 0
    bucket = bucket_of(parameters, largest, options.bucket_mib)
    return 2 * form.dtype.itemsize * parameters + 4 * (ranks + 1) * -(-bucket // ranks)


def sent_bytes(parameters: int, ranks: int, options: AllReduceOptions) -> int:
    """By one rank in one step: a ring all-reduce of n bytes sends 2 (ranks - 1) / ranks * n of them, and so do the
    all-to-all and the all-gather of a two-byte wire together.
    """
    form = FORMS[options.wire]
    return 2 * (ranks - 1) * parameters * (4 if form is None else form.dtype.itemsize) // ranks


def needs_of_allreduce(options: AllReduceOptions, trained: Trained) -> Needs:
    holders = {trained.ranks: trained.count} if trained.holders is None else trained.holders
    return Needs(
        gradients=4 * trained.count,
        moved=trained.count,
        buffers=wire_bytes(trained.count, trained.largest, trained.ranks, options),
        sent=sum(sent_bytes(count, ranks, options) for ranks, count in holders.items()),
    )


class AllReduceSync:
    """Replicas are equal after every step: each applies the same global gradient. See ``Sync``.

    slices: of the model, those that are not trained among them; computing, uses, holds: see ``Buckets``.

    A parameter that no rank used in the step ends with ``grad = None``, so that the optimizer leaves it alone; one that
    some ranks used gets the sum of theirs.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: AllReduceOptions,
        uses: Sequence[int] | None = None,
        holds: bool = False,
    ):
        trained = [number for number, piece in enumerate(slices) if piece.tensor.requires_grad]
        self.moves: Sequence[Slice] = [slices[number] for number in trained]
        self.drift = EXACT if options.wire == "fp32" else Drift(False, f"two roundings to {options.wire} a step")
        self.notes: list[str] = []
        self._mesh, device = mesh, self.moves[0].tensor.device
        holders = dict.fromkeys(piece.holders for piece in self.moves)
        self._wires = {group: make_wire(options.wire, group) for group in holders}
        self.norms: Norms = whole_norms
        if mesh.tensor.size > 1:
            self.norms = SpreadNorms(self.moves, mesh.own, mesh.own.sum, device)
        self._sums = Sums(mesh, self.moves)
        self._parts = PartNorms(mesh.replicas, device, mesh.speaks)
        self._buckets = Buckets(
            self.moves,
            [computing[number] for number in trained],
            make_runs(self.moves, int(options.bucket_mib * (1 << 20))),
            self._send,
            self._after_first_pass,
            uses and [uses[number] for number in trained],
            holds=holds or (mesh.own.size > 1 and device.type == "cuda"),
        )
        self._summed: Summed | None = None

    def begin(self, passes: int) -> None:
        self._buckets.begin(passes)
        self._parts.begin()

    def finish(self, told: Told) -> None:
        self._buckets.send_rest()
        totals = self._sums.over_ranks(told, self._parts, self._buckets.used, self._buckets.is_complete)
        for bucket in self._buckets.all:
            bucket.wait()
        self._buckets.drop_unused(totals.users)
        replicas = self._mesh.replicas
        gradients = [
            Gradient(bucket.flat, bucket.run.copies, bucket.run.is_one_piece(replicas)) for bucket in self._buckets.all
        ]
        over_ranks = sum_over_replica(self._mesh)
        self._summed = Summed(gradients, totals.loss, totals.weight, totals.flags, totals.parts, over_ranks)

    def step(self, update: Update, lr: float) -> Agreed:
        assert self._summed is not None, "finish comes first"
        agreed = update.divide(self._summed)
        update.apply(lr)
        return agreed

    def settle(self, update: Update) -> None:
        """They are one after every step."""

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        return {}

    def viewed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hand_on(self) -> None:
        """These are the same tensors."""

    def state(self) -> Sequence[Slice]:
        return ()

    def report(self) -> Mapping[str, float]:
        sent = 0.0
        for bucket in self._buckets.all:
            sent += self._wires[bucket.run.holders].sent_bytes(bucket.flat.numel())
        return {"sent_mib": mib(sent)}

    def close(self) -> None:
        self._buckets.close()

    def _send(self, bucket: Bucket) -> None:
        if bucket.run.is_one_piece(self._mesh.replicas):
            self._parts.as_it_leaves(bucket.flat, bucket.run.copies)
        bucket.pending = self._wires[bucket.run.holders].start(bucket.flat, bucket.run.name)

    def _after_first_pass(self, bucket: Bucket) -> None:
        if bucket.run.is_one_piece(self._mesh.replicas):
            self._parts.after_first_pass(bucket.flat, bucket.run.copies)
