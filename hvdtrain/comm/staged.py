"""Tensors of a GPU that go through the host's memory, because the way that carries them knows only that.

That is so where several ranks use one GPU, which NCCL refuses, and where there is no NCCL.
"""

from typing import Any

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.ranks import Pending


class FromHost:
    """Something under way into ``on_host``, which goes to ``result``, on a GPU, in the end."""

    def __init__(self, pending: Pending, on_host: torch.Tensor, result: torch.Tensor):
        self._pending, self._on_host, self._result = pending, on_host, result

    def done(self) -> bool:
        return self._pending.done()

    def wait(self) -> None:
        self._pending.wait()
        self._result.copy_(self._on_host)


class StagedAxis(Axis):
    """``axis``, which carries tensors of the host, for those of a GPU. note: why."""

    def __init__(self, axis: Axis, note: str):
        self._axis, self.note = axis, "; ".join(filter(None, (note, axis.note)))
        self.rank, self.size, self.backend = axis.rank, axis.size, f"{axis.backend} through the host"

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self._axis.sum(tensor.cpu()))

    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        return self._axis.gather(part.cpu(), dim).to(part.device)

    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return self._axis.scatter_sum(tensor.cpu(), dim).to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        return tensor.copy_(self._axis.broadcast(tensor.cpu(), root))

    def send(self, tensor: torch.Tensor, to: int) -> Pending:
        return self._axis.send(tensor.cpu(), to)

    def receive(self, tensor: torch.Tensor, source: int) -> Pending:
        on_host = torch.empty_like(tensor, device="cpu")
        return FromHost(self._axis.receive(on_host, source), on_host, tensor)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._axis.all_gather_object(value)

    def close(self) -> None:
        self._axis.close()
