"""Does every collective that training uses give the right sums here? For ``hvdtrain doctor``, on a few ranks.

What Horovod's own test/parallel/test_torch.py covers of them: each type, sizes from one element to several buckets,
tensors that ranks start in different orders, copies from every root. And what a cut model asks of an axis.
"""

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.group import Group

_TYPES = (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64)
_SIZES = (1, 1000, (1 << 20) + 3)


def check_collectives(group: Group) -> str:
    """What was found to work, in words (collective). Errors: AssertionError naming the collective that is wrong."""
    rank, size = group.rank, group.size
    total = size * (size + 1) // 2

    for dtype in _TYPES:
        for count in _SIZES:
            summed = group.all_reduce_sum(torch.full((count,), rank + 1, dtype=dtype), f"selftest.{dtype}.{count}")
            _hold(bool((summed == total).all()), f"all-reduce of {count} {dtype}")
    tensors = {f"selftest.order.{n}": torch.full((100 + n,), float(rank + n)) for n in range(20)}
    names = sorted(tensors, reverse=bool(rank % 2))  # each rank in its own order
    for pending in [group.all_reduce_sum_async(tensors[name], name) for name in names]:
        pending.wait()
    for n, tensor in enumerate(tensors.values()):
        _hold(bool((tensor == total - size + size * n).all()), "all-reduce in different orders")

    rows = torch.arange(size, dtype=torch.int32)[:, None].repeat(1, 1000) + 100 * rank
    received = torch.zeros_like(rows)
    group.all_to_all_async(rows, received, "selftest.parts").wait()
    _hold(received[:, 0].tolist() == [100 * other + rank for other in range(size)], "all-to-all")
    group.all_gather_async(rows[:1], received, "selftest.rows").wait()
    _hold(received[:, -1].tolist() == [100 * other for other in range(size)], "all-gather")

    for root in range(size):
        copied = torch.full((1000,), float(rank))
        group.broadcast(copied, root, f"selftest.copy.{root}")
        _hold(bool((copied == root).all()), f"broadcast from rank {root}")
    # Of different types: a name of Horovod's own would be the type's, and the ranks would wait for ever.
    objects: list[object] = [None, ("größe", 1), {"a": [1.5]}]
    found = group.all_gather_object(objects[rank % 3])
    _hold(found == [objects[other % 3] for other in range(size)], "all-gather of objects")
    axis = group.axis([range(size)], torch.device("cpu"))
    check_axis(axis)
    return (
        f"all-reduce, all-to-all, all-gather, broadcast ok over {group.backend}; "
        f"sums, parts and messages of an axis ok over {axis.backend}"
    )


def check_axis(axis: Axis) -> None:
    """Errors: AssertionError naming what is wrong (collective)."""
    rank, size = axis.rank, axis.size
    for dtype in (*_TYPES, torch.bfloat16):
        for count in _SIZES:
            # Halves, whose bits are no sum where bf16 is taken for an integer, as mpi4py does.
            summed = axis.sum(torch.full((count,), rank + 0.5 * dtype.is_floating_point).to(dtype))
            right = size * (size - 1) / 2 + 0.5 * size * dtype.is_floating_point
            _hold(bool((summed == right).all()), f"an axis's sum of {count} {dtype}")
    ranks = torch.arange(size).repeat(3, 1)
    gathered = axis.gather(ranks[:, rank : rank + 1].contiguous(), 1)
    _hold(torch.equal(gathered, ranks), "an axis's gather")
    _hold(axis.scatter_sum(ranks, 1).tolist() == [[rank * size]] * 3, "an axis's scattered sum")
    for root in range(size):
        copied = axis.broadcast(torch.full((1000,), float(rank)), root)
        _hold(bool((copied == root).all()), f"an axis's broadcast from rank {root}")
    if size > 1:
        came = torch.zeros(1 << 20)
        pending = [axis.receive(came, (rank - 1) % size), axis.send(torch.full_like(came, rank), (rank + 1) % size)]
        for one in pending:
            one.wait()
        _hold(bool((came == (rank - 1) % size).all()), "an axis's message")


def _hold(is_right: bool, what: str) -> None:
    if not is_right:
        raise AssertionError(f"{what} gives wrong numbers")
