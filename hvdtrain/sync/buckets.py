"""Gradients as neighbours in flat buffers, filled in the order in which backward makes them (last layer first).

backward    [layer 4][layer 3][layer 2][layer 1]        the last of a step's passes
buckets     [bucket 0       ][bucket 1         ]        each leaves when all of its gradients are there

Of a replica that is cut over ranks, tensors may be held by several of them: a tied embedding by the first and the last
stage of a pipeline. A bucket is of tensors that the same ranks hold, and only these sum it up.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.ranks import Pending
from hvdtrain.slices import Slice


class Bucket:
    """Some parameters' gradients side by side. members: (number of the parameter, parameter).

    name: the same on all ``holders``. copies: see ``Slice``.
    """

    def __init__(self, name: str, members: list[tuple[int, torch.Tensor]], holders: Group, copies: int):
        self.name, self.members, self.holders, self.copies = name, members, holders, copies
        first = members[0][1]
        sizes = [parameter.numel() for _, parameter in members]
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        pieces = zip(self.flat.split(sizes), members, strict=True)
        self.views = [piece.view_as(parameter) for piece, (_, parameter) in pieces]
        self.pending: Pending | None = None  # its sum, once it has left
        self.missing = self.after_first = 0  # gradients until it leaves, and until the first pass has filled it

    def wait(self) -> None:
        """Until ``flat`` holds the sum."""
        assert self.pending is not None, "it has not left"
        self.pending.wait()


class Buckets:
    """The gradients of ``slices``, whose tensors get views of the buckets as their ``grad``.

    computing: for each slice the parameter that backward gives a gradient: its own tensor, or one of fewer bits.
    send: called with each bucket when the last of its gradients is there; observe: when the first pass of several has
    filled it. uses: how many gradients a pass gives each slice (None: one). One step: ``begin(passes)``, a backward for
    each pass, ``send_rest()``.

    holds: buckets leave in ``send_rest`` alone. A cut of NCCL's needs that: its collectives and the buckets' must not
    be under way together, because the ranks may start them in different orders.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        bucket_bytes: int,
        send: Callable[[Bucket], None],
        observe: Callable[[Bucket], None],
        uses: Sequence[int] | None = None,
        holds: bool = False,
    ):
        self._send, self._observe, self._holds = send, observe, holds
        self._uses = uses or [1] * len(slices)
        self._parameters = [piece.tensor for piece in slices]
        self._is_copy = computing[0] is not self._parameters[0]
        self.all = fill_buckets(slices, bucket_bytes)
        places = {number: (bucket, view) for bucket in self.all for (number, _), view in _pairs(bucket)}
        self._passes = 0
        self._is_mixed = False
        self._seen = [0] * len(slices)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(number, *places[number]))
            for number, parameter in enumerate(computing)
        ]

    def begin(self, passes: int) -> None:
        """Empty the gradients for a step of ``passes`` backwards (local)."""
        for bucket in self.all:
            bucket.flat.zero_()
            bucket.after_first = sum(self._uses[number] for number, _ in bucket.members)
            bucket.missing, bucket.pending = bucket.after_first * passes, None
            for (_, parameter), view in _pairs(bucket):
                parameter.grad = view
        self._passes, self._is_mixed = passes, False
        self._seen = [0] * len(self._seen)

    def send_rest(self) -> None:
        """Send the buckets that backward has not filled: another rank may have."""
        for bucket in self.all:
            if bucket.pending is None:
                self._leave(bucket)

    @property
    def used(self) -> torch.Tensor:
        """Of each parameter: has it had a gradient? bool, on the host."""
        return torch.tensor([seen > 0 for seen in self._seen])

    @property
    def is_complete(self) -> bool:
        """Has every pass given every parameter a gradient, and was what ``observe`` saw the first one's alone?"""
        due = all(seen == self._passes * uses for seen, uses in zip(self._seen, self._uses, strict=True))
        return due and not self._is_mixed

    def drop_unused(self, users: torch.Tensor) -> None:
        """``grad = None`` where nobody had a gradient. users: ranks that used each parameter; on any device."""
        if all(self._seen):  # no need to ask the device: what this rank used, somebody used
            return
        for number in (users == 0).nonzero().flatten().tolist():
            self._parameters[number].grad = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, number: int, bucket: Bucket, view: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def gradient_is_there(parameter: torch.Tensor) -> None:
            if self._is_copy and parameter.grad is not None:  # it is in few bits: added up in fp32
                view.add_(parameter.grad)
                parameter.grad = None
            self._seen[number] += 1
            seen, uses = self._seen[number], self._uses[number]
            if seen > self._passes * uses:  # what comes now would be lost: the sum may be under way
                raise RuntimeError(
                    "a gradient arrived twice in one backward (reentrant checkpointing of a shared layer?); "
                    "checkpoint with use_reentrant=False"
                )
            if seen <= uses:
                bucket.after_first -= 1
                if bucket.after_first == 0 and self._passes > 1:
                    self._observe(bucket)
            elif bucket.after_first:  # a pipeline's stages on this rank are not all as far
                self._is_mixed = True
            bucket.missing -= 1
            if bucket.missing == 0 and not self._holds:
                self._leave(bucket)

        return gradient_is_there

    def _leave(self, bucket: Bucket) -> None:
        for (_, parameter), view in _pairs(bucket):
            if parameter.grad is not view:  # autograd put another tensor there
                view.copy_(parameter.grad) if parameter.grad is not None else view.zero_()
                parameter.grad = view
        self._send(bucket)


def fill_buckets(slices: Sequence[Slice], bucket_bytes: int) -> list[Bucket]:
    """Cut the slices, last first, into runs of at most ``bucket_bytes`` (a larger one has its own).

    A run is of one type, and of slices that the same ranks hold; it may leave out others between them. Runs are
    numbered among those of the same ranks, who hold them all: so their names agree.
    """
    runs: list[list[int]] = []
    open_runs: dict[tuple[torch.dtype, int, Group], tuple[list[int], int]] = {}
    for number in reversed(range(len(slices))):
        piece = slices[number]
        kind = piece.tensor.dtype, piece.copies, piece.holders
        run, size = open_runs.get(kind, ([], 0))
        if not run or size + piece.tensor.nbytes > bucket_bytes:
            run, size = [], 0
            runs.append(run)
        run.append(number)
        open_runs[kind] = run, size + piece.tensor.nbytes
    numbers: dict[Group, int] = {}
    buckets = []
    for run in runs:
        first = slices[run[0]]
        number = numbers[first.holders] = numbers.get(first.holders, -1) + 1
        members = [(member, slices[member].tensor) for member in run]
        buckets.append(Bucket(f"hvdtrain.gradients.{number}", members, first.holders, first.copies))
    return buckets


def _pairs(bucket: Bucket) -> Iterable[tuple[tuple[int, torch.Tensor], torch.Tensor]]:
    return zip(bucket.members, bucket.views, strict=True)
