"""A two-byte wire over nodes of several ranks, here threads: within its bound, the same bits, the bytes it saves."""

import pytest
import torch
from threads import ThreadGroup, on_ranks

from hvdtrain.comm.group import Nodes, neighbours
from hvdtrain.sync.wire import make_wire

UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}


def on_nodes(group: ThreadGroup, ranks_per_node: int) -> ThreadGroup:
    """The group, as if its ranks stood on nodes."""
    hosts = [f"n{rank // ranks_per_node}" for rank in range(group.size)]
    sets = neighbours(range(group.size), hosts)
    assert sets is not None
    group.nodes = Nodes(*(group.split(of_kind) for of_kind in sets))
    return group


def bucket_of(rank: int, numbers: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * numbers + rank)
    return torch.randn(numbers, generator=generator) * torch.exp(2 * torch.randn(numbers, generator=generator))


@pytest.mark.parametrize("name", UNIT)
@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(4, 2), (6, 3)])
def test_sums(name: str, ranks: int, ranks_per_node: int):
    """Of every rest that a length can have; twice, as buffers are used again; in another order on each rank."""
    lengths = [1, 2, 3, 5, 8, 11, 12, 101]

    def work(group: ThreadGroup) -> list[torch.Tensor]:
        wire = make_wire(name, on_nodes(group, ranks_per_node))
        for step in range(2):
            flats = {n: bucket_of(group.rank + 10 * step, n) for n in lengths}
            order = lengths[group.rank :] + lengths[: group.rank]
            pending = [wire.start(flats[n], f"b.{n}") for n in order]
            for one in pending:
                one.wait()
                assert one.done()
        return [flats[n] for n in lengths]

    found = on_ranks(ranks, work)
    for number, length in enumerate(lengths):
        buckets = torch.stack([bucket_of(rank + 10, length) for rank in range(ranks)]).double()
        bound = (2 * UNIT[name] * (1 + UNIT[name]) + ranks * 2.0**-23) * buckets.abs().sum(0)
        if name == "fp16":
            bound = bound + 2 * 2.0**-39 * buckets.abs().sum()
        for of_rank in found:
            assert torch.equal(of_rank[number].view(torch.int32), found[0][number].view(torch.int32))
            assert ((of_rank[number].double() - buckets.sum(0)).abs() <= bound).all()


def test_only_two_byte_numbers_leave_a_node_and_each_once():
    def work(group: ThreadGroup) -> int:
        on_nodes(group, 2)
        far = group.nodes.far
        wire = make_wire("bf16", group)
        pending = wire.start(torch.ones(1 << 12), "b")
        while "b.parts" not in far.sent:
            wire.advance()
        sent = far.under_way["b.parts"]
        pending.wait()
        assert (group.sent, far.sent) == ([], ["b.parts", "b.sums"])
        assert group.nodes.near.sent == ["b.pieces", "b.handed"]
        return sent.numel() * 4

    # Half of the bucket is this rank's piece: two bytes a number, and a factor for each of two nodes.
    assert on_ranks(4, work) == [(1 << 12) // 2 * 2 + 2 * 4] * 4


@pytest.mark.parametrize("numbers", [4096, 4097])
def test_what_it_says_it_sends(numbers: int):
    """In fp32 to its node, there and back; in two bytes to the other node, of its own piece."""

    def work(group: ThreadGroup) -> float:
        return make_wire("bf16", on_nodes(group, 2)).sent_bytes(numbers)

    piece = -(-numbers // 2)
    near, far = 2 * 4 * numbers / 2, 2 * 2 * piece / 2
    assert on_ranks(4, work) == [pytest.approx(near + far, abs=16)] * 4


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_no_number_stays_none(bad: float):
    def work(group: ThreadGroup) -> torch.Tensor:
        flat = torch.ones(7)
        if group.rank == 3:
            flat[4] = bad
        make_wire("bf16", on_nodes(group, 2)).start(flat, "b").wait()
        return flat

    for found in on_ranks(4, work):
        assert torch.equal(found.isfinite(), torch.arange(7) != 4)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("aabb", ([[0, 1], [2, 3]], [[0, 2], [1, 3]])),
        ("abab", ([[0, 2], [1, 3]], [[0, 1], [2, 3]])),  # dealt round
        ("aaaa", None),
        ("abcd", None),
        ("aabbb", None),
    ],
)
def test_neighbours(hosts: str, expected: tuple | None):
    assert neighbours(range(len(hosts)), list(hosts)) == expected


def test_neighbours_among_some():
    assert neighbours([1, 2, 5, 6], list("aaaabbbb")) == ([[1, 2], [5, 6]], [[1, 5], [2, 6]])
