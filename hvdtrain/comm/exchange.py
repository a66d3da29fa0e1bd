"""An axis whose sums are added here: the libraries carry bytes, and each rank adds what it was sent.

MPI sums in an order of its own, and mpi4py takes bf16 for integers, without a word; NCCL and Gloo round a bf16 sum
after every term. Here every type is added in the order of the ranks, 16-bit floats in fp32 and rounded once:

    small, or two ranks   everybody's whole tensor -> everybody -> added                     (size - 1) x n sent
    large                 rank i's part of each -> rank i -> added -> everybody       2 (size - 1) / size x n sent
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch

from hvdtrain.comm.axis import Axis

SMALL_BYTES = 1 << 16  # of a sum over more than two: below, a second exchange takes longer than what it saves


class ExchangeAxis(Axis):
    """An axis of ranks that can send tensors to one another; a subclass says how."""

    _scratch = torch.empty(0, dtype=torch.uint8)

    @abstractmethod
    def _all_gather(self, row: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill ``rows`` [size, ...] with each rank's ``row`` [...]."""

    @abstractmethod
    def _all_to_all(self, rows: torch.Tensor, received: torch.Tensor) -> None:
        """Send row i of ``rows`` [size, ...] to rank i; row j of ``received`` [size, ...] will be rank j's."""

    @torch.no_grad()
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        check(tensor)
        flat, size = tensor.view(-1), self.size
        if size == 2 or tensor.nbytes <= SMALL_BYTES:
            rows = self._rows(flat)
            self._all_gather(flat, rows)
            add_in_order(rows, flat)
            return tensor
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % size))
        rows = self._rows(padded[: len(padded) // size])
        self._all_to_all(padded.view(size, -1), rows)
        part = torch.empty_like(rows[0])
        add_in_order(rows, part)
        self._all_gather(part, rows)
        flat.copy_(rows.view(-1)[: len(flat)])
        return tensor

    @torch.no_grad()
    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        check(part)
        rows = part.new_empty(self.size, *part.shape)
        self._all_gather(part, rows)
        return rows.flatten(0, 1) if dim == 0 else torch.cat(rows.unbind(), dim)

    @torch.no_grad()
    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        check(tensor)
        rows = torch.stack(equal_parts(tensor, dim, self.size))
        received = self._rows(rows[0])
        self._all_to_all(rows, received)
        part = torch.empty_like(rows[0])
        add_in_order(received, part)
        return part

    def _rows(self, row: torch.Tensor) -> torch.Tensor:
        """Memory for one ``row`` from each rank, to be used before the next collective."""
        size = self.size * row.nbytes
        if self._scratch.nbytes < size or self._scratch.device != row.device:  # new memory is slow at its first use
            self._scratch = torch.empty(size, dtype=torch.uint8, device=row.device)
        return self._scratch[:size].view(row.dtype).view(self.size, *row.shape)


def check(tensor: torch.Tensor) -> None:
    """Is it what an axis takes? Errors: AssertionError."""
    assert tensor.is_contiguous(), f"an axis takes contiguous tensors, not strides {tensor.stride()}"


def equal_parts(tensor: torch.Tensor, dim: int, count: int) -> Sequence[torch.Tensor]:
    assert tensor.shape[dim] % count == 0, f"dim {dim} of {list(tensor.shape)} has no {count} equal parts"
    size = tensor.shape[dim] // count
    return [tensor.narrow(dim, number * size, size) for number in range(count)]


def add_in_order(rows: Sequence[torch.Tensor], result: torch.Tensor) -> None:
    """Put the sum of ``rows`` into ``result``, which may be one of the first two; 16-bit floats are added in fp32."""
    if result.itemsize > 2 or not result.is_floating_point() or len(rows) == 2:  # the sum of two is rounded once anyway
        torch.add(rows[0], rows[1], out=result)
        for row in rows[2:]:
            result += row
        return
    total = rows[0].float()
    for row in rows[1:]:
        total += row
    result.copy_(total)
