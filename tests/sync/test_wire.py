"""Two-byte wires between ranks of this process: rounding, scale, padding, phases; and real ones by Gloo.

tests/mpi/test_wire.py has the same over MPI.
"""

import struct
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import succeed
from threads import in_process

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.sync import wire as wires
from hvdtrain.sync.wire import FORMS, Wire, make_wire

UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
NAMES = sorted(UNIT)


def wires_of(name: str, ranks: int) -> list[Wire]:
    """Each rank's wire, all driven by this thread: a ``wait`` that would block is an error."""
    return [make_wire(name, group) for group in in_process(ranks, patience_s=0)]


def summed(name: str, buckets: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each rank has after one all-reduce of its bucket, all in one thread."""
    return sent(wires_of(name, len(buckets)), buckets)


def sent(lines: list[Wire], buckets: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same over wires that may have been used before."""
    flats = [bucket.clone() for bucket in buckets]
    pending = [line.start(flat, "b") for line, flat in zip(lines, flats, strict=True)]
    for line in lines:
        line.advance()
    for one in pending:
        one.wait()
    return flats


def random_buckets(ranks: int, numbers: int, seed: int = 0, spread: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(numbers, generator=generator) * torch.exp(spread * torch.randn(numbers, generator=generator))
        for _ in range(ranks)
    ]


def check_bound(name: str, buckets: list[torch.Tensor]) -> None:
    """The bound in wire.py's head, plus what a bucket's small numbers lose under fp16; bits equal on all ranks."""
    found = summed(name, buckets)
    for other in found[1:]:
        assert torch.equal(found[0].view(torch.int32), other.view(torch.int32))
    exact = torch.stack(buckets).double().sum(0)
    magnitudes = torch.stack(buckets).double().abs().sum(0)
    unit = UNIT[name]
    bound = 2 * unit * (1 + unit) * magnitudes + len(buckets) * 2.0**-23 * magnitudes
    if name == "fp16":
        bound = bound + 2 * 2.0**-39 * sum(bucket.abs().max() for bucket in buckets)
    assert ((found[0].double() - exact).abs() <= bound + 1e-44).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("numbers", [1, 2, 3, 7, 8, 9, 100, 1001])
def test_sum_is_within_its_bound_for_every_length(name: str, ranks: int, numbers: int):
    check_bound(name, random_buckets(ranks, numbers))


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=5, max_size=5), min_size=2, max_size=5))
def test_any_finite_numbers(name: str, rows: list[list[float]]):
    check_bound(name, [torch.tensor(row) for row in rows])


@pytest.mark.parametrize("name", NAMES)
def test_small_whole_numbers_are_exact(name: str):
    buckets = [torch.arange(-20.0, 21.0) * (rank + 1) for rank in range(3)]
    assert all(torch.equal(found, torch.arange(-20.0, 21.0) * 6) for found in summed(name, buckets))


def test_two_gradients_of_40000_do_not_overflow():
    """What Horovod's own fp16 sum makes inf."""
    for found in summed("fp16", [torch.full((3,), 40000.0)] * 2):
        assert found.tolist() == [80000.0] * 3


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-7, 1.0, 1e7, 1e30, 1e38])
def test_fp16_has_the_range_of_fp32(size: float):
    """A bucket is as exact at any size: its scale goes with it."""
    check_bound("fp16", [bucket * (size / 1e4) for bucket in random_buckets(3, 50, spread=1)])


def test_fp16_keeps_what_is_small_beside_the_largest():
    for found in summed("fp16", [torch.tensor([1.0, 2.0**-38]), torch.tensor([1.0, 2.0**-38])]):
        assert found.tolist() == [2.0, 2.0**-37]


