"""Wires over real ranks: the sum within its bound, the same bits everywhere, in whatever order buckets start."""

import hashlib
import random

import pytest
import torch

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.sync.wire import FORMS, make_wire

UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
LENGTHS = [1, 2, 3, 5, 64, 1001, 65_537, 1 << 20]


def bucket_of(rank: int, numbers: int, step: int) -> torch.Tensor:
    """Of very different magnitudes; every rank can make those of all others."""
    generator = torch.Generator().manual_seed(rank + 1000 * step + 100_000 * numbers)
    size = torch.exp(2 * torch.randn(numbers, generator=generator))
    return torch.randn(numbers, generator=generator) * size * 10.0 ** (2 * rank)


def check(group: HorovodGroup, name: str, found: torch.Tensor, step: int) -> None:
    buckets = [bucket_of(rank, len(found), step) for rank in range(group.size)]
    exact = sum(bucket.double() for bucket in buckets)
    magnitudes = sum(bucket.double().abs() for bucket in buckets)
    # fp32 is rounded at each of size - 1 sums, and so are the sums of the two others.
    bound = ((group.size + 1) * 2.0**-24 + (2 * UNIT[name] * (1 + UNIT[name]) if name != "fp32" else 0)) * magnitudes
    if name == "fp16":
        bound = bound + 2 * 2.0**-39 * sum(bucket.abs().max() for bucket in buckets)
    if group.size == 1:
        bound = torch.zeros(())  # alone: no wire
    assert ((found.double() - exact).abs() <= bound).all()


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


@pytest.mark.parametrize("by", ["messages", "collectives"])
@pytest.mark.parametrize("name", FORMS)
def test_many_buckets_in_another_order_on_each_rank(
    group: HorovodGroup, name: str, by: str, monkeypatch: pytest.MonkeyPatch
):
    """Of Open MPI's ranks messages carry the two-byte numbers; where they cannot, Horovod's collectives do."""
    assert (group._messages is None) == (group.size == 1 or group.backend == "gloo")
    if by == "collectives":
        monkeypatch.setattr(group, "_messages", None)
    wire = make_wire(name, group)
    own = random.Random(group.rank)
    for step in range(4):
        flats = {numbers: bucket_of(group.rank, numbers, step) for numbers in LENGTHS}
        pending = {numbers: wire.start(flats[numbers], f"many.{name}.{numbers}") for numbers in own.sample(LENGTHS, 8)}
        for numbers in LENGTHS if step % 2 else own.sample(LENGTHS, 8):
            pending[numbers].wait()
            assert pending[numbers].done()
        for flat in flats.values():
            check(group, name, flat, step)
        mine = digest(list(flats.values()))
        assert group.all_gather_object(mine) == [mine] * group.size


@pytest.mark.parametrize("name", FORMS)
def test_waiting_in_turn_does_not_need_what_others_start_later(group: HorovodGroup, name: str):
    """Rank 0 has both buckets under way when it waits for the second; the others start the first only after that."""
    wire = make_wire(name, group)
    first, second = bucket_of(group.rank, 1000, 0), bucket_of(group.rank, 2000, 0)
    early = wire.start(first, f"late.{name}.1") if group.rank == 0 else None
    wire.start(second, f"late.{name}.2").wait()
    (early or wire.start(first, f"late.{name}.1")).wait()
    check(group, name, first, 0)
    check(group, name, second, 0)


@pytest.mark.parametrize("name", FORMS)
def test_sixteen_mebibytes(group: HorovodGroup, name: str):
    flat = bucket_of(group.rank, 4 << 20, 0)
    make_wire(name, group).start(flat, f"large.{name}").wait()
    check(group, name, flat, 0)


def test_fp16_does_not_overflow(group: HorovodGroup):
    flat = torch.full((5,), 40000.0)
    make_wire("fp16", group).start(flat, "overflow").wait()
    assert flat.tolist() == [40000.0 * group.size] * 5


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_no_number_on_one_rank_is_none_on_all(group: HorovodGroup, name: str, bad: float):
    flat = torch.ones(9)
    if group.rank == group.size - 1:
        flat[4] = bad
    make_wire(name, group).start(flat, f"bad.{name}").wait()
    assert torch.equal(flat.isfinite(), torch.arange(9) != 4)
    mine = digest([flat])
    assert group.all_gather_object(mine) == [mine] * group.size


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_start_does_not_wait_for_others(group: HorovodGroup, name: str):
    """Rank 0 starts three buckets before anyone else starts one: or it would never come to the barrier."""
    wire = make_wire(name, group)
    flats = [torch.ones(1000) for _ in range(3)]
    pending = []
    if group.rank == 0:
        pending = [wire.start(flat, f"ahead.{name}.{number}") for number, flat in enumerate(flats)]
    group.barrier()
    if group.rank > 0:
        pending = [wire.start(flat, f"ahead.{name}.{number}") for number, flat in enumerate(flats)]
    for one in reversed(pending):
        one.wait()
    assert all(torch.equal(flat, torch.full((1000,), float(group.size))) for flat in flats)
