"""Means over ranks of tensors that are not alike there: weights that went apart, and what optimizers keep of them."""

from collections.abc import Collection, Iterator, Sequence

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.ranks import Pending

_CHUNK_BYTES = 16 << 20  # that travel as one sum


@torch.no_grad()
def put_mean(
    group: Group, tensors: Sequence[torch.Tensor], name: str, members: Collection[int] | None = None
) -> torch.Tensor:
    """Put the mean of the ranks' numbers into ``tensors``, which are of one shape and type on all ranks: the same bits
    everywhere. Collective.

    members: ranks whose numbers are averaged, for all; None: everybody's.
    Returns the square of the distance between what this rank had and the mean: fp64, on the device.
    """
    divisor = group.size if members is None else len(members)
    chunks: list[tuple[list[torch.Tensor], torch.Tensor, Pending]] = []
    for number, run in enumerate(_chunks(tensors)):
        flat = torch.cat([tensor.reshape(-1) for tensor in run])
        if members is not None and group.rank not in members:
            flat.zero_()
        chunks.append((run, flat, group.all_reduce_sum_async(flat, f"hvdtrain.{name}.{number}")))
    square = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for run, flat, pending in chunks:
        pending.wait()
        flat /= divisor  # not multiplied: counts of steps stay whole numbers
        for tensor, mean in zip(run, flat.split([tensor.numel() for tensor in run]), strict=True):
            mean = mean.view(tensor.shape)
            square += torch.linalg.vector_norm(tensor - mean).double() ** 2
            tensor.copy_(mean)
    return square


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of one type, of at most ``_CHUNK_BYTES`` (a larger tensor has its own)."""
    run: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if run and (size + tensor.nbytes > _CHUNK_BYTES or tensor.dtype != run[0].dtype):
            yield run
            run, size = [], 0
        run.append(tensor)
        size += tensor.nbytes
    if run:
        yield run
