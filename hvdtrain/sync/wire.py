"""In which form gradients travel: what an all-reduce of a bucket sends, and what it rounds.

wire    bytes a number   significant bits   smallest number that survives     rounded
fp32    4                24                 -                                 as fp32 sums are
bf16    2                8                  as in fp32                        once by its rank, once as a sum
fp16    2                11                 2^-39 of its bucket's largest     the same

A number of two bytes cannot be summed on the way: fp16 sums overflow above 65,504 and are rounded at every hop, and
Horovod 0.28 sums no bf16 at all. So the ranks exchange two-byte numbers and add them up in fp32, each for its own part
of the bucket, then hand the sums round:

    flat, fp32      [ part 0 | part 1 | part 2 ]        on each of 3 ranks
    rounded, sent     to 0     to 1     to 2            all-to-all
    summed, fp32    rank 0   rank 1   rank 2            each its part, in the order of the ranks
    rounded, sent   [ part 0 | part 1 | part 2 ]        all-gather: the same bits on all ranks, the adder's own too

That moves half the bytes of a ring all-reduce of fp32, and two roundings happen, whatever the number of ranks: for
unit roundoff u (2^-8 bf16, 2^-11 fp16) the error is at most 2u (1 + u) times the sum of the magnitudes. A ring of
two-byte numbers would send as many bytes, and round at each of its hops. Where nodes have several ranks, see
over_nodes.py.

fp16 holds 2^-24 .. 65,504. Before it is rounded, a rank's bucket (then: its part of the sum) is multiplied by the power
of two that takes its largest magnitude to 2^14 .. 2^15; that power travels behind the numbers, so that the ranks need
not agree on one first, and nothing overflows or has to be guessed from earlier steps. inf and nan stay what they are.

The parts travel as int32, two numbers in each: NCCL knows neither bf16 nor int16 in an all-gather.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from hvdtrain.comm.group import Group, Rows
from hvdtrain.comm.ranks import Pending
from hvdtrain.sync.flights import Flights
from hvdtrain.sync.over_nodes import OverNodes
from hvdtrain.sync.traffic import of_all_reduce

# p ranks, c numbers of a part, w words (int32) of a part on the wire: c/2 of numbers, then 1 of the factor


class Wire(Protocol):
    """``start(flat, name)`` begins to sum ``flat`` (contiguous, one dimension, fp32) over all ranks and does not block;
    ``wait()`` of what it returns leaves the sum in ``flat``, the same bits on all ranks.

    Until then ``flat`` belongs to the wire. Ranks may start buckets in any order, each name once until it was waited
    for; a name keeps its length.
    """

    def start(self, flat: torch.Tensor, name: str) -> Pending: ...

    def sent_bytes(self, numbers: int) -> float:
        """By this rank, of a bucket of so many."""


@dataclass(frozen=True)
class Form:
    """What numbers look like on the wire; ``scaled``: multiplied by a power of two before they are rounded."""

    dtype: torch.dtype
    scaled: bool


WireName = Literal["fp32", "bf16", "fp16"]
FORMS: dict[WireName, Form | None] = {
    "fp32": None,
    "bf16": Form(torch.bfloat16, scaled=False),
    "fp16": Form(torch.float16, scaled=True),
}


def make_wire(name: WireName, group: Group) -> Wire:
    """The wire of a name in FORMS. A process alone has none: nothing is rounded, whatever the name."""
    form = FORMS[name]
    if form is None or group.size == 1:
        return _Plain(group)
    if (nodes := group.nodes) is not None:
        return OverNodes(nodes.near, _TwoPhases(nodes.far, form))
    return _TwoPhases(group, form)


class _Plain:
    def __init__(self, group: Group):
        self._group = group

    def start(self, flat: torch.Tensor, name: str) -> Pending:
        return self._group.all_reduce_sum_async(flat, name)

    def sent_bytes(self, numbers: int) -> float:
        return of_all_reduce(4 * numbers, self._group.size)


class _TwoPhases(Flights["_Exchange"]):
    def __init__(self, group: Rows, form: Form):
        super().__init__()
        self._group, self._form = group, form
        self._work = torch.empty(0)

    def sent_bytes(self, numbers: int) -> float:
        return of_all_reduce(self._form.dtype.itemsize * numbers, self._group.size)

    def _make(self, flat: torch.Tensor, name: str) -> "_Exchange":
        return _Exchange(self._group, self._form, flat, name)

    def _depart(self, exchange: "_Exchange", flat: torch.Tensor) -> None:
        exchange.send_parts(flat)

    def _go_on(self, exchange: "_Exchange") -> bool:
        if exchange.is_summed:
            exchange.read_sums()
            return True
        exchange.send_sum(self._room(exchange))
        return False

    def _room(self, exchange: "_Exchange") -> torch.Tensor:
        """[p + 1, c] fp32 to add up in: one for all buckets, as large as the largest needs."""
        (ranks, part), device = exchange.parts.shape, exchange.parts.device
        if self._work.numel() < (ranks + 1) * part or self._work.device != device:
            self._work = torch.empty((ranks + 1) * part, device=device)
        return self._work[: (ranks + 1) * part].view(ranks + 1, part)


class _Exchange:
    """One bucket's way over the wire, and its buffers, kept from step to step: 4 bytes for each of its numbers."""

    def __init__(self, group: Rows, form: Form, flat: torch.Tensor, name: str):
        self._group, self._scaled, self._name = group, form.scaled, name
        part = -(-flat.numel() // (2 * group.size)) * 2  # even: two numbers a word
        self._full_parts, self._rest = divmod(flat.numel(), part)
        # What lies beyond the bucket's end stays 0.
        self._out_pw = torch.zeros(group.size, part // 2 + 1, dtype=torch.int32, device=flat.device)
        self._in_pw = torch.zeros_like(self._out_pw)
        self._sum_1w = torch.zeros_like(self._out_pw[:1])
        self.parts, self._out_scales = open_words(self._out_pw, form.dtype)
        self._arrived, self._arrived_scales = open_words(self._in_pw, form.dtype)
        self._sum, self._sum_scale = open_words(self._sum_1w, form.dtype)
        self.pending: Pending
        self.is_summed = False

    def send_parts(self, flat: torch.Tensor) -> None:
        self._flat, self.is_summed = flat, False
        if self._scaled:
            self._out_scales.copy_(scaled(flat))
        for mine, parts in self._pairs(self.parts):
            parts.copy_(mine)
        self.pending = self._group.all_to_all_async(self._out_pw, self._in_pw, f"{self._name}.parts")

    def send_sum(self, room: torch.Tensor) -> None:
        """All ranks' numbers of this rank's part are here: add them up, in ``room`` [p + 1, c]."""
        numbers_pc, sum_c = room[:-1], room[-1]
        numbers_pc.copy_(self._arrived)
        if self._scaled:
            numbers_pc.mul_(self._arrived_scales)
        torch.sum(numbers_pc, dim=0, out=sum_c)
        if self._scaled:
            self._sum_scale.copy_(scaled(sum_c))
        self._sum[0].copy_(sum_c)
        self.pending = self._group.all_gather_async(self._sum_1w, self._in_pw, f"{self._name}.sums")
        self.is_summed = True

    def read_sums(self) -> None:
        for mine, sums in self._pairs(self._arrived):
            mine.copy_(sums)
        if self._scaled:
            for mine, scales in self._pairs(self._arrived_scales):
                mine.mul_(scales)

    def _pairs(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of the bucket beside the rows [p, c] that belong to them: the full parts, then the one that is not."""
        full, part = self._full_parts, self.parts.shape[1]
        if full:
            yield self._flat[: full * part].view(full, part), rows[:full]
        if self._rest:
            yield self._flat[full * part :], rows[full, : self._rest]


def open_words(words_pw: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of words: the numbers [p, c], and the fp32 factors [p, 1] that lead back to their true size."""
    return words_pw[:, :-1].view(dtype), words_pw[:, -1:].view(torch.float32)


def scaled(values: torch.Tensor) -> torch.Tensor:
    """Multiply ``values`` (fp32, in place) by the power of two that takes their largest magnitude to 2^14 .. 2^15.

    Returns the power that undoes it, a scalar. Both are made of exponent bits, exactly, and the device is not asked.
    Where values are subnormal throughout, the factor is 2^126; where one is inf or nan, 2^-114, and none becomes inf.
    """
    low, high = torch.aminmax(values)  # on CPUs a tenth of the time of a norm
    largest = torch.maximum(-low, high)
    exponent = (largest.view(torch.int32) >> 23) & 0xFF  # largest is 2^(exponent - 127) or up to twice that
    up = (268 - exponent).clamp(max=253)
    values.mul_((up << 23).view(torch.float32))
    return ((254 - up) << 23).view(torch.float32)
