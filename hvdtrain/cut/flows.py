"""Flows of tensors between the ranks of a pipeline, over an axis that carries one tensor at a time.

    send(flow, to)                      a copy leaves; nobody waits
    receive(layout, source)             room is made, before the flow comes
    receive(None, source)               of a flow whose layout is not known yet: it goes ahead, as a tensor of its own

Rows and lengths differ from batch to batch, so layouts do; which flows have theirs ahead, both sides must know.
"""

from collections import deque
from typing import NamedTuple

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.ranks import Pending
from hvdtrain.models.pieces import Flow

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADER = 16  # numbers: tensors; of each its type, its dims and their lengths


class Layout(NamedTuple):
    """Of a flow's tensors: shapes and types."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, flow: Flow) -> "Layout":
        return cls(tuple(tensor.shape for tensor in flow), tuple(tensor.dtype for tensor in flow))


class Incoming:
    """A flow under way to this rank."""

    def __init__(self, layout: Layout, flow: Flow, pending: list[Pending]):
        self.layout, self._flow, self._pending = layout, flow, pending

    def wait(self) -> Flow:
        for one in self._pending:
            one.wait()
        return self._flow


class Flows:
    """What this rank sends and receives; tensors lie on ``device``."""

    def __init__(self, pipe: Axis, device: torch.device):
        self._pipe, self._device = pipe, device
        self._leaving: deque[tuple[Pending, torch.Tensor]] = deque()  # with what must stay as it is until then

    def send(self, flow: Flow, to: int, with_layout: bool) -> None:
        """Start to send; the tensors must not be changed any more."""
        while self._leaving and self._leaving[0][0].done():
            self.settle(len(self._leaving) - 1)
        header = [_header(Layout.of(flow)).to(self._device)] if with_layout else []
        for tensor in (*header, *flow):
            tensor = tensor.detach().contiguous()
            self._leaving.append((self._pipe.send(tensor, to), tensor))

    def receive(self, layout: Layout | None, source: int) -> Incoming:
        """Start to receive; without a ``layout`` wait for the one that goes ahead."""
        if layout is None:
            header = torch.empty(_HEADER, dtype=torch.int64, device=self._device)
            self._pipe.receive(header, source).wait()
            layout = _layout(header.tolist())
        flow = tuple(
            torch.empty(shape, dtype=dtype, device=self._device)
            for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
        )
        return Incoming(layout, flow, [self._pipe.receive(tensor, source) for tensor in flow])

    def hand_out(self, tensor: torch.Tensor | None, root: int) -> torch.Tensor:
        """Rank ``root``'s, on all ranks (collective)."""
        header = torch.zeros(_HEADER, dtype=torch.int64, device=self._device)
        if tensor is not None:
            header.copy_(_header(Layout.of((tensor,))))
        (shape,), (dtype,) = _layout(self._pipe.broadcast(header, root).tolist())
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._pipe.broadcast(tensor := tensor.contiguous(), root)
        self.settle()  # whoever is here has taken what was sent
        return tensor

    def settle(self, most: int = 0) -> None:
        """Wait until at most so many of the tensors that were sent are still under way."""
        while len(self._leaving) > most:
            pending, _ = self._leaving.popleft()
            pending.wait()


def _header(layout: Layout) -> torch.Tensor:
    numbers = [len(layout.shapes)]
    for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
        numbers += [_DTYPES.index(dtype), len(shape), *shape]
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)))


def _layout(numbers: list[int]) -> Layout:
    count, *rest = numbers
    shapes, dtypes = [], []
    for _ in range(count):
        dtype, dims, *rest = rest
        shapes.append(torch.Size(rest[:dims]))
        dtypes.append(_DTYPES[dtype])
        rest = rest[dims:]
    return Layout(tuple(shapes), tuple(dtypes))
