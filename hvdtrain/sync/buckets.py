"""Gradients as neighbours in flat buffers, filled in the order in which backward makes them (last layer first).

backward    [layer 4][layer 3][layer 2][layer 1]        the last of a step's passes
buckets     [bucket 0       ][bucket 1         ]        each leaves when all of its gradients are there

Of a replica that is cut over ranks, tensors may be held by several of them: a tied embedding by the first and the last
stage of a pipeline. A bucket is of tensors that the same ranks hold, and only these sum it up.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.ranks import Pending
from hvdtrain.slices import Slice
from hvdtrain.sync.needs import bytes_of_bucket

ALIGNED = 16  # numbers of fp32: 64 bytes, a line of a CPU's cache


@dataclass(frozen=True)
class Run:
    """Parameters whose gradients travel together. members: (number of the parameter, parameter).

    name: the same on all ``holders``. copies: see ``Slice``. offsets: where each member begins in a flat tensor of
    ``length`` numbers; where that is to be divided among the holders, members begin at multiples of ``ALIGNED``, and
    what lies between and behind them is 0.
    """

    name: str
    members: list[tuple[int, torch.Tensor]]
    offsets: list[int]
    length: int
    holders: Group
    copies: int

    def is_one_piece(self, replicas: int) -> bool:
        """Does one rank of a replica have all of its gradient? Where several have a share, as of a tied embedding, only
        their sum has a norm that says anything: it stays out of the noise scale.
        """
        return self.holders.size == replicas

    def empty(self) -> torch.Tensor:
        """A flat tensor of zeros for them."""
        first = self.members[0][1]
        return torch.zeros(self.length, dtype=first.dtype, device=first.device)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each member's place there, in its shape."""
        pairs = zip(self.offsets, self.members, strict=True)
        return [flat[at : at + parameter.numel()].view_as(parameter) for at, (_, parameter) in pairs]


class Bucket:
    """A run's gradients side by side, in ``flat``."""

    def __init__(self, run: Run):
        self.run, self.members = run, run.members
        self.flat = run.empty()
        self.views = run.views(self.flat)
        self.has_left = False
        self.pending: Pending | None = None  # its sum, where it travels by itself
        self.missing = self.after_first = 0  # gradients until it leaves, and until the first pass has filled it

    def wait(self) -> None:
        """Until ``flat`` holds the sum."""
        assert self.has_left and self.pending is not None, "it has not left"
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
        runs: Sequence[Run],
        send: Callable[[Bucket], None],
        observe: Callable[[Bucket], None],
        uses: Sequence[int] | None = None,
        holds: bool = False,
    ):
        self._send, self._observe, self._holds = send, observe, holds
        self._uses = uses or [1] * len(slices)
        self._parameters = [piece.tensor for piece in slices]
        self._is_copy = computing[0] is not self._parameters[0]
        self.all = [Bucket(run) for run in runs]
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
            bucket.missing, bucket.has_left = bucket.after_first * passes, False
            for (_, parameter), view in _pairs(bucket):
                parameter.grad = view
        self._passes, self._is_mixed = passes, False
        self._seen = [0] * len(self._seen)

    def send_rest(self) -> None:
        """Send the buckets that backward has not filled: another rank may have."""
        for bucket in self.all:
            if not bucket.has_left:
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
                raise arrived_twice()
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
        bucket.has_left = True
        self._send(bucket)


def arrived_twice() -> RuntimeError:
    """What to raise where a parameter has had all of a step's gradients, and there comes one more."""
    return RuntimeError(
        "a gradient arrived twice in one backward (reentrant checkpointing of a shared layer?); "
        "checkpoint with use_reentrant=False"
    )


def make_runs(slices: Sequence[Slice], bucket_bytes: int, in_parts: bool = False) -> list[Run]:
    """Cut the slices, last first, into runs of at most ``bucket_bytes`` (a larger one has its own; 0: see
    ``bytes_of_bucket``).

    A run is of one type, and of slices that the same ranks hold; it may leave out others between them. Runs are
    numbered among those of the same ranks, who hold them all: so their names agree. in_parts: they are to be divided
    among their holders.
    """
    found: list[list[int]] = []
    open_runs: dict[tuple[torch.dtype, int, Group], tuple[list[int], int]] = {}
    totals: Counter[tuple[torch.dtype, int, Group]] = Counter()
    for piece in slices:
        totals[piece.tensor.dtype, piece.copies, piece.holders] += piece.tensor.nbytes
    for number in reversed(range(len(slices))):
        piece = slices[number]
        kind = piece.tensor.dtype, piece.copies, piece.holders
        run, size = open_runs.get(kind, ([], 0))
        if not run or size + piece.tensor.nbytes > (bucket_bytes or bytes_of_bucket(0.0, totals[kind])):
            run, size = [], 0
            found.append(run)
        run.append(number)
        open_runs[kind] = run, size + piece.tensor.nbytes
    counts: Counter[Group] = Counter()
    runs = []
    for run in found:
        holders, unit = slices[run[0]].holders, ALIGNED if in_parts else 1
        ends = list(accumulate(_round_up(slices[number].tensor.numel(), unit) for number in run))
        runs.append(
            Run(
                f"hvdtrain.gradients.{counts[holders]}",
                [(number, slices[number].tensor) for number in run],
                [0, *ends[:-1]],
                _round_up(ends[-1], unit * holders.size if in_parts else 1),
                holders,
                slices[run[0]].copies,
            )
        )
        counts[holders] += 1
    return runs


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _pairs(bucket: Bucket) -> Iterable[tuple[tuple[int, torch.Tensor], torch.Tensor]]:
    return zip(bucket.members, bucket.views, strict=True)