def test_ranks_of_very_different_size_do_not_spoil_one_another():
    for found in summed("fp16", [torch.tensor([1e30, 0.0]), torch.tensor([0.0, 1e-30])]):
        assert found[0].item() == pytest.approx(1e30, rel=2**-10)
        # Both lie in one part here, so the sum's own scale is that of the large one. In two parts, both survive:
    for found in summed("fp16", [torch.tensor([1e30, 0, 0, 0]), torch.tensor([0, 0, 1e-30, 0])]):
        assert found.tolist() == pytest.approx([1e30, 0, 1e-30, 0], rel=2**-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_what_is_no_number_stays_none_on_all_ranks(name: str, bad: float, place: int):
    buckets = random_buckets(3, 7, spread=1)
    buckets[1][place] = bad
    found = summed(name, buckets)
    for flat in found:
        assert torch.equal(flat.isfinite(), torch.arange(7) != place)  # and no other number becomes one that is none
        assert flat[place].isnan() if bad != bad else flat[place].item() == bad
        assert torch.equal(flat.view(torch.int32), found[0].view(torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_opposite_infinities_are_nan(name: str):
    for found in summed(name, [torch.tensor([float("inf"), 1.0]), torch.tensor([-float("inf"), 1.0])]):
        assert found[0].isnan()
        assert found[1] == 2.0 or name == "fp16"  # beside inf, fp16's small numbers may be lost


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_last_step_is_left(name: str):
    """Buffers are used again: after a step of nan, the next one is what a new wire gives."""
    lines = wires_of(name, 3)
    for seed, spoil in enumerate([None, float("nan"), None]):
        buckets = random_buckets(3, 11, seed)
        if spoil:
            for bucket in buckets:
                bucket.fill_(spoil)
        flats = sent(lines, buckets)
        expected = summed(name, buckets)
        for flat, other in zip(flats, expected, strict=True):
            assert torch.equal(flat.view(torch.int32), other.view(torch.int32))


def test_buffers_are_kept():
    lines = wires_of("fp16", 2)
    seen = []
    for _ in range(3):
        flats = [torch.ones(100), torch.ones(100)]
        pending = [line.start(flat, "b") for line, flat in zip(lines, flats, strict=True)]
        for line in lines:
            line.advance()
        for one in pending:
            one.wait()
        exchange = lines[0]._known["b"]
        tensors = (exchange._out_pw, exchange._in_pw, exchange._sum_1w, lines[0]._work)
        seen.append([tensor.data_ptr() for tensor in tensors])
    assert seen[0] == seen[1] == seen[2]


def test_the_second_phase_begins_by_itself_when_another_bucket_starts():
    """Not only when somebody waits: that would be after backward."""
    ranks = in_process(2, patience_s=0)
    lines = [make_wire("bf16", rank) for rank in ranks]
    flats = {(name, rank): torch.ones(8) for name in "abc" for rank in range(2)}
    for name in "abc":
        for rank, line in enumerate(lines):
            line.start(flats[name, rank], name)
    assert ranks[0].sent == ["a.parts", "a.sums", "b.parts", "b.sums", "c.parts"]


def test_waiting_for_one_does_not_wait_for_others_that_a_rank_has_not_started():
    """Rank 0 has started a and b, rank 1 only b: b must end without a (nothing here can block)."""
    lines = wires_of("bf16", 2)
    flats = [torch.ones(8) for _ in range(3)]
    lines[0].start(flats[0], "a")
    pending = [line.start(flat, "b") for line, flat in zip(lines, flats[1:], strict=True)]
    for line in lines:
        line.advance()
    assert [one.done() for one in pending] == [False, False]
    for one in pending:
        one.wait()
        one.wait()  # once more changes nothing
    assert [one.done() for one in pending] == [True, True]
    assert all(torch.equal(flat, torch.full((8,), 2.0)) for flat in flats[1:])
    assert torch.equal(flats[0], torch.ones(8))


def test_starting_a_name_twice_is_our_mistake():
    line, _ = wires_of("bf16", 2)
    line.start(torch.ones(4), "a")
    with pytest.raises(AssertionError, match="a is under way"):
        line.start(torch.ones(4), "a")


@pytest.mark.parametrize("name", FORMS)
def test_a_process_alone_has_no_wire(name: str):
    flat = torch.tensor([1.0 + 2.0**-20, 1e-42, 3e38])
    before = flat.clone()
    make_wire(name, LocalGroup()).start(flat, "b").wait()
    assert torch.equal(flat, before)


def test_fp32_is_the_groups_own_sum():
    groups, flats = in_process(2, patience_s=0), [torch.ones(3), torch.full((3,), 0.1)]
    pending = [make_wire("fp32", group).start(flat, "b") for group, flat in zip(groups, flats, strict=True)]
    for one in pending:
        one.wait()
    assert [group.sent for group in groups] == [["b"], ["b"]]
    assert torch.equal(flats[0], torch.full((3,), 1.0) + 0.1)
    assert torch.equal(*flats)


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        make_wire("int8", LocalGroup())


@pytest.mark.parametrize(
    ("value", "exponent"),
    [(1.0, 14), (1.999, 14), (2.0, 13), (0.0, 126), (1e-45, 126), (2.0**-126, 126), (2.0**-111, 125), (3e38, -113)],
)
def test_scale(value: float, exponent: int):
    """To 2^14 .. 2^15 by a power of two, exactly, and the way back."""
    values = torch.tensor([value, -value / 2, 0.0])
    before = values.clone()
    back = wires.scaled(values)
    assert torch.equal(values, before * 2.0**exponent) or value < 1e-37
    assert back.item() == 2.0**-exponent
    assert values.abs().max() < 2.0**15
    assert values.abs().max() >= 2.0**14 or exponent == 126
    assert torch.equal(values * back, before)


def test_words_hold_two_numbers_each():
    """[1.0, -2.0] in bf16 is 0x3F80, 0xC000; one after the other in memory."""
    group, _ = in_process(2)
    make_wire("bf16", group).start(torch.tensor([1.0, -2.0, 0.0, 0.0]), "b")
    words = group.under_way["b.parts"]
    assert words.shape == (2, 2)
    assert struct.pack("<i", words[0, 0].item()) == struct.pack("<HH", 0x3F80, 0xC000)


def test_half_the_bytes():
    group, *_ = in_process(4)
    make_wire("fp16", group).start(torch.ones(1 << 16), "b")
    sent = group.under_way["b.parts"]
    assert sent.numel() * sent.element_size() == (1 << 16) * 2 + 4 * 4


# Buckets of many lengths, on each rank in another order; all that can go wrong between real ranks, by their exit code.
_GLOO = """
import random, torch
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.world import detect_world
from hvdtrain.sync.wire import make_wire
group = HorovodGroup(detect_world())
assert group.backend == "gloo"
buckets = {n: [torch.randn(n, generator=torch.Generator().manual_seed(100 * n + r)) for r in range(2)]
           for n in (1, 2, 5, 1000, 300001)}
for form, unit in (("fp32", 2**-24), ("bf16", 2**-8), ("fp16", 2**-11)):
    wire = make_wire(form, group)
    for step in range(3):
        flats = {n: both[group.rank].clone() for n, both in buckets.items()}
        order = random.Random(10 * step + group.rank).sample(sorted(flats), len(flats))
        pending = [wire.start(flats[n], f"{form}.{n}") for n in order]
        for one in pending:
            one.wait()
        for n, (a, b) in buckets.items():
            bound = 2 * unit * (1 + unit) * (a.abs() + b.abs()).double() + (2.0**-37 if form == "fp16" else 0)
            assert ((flats[n].double() - a.double() - b.double()).abs() <= bound).all(), (form, n)
        digests = [bytes(flats[n].numpy().tobytes()) for n in (1, 2, 5, 1000)]
        assert group.all_gather_object(digests)[0] == digests
group.close()
print("all sums are right")
"""


def test_over_gloo():
    done = succeed(how="gloo", ranks=2, program=(sys.executable, "-c", _GLOO), timeout_s=120)
    assert done.text.count("all sums are right") == 2
