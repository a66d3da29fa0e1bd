"""What every kind of ``Ranks``, ``Group`` and ``Axis`` must do, whoever carries it: one base class for all of them.

A subclass gives the fixture ``group`` (``axis``), which all ranks have at once; each test runs on every rank, in
lockstep.

LocalGroup, threads   tests/comm/test_group.py      LocalAxis, threads   tests/comm/test_axis.py
MPI alone             tests/mpi/test_ranks.py, at 1, 2 and 4 ranks
Horovod over MPI      tests/mpi/test_group.py, at 1, 2 and 4 ranks; all ranks, and each half of them
Horovod over Gloo     the same file; tests/comm/test_group.py starts it
MPI, shared memory    tests/mpi/test_axis.py, at 1, 2 and 4 ranks; Gloo as well
"""

import random
import time
from collections.abc import Sequence
from functools import reduce
from itertools import permutations

import numpy as np
import pytest
import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.group import Group
from hvdtrain.comm.ranks import Ranks
from hvdtrain.errors import (
    EXIT_BAD_DATA,
    EXIT_CRASH,
    EXIT_IO,
    EXIT_OUT_OF_MEMORY,
    EXIT_USAGE,
    ConfigError,
    DataError,
    OutputError,
    RankError,
    describe,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int32, torch.int64]
AXIS_DTYPES = [*DTYPES, torch.bfloat16]
AXIS_SHAPES = [(0,), (1,), (), (3,), (2, 3), (1001,), (128, 257)]


class RanksContract:
    """Objects, agreement and failure."""

    def test_objects_come_in_rank_order(self, group: Ranks):
        """Of any size, and of another type on each rank: under names of the type's they would never meet."""
        own = [None, "x" * group.rank, {"rank": group.rank}, [1.5] * 1000][group.rank % 4]
        expected = [[None, "x" * rank, {"rank": rank}, [1.5] * 1000][rank % 4] for rank in range(group.size)]
        assert group.all_gather_object(own) == expected

    @pytest.mark.parametrize(
        "value",
        [
            *(None, True, -(2**70), 2.5, "漢字 \ud83d", b"\0\xff", (), (1, ("a",)), {3, 5}, {"a": [{}], 1: None}),
            *(DataError("as an object"), np.arange(5, dtype=np.int8).tolist(), np.float32(1.5), range(3), Ellipsis),
            "large " * 500_000,
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_objects_of_odd_types(self, group: Ranks, value: object):
        found = group.all_gather_object((group.rank, value))
        assert [rank for rank, _ in found] == list(range(group.size))
        assert {type(other) for _, other in found} == {type(value)}
        assert all(repr(other) == repr(value) for _, other in found)

    def test_objects_of_very_different_size(self, group: Ranks):
        text = "漢字" * (100_000 * (group.rank % 2) + group.rank)
        expected = [{"rank": rank, "text": "漢字" * (100_000 * (rank % 2) + rank)} for rank in range(group.size)]
        assert group.all_gather_object({"rank": group.rank, "text": text}) == expected

    def test_what_a_rank_got_is_its_own(self, group: Ranks):
        mine: list[int] = []
        found = group.all_gather_object(mine)
        if group.size > 1:
            found[group.rank - 1].append(1)
            group.barrier()
            assert mine == []

    def test_every_order_of_arrival_ends(self, group: Ranks):
        """Ranks come to a collective early and late in turn; none overtakes another into the next one."""
        for turn, order in enumerate(permutations(range(min(group.size, 3)))):
            if group.rank < len(order):
                time.sleep(0.005 * order[group.rank])
            assert group.all_gather_object((turn, group.rank)) == [(turn, rank) for rank in range(group.size)]

    def test_barrier(self, group: Ranks):
        time.sleep(0.05 * group.rank)
        came = time.monotonic()  # one clock for all processes of a machine
        group.barrier()
        went = time.monotonic()
        assert went >= max(group.all_gather_object(came))

    def test_together_gives_each_rank_its_own_result(self, group: Ranks):
        assert group.together(lambda: group.rank * 10) == group.rank * 10

    @pytest.mark.parametrize("place", ["first", "last"])
    def test_an_error_on_one_rank_is_raised_on_all(self, group: Ranks, place: str):
        failing = 0 if place == "first" else group.size - 1

        def work() -> int:
            if group.rank == failing:
                raise DataError("no shards in data/x")
            return group.rank

        with pytest.raises(RankError) as caught:
            group.together(work)
        where = f" (on rank {failing})" if failing else ""
        assert str(caught.value) == describe(caught.value) == f"DataError: no shards in data/x{where}"
        assert (caught.value.exit_code, caught.value.on_all_ranks) == (EXIT_BAD_DATA, True)
        group.barrier()  # nobody is left behind in the failed collective
        assert group.together(lambda: group.rank) == group.rank  # and they can go on

    def test_of_several_errors_the_lowest_rank_speaks(self, group: Ranks):
        def work() -> None:
            raise ConfigError(f"from {group.rank}") if group.rank % 2 == 0 else DataError(f"from {group.rank}")

        with pytest.raises(RankError) as caught:
            group.together(work)
        assert (str(caught.value), caught.value.exit_code) == ("ConfigError: from 0", EXIT_USAGE)

    def test_the_lowest_rank_that_failed_need_not_be_rank_0(self, group: Ranks):
        def work() -> None:
            if group.rank > 0 or group.size == 1:
                raise OutputError(f"disk full on {group.rank}")

        with pytest.raises(RankError) as caught:
            group.together(work)
        told = "OutputError: disk full on 1 (on rank 1)" if group.size > 1 else "OutputError: disk full on 0"
        assert (str(caught.value), caught.value.exit_code) == (told, EXIT_IO)

    def test_a_crash_on_one_rank_is_exit_70_on_all_and_shows_its_place_once(
        self, group: Ranks, capfd: pytest.CaptureFixture[str]
    ):
        last = group.size - 1
        with pytest.raises(RankError) as caught:
            group.together(lambda: 1 // (last - group.rank))
        where = f" (on rank {last})" if last else ""
        assert str(caught.value) == f"ZeroDivisionError: integer division or modulo by zero{where}"
        assert caught.value.exit_code == EXIT_CRASH
        assert traces(group, capfd) == [0] * last + [1]

    @pytest.mark.parametrize(
        "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12")]
    )
    def test_no_memory_on_one_rank_is_exit_71_on_all_without_a_trace(
        self, group: Ranks, capfd: pytest.CaptureFixture[str], error: Exception
    ):
        last = group.size - 1

        def work() -> None:
            if group.rank == last:
                raise error

        with pytest.raises(RankError, match=f"^out of memory: {type(error).__name__}") as caught:
            group.together(work)
        assert str(caught.value).endswith(f" (on rank {last})") == (last > 0)
        assert caught.value.exit_code == EXIT_OUT_OF_MEMORY
        assert traces(group, capfd) == [0] * group.size

    def test_what_rank_0_does_for_all_is_done_once_and_fails_on_all(self, group: Ranks):
        done_by: list[int] = []
        assert group.all_gather_object(group.on_main(lambda: group.rank)) == [0] + [None] * (group.size - 1)
        group.on_main(lambda: done_by.append(group.rank))
        assert done_by == [0] * (group.rank == 0)

        def fail() -> None:
            raise DataError(f"rank {group.rank} cannot write")

        with pytest.raises(RankError, match=r"^DataError: rank 0 cannot write$") as caught:
            group.on_main(fail)
        assert (caught.value.exit_code, caught.value.on_all_ranks) == (EXIT_BAD_DATA, True)

    def test_agree(self, group: Ranks):
        group.agree({"seed": 1, "width": [2, 3]}, "the configuration")
        if group.size == 1:
            group.agree(group.rank, "the data")
            return
        with pytest.raises(RankError, match=r"^the data differs between ranks: rank 0 has 0, rank 1 has 1$") as caught:
            group.agree(group.rank, "the data")
        assert (caught.value.exit_code, caught.value.on_all_ranks) == (EXIT_USAGE, True)

    def test_agree_names_the_first_rank_that_differs(self, group: Ranks):
        last = group.size - 1
        if last == 0:
            group.agree("y", "the data")
            return
        with pytest.raises(RankError) as caught:
            group.agree("y" if group.rank == last else "x", "the data")
        assert str(caught.value) == f"the data differs between ranks: rank 0 has 'x', rank {last} has 'y'"

    def test_agree_shows_only_the_keys_that_differ(self, group: Ranks):
        own = {"a": 1, "b": min(group.rank, 1), **({"c": 3} if group.rank else {})}
        if group.size == 1:
            group.agree(own, "the plan")
            return
        with pytest.raises(RankError) as caught:
            group.agree(own, "the plan")
        assert caught.value.exit_code == EXIT_USAGE
        assert str(caught.value) == (
            "the plan differs between ranks: rank 0 has {'b': 0, 'c': None}, rank 1 has {'b': 1, 'c': 3}"
        )


class GroupContract(RanksContract):
    """Tensors, too."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 3), (1001,), (300_001,)])
    def test_sum(self, group: Group, dtype: torch.dtype, shape: tuple[int, ...]):
        """Small whole numbers: exact in every dtype. In place, of any shape."""
        numbers = torch.arange(torch.Size(shape).numel()).reshape(shape) % 7
        tensor = (numbers * (group.rank + 1)).to(dtype)
        place = tensor.data_ptr()
        assert group.all_reduce_sum(tensor, f"sum.{dtype}.{shape}") is tensor
        ranks = group.size * (group.size + 1) // 2
        assert torch.equal(tensor, (numbers * ranks).to(dtype))
        assert tensor.data_ptr() == place

    def test_fp64_keeps_its_digits(self, group: Group):
        total = group.all_reduce_sum(torch.tensor([1.0 + 2.0**-40], dtype=torch.float64), "digits")
        assert total.item() == group.size * (1.0 + 2.0**-40)

    def test_large_integers_keep_their_digits(self, group: Group):
        total = group.all_reduce_sum(torch.tensor([2**60 + 1]), "integers")
        assert total.item() == group.size * (2**60 + 1)

    def test_what_is_no_number_on_one_rank_is_none_on_all(self, group: Group):
        tensor = torch.ones(3)
        if group.rank == group.size - 1:
            tensor[0], tensor[1] = torch.nan, torch.inf
        group.all_reduce_sum(tensor, "nan")
        assert tensor[0].isnan()
        assert tensor[1:].tolist() == [torch.inf, group.size]

    def test_sums_are_matched_by_name_not_by_order(self, group: Group):
        """As when backward fills the buckets in another order on each rank."""
        own = random.Random(group.rank)
        numbers = own.sample(range(64), 64)
        tensors = {number: torch.full((number + 1,), float(number + group.rank)) for number in range(64)}
        pending = {number: group.all_reduce_sum_async(tensors[number], f"async.{number}") for number in numbers}
        for number in own.sample(numbers, 64):
            pending[number].wait()
            expected = sum(number + rank for rank in range(group.size))
            assert tensors[number].tolist() == [expected] * (number + 1)

    def test_kinds_in_flight_at_once(self, group: Group):
        """As where one bucket is being summed while another one's parts and sums travel; each rank in its own order."""
        ranks = torch.arange(group.size, dtype=torch.int32)
        tensor, rows = torch.full((5,), float(group.rank)), (10 * ranks + group.rank)[:, None].contiguous()
        received, gathered = torch.zeros_like(rows), torch.zeros_like(rows)
        starts = {
            "mixed.sum": lambda name: group.all_reduce_sum_async(tensor, name),
            "mixed.parts": lambda name: group.all_to_all_async(rows, received, name),
            "mixed.rows": lambda name: group.all_gather_async(ranks[group.rank :][:1, None].clone(), gathered, name),
        }
        names = random.Random(group.rank).sample(sorted(starts), 3)
        for pending in [starts[name](name) for name in names]:
            pending.wait()
        assert tensor.tolist() == [sum(range(group.size))] * 5
        assert received[:, 0].tolist() == [10 * group.rank + rank for rank in range(group.size)]
        assert gathered[:, 0].tolist() == list(range(group.size))

    @pytest.mark.parametrize("words", [1, 3, 1000, 300_001])
    def test_all_to_all(self, group: Group, words: int):
        """Rank i's row j becomes rank j's row i; in the tensor that was given, every time."""
        received = torch.zeros(group.size, words, dtype=torch.int32)
        place = received.data_ptr()
        for step in range(3):
            rows = torch.arange(group.size, dtype=torch.int32)[:, None] + 100 * group.rank + 1000 * step
            pending = group.all_to_all_async(rows.expand(-1, words).contiguous(), received, f"all_to_all.{words}")
            pending.wait()
            assert pending.done()
            expected = 100 * torch.arange(group.size, dtype=torch.int32)[:, None] + group.rank + 1000 * step
            assert torch.equal(received, expected.expand(-1, words))
            assert received.data_ptr() == place

    @pytest.mark.parametrize("words", [1, 3, 1000, 300_001])
    def test_all_gather(self, group: Group, words: int):
        rows = torch.zeros(group.size, words, dtype=torch.int32)
        place = rows.data_ptr()
        for step in range(3):
            row = torch.full((1, words), group.rank + 10 * step, dtype=torch.int32)
            pending = group.all_gather_async(row, rows, f"all_gather.{words}")
            pending.wait()
            assert pending.done()
            expected = torch.arange(group.size, dtype=torch.int32)[:, None] + 10 * step
            assert torch.equal(rows, expected.expand(-1, words))
            assert rows.data_ptr() == place
            assert (row == group.rank + 10 * step).all()  # what was sent stays as it was

    def test_done_is_said_only_when_it_is(self, group: Group):
        tensor = torch.ones(3)
        if group.rank == 0:
            pending = group.all_reduce_sum_async(tensor, "done")
            time.sleep(0.05)
            assert pending.done() == (group.size == 1)
        group.barrier()
        if group.rank > 0:
            pending = group.all_reduce_sum_async(tensor, "done")
        until = time.monotonic() + 30
        while not pending.done() and time.monotonic() < until:  # it comes by itself, before anybody waits
            time.sleep(0.001)
        assert pending.done()
        pending.wait()
        pending.wait()
        assert pending.done()
        assert tensor.tolist() == [group.size] * 3

    def test_a_name_serves_again(self, group: Group):
        """Step after step, and with another length."""
        for step in range(1, 6):
            tensor = torch.full((step,), float(step))
            assert group.all_reduce_sum(tensor, "again").tolist() == [step * group.size] * step

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
    @pytest.mark.parametrize("shape", [(1,), (), (2, 2), (1001,)])
    def test_broadcast_from_every_rank(self, group: Group, dtype: torch.dtype, shape: tuple[int, ...]):
        for root in range(group.size):
            tensor = torch.full(shape, group.rank, dtype=dtype)
            group.broadcast(tensor, root, f"broadcast.{dtype}.{shape}")
            assert torch.equal(tensor, torch.full_like(tensor, root))

    def test_broadcast_of_parameters(self, group: Group):
        """Which want gradients, and whose memory the optimizer knows."""
        layer = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(group.rank)
        for name, parameter in layer.named_parameters():
            place = parameter.data_ptr()
            group.broadcast(parameter.data, group.size - 1, name)
            assert (parameter == group.size - 1).all()
            assert (parameter.requires_grad, parameter.data_ptr()) == (True, place)


class AxisContract(RanksContract):
    """Sums and exchanges in the middle of a pass. Every rank can work out what each of them has sent (``sent_by``)."""

    @pytest.fixture
    def group(self, axis: Axis) -> Axis:
        return axis

    @pytest.mark.parametrize("dtype", AXIS_DTYPES)
    def test_sums(self, axis: Axis, dtype: torch.dtype):
        """To the bit: in the order of the ranks, and 16-bit floats in fp32, rounded once."""
        for number, shape in enumerate(AXIS_SHAPES):
            tensor = sent_by(axis.rank, shape, dtype, number)
            place = tensor.data_ptr()
            assert axis.sum(tensor) is tensor
            assert tensor.data_ptr() == place
            assert torch.equal(tensor, added(axis, shape, dtype, number)), shape

    @pytest.mark.parametrize("dtype", AXIS_DTYPES)
    def test_gathers_and_scattered_sums_along_every_dim(self, axis: Axis, dtype: torch.dtype):
        for number, shape in enumerate([(5,), (3, 4), (2, 3, 4), (1, 7, 1), (3, 0, 2), (65, 33)]):
            for dim in range(-1, len(shape)):
                mine = sent_by(axis.rank, shape, dtype, number)
                before, every = mine.clone(), [sent_by(rank, shape, dtype, number) for rank in range(axis.size)]
                gathered = axis.gather(mine, dim)
                assert torch.equal(gathered, torch.cat(every, dim)), (shape, dim)
                whole = list(shape)
                whole[dim] *= axis.size
                mine, summed = sent_by(axis.rank, whole, dtype, number), added(axis, whole, dtype, number)
                part = axis.scatter_sum(mine, dim)
                assert torch.equal(part, summed.chunk(axis.size, dim)[axis.rank]), (shape, dim)
                assert gathered.is_contiguous() and part.is_contiguous()
                assert torch.equal(before, sent_by(axis.rank, shape, dtype, number))  # what was sent stays as it was
                assert torch.equal(mine, sent_by(axis.rank, whole, dtype, number))

    def test_large_ones(self, axis: Axis):
        """Of several pieces, where tensors are sent in pieces, along each dim."""
        for dtype in (torch.float32, torch.bfloat16):
            for number, shape in enumerate([(70_001,), (4, 20_000), (20_000, 4), (120, 12, 10)]):
                tensor = sent_by(axis.rank, shape, dtype, number)
                assert torch.equal(axis.sum(tensor), added(axis, shape, dtype, number)), shape
                for dim in range(len(shape)):
                    every = [sent_by(rank, shape, dtype, number) for rank in range(axis.size)]
                    assert torch.equal(axis.gather(every[axis.rank], dim), torch.cat(every, dim)), (shape, dim)
                    if shape[dim] % axis.size == 0:
                        part = added(axis, shape, dtype, number).chunk(axis.size, dim)[axis.rank]
                        assert torch.equal(axis.scatter_sum(every[axis.rank], dim), part), (shape, dim)

    def test_ranks_that_are_late_get_the_same(self, axis: Axis):
        """One that is quick must not write into what another one still reads."""
        for turn in range(60):
            if turn % axis.size == axis.rank and turn < 12:
                time.sleep(0.01)
            value = float(turn)
            assert (
                axis.sum(torch.full((1000,), value + axis.rank)).tolist()
                == [sum(value + rank for rank in range(axis.size))] * 1000
            )
            assert axis.gather(torch.full((3,), value + axis.rank), 0).tolist() == [
                value + rank for rank in range(axis.size) for _ in range(3)
            ]

    def test_what_is_no_number_on_one_rank_is_none_on_all(self, axis: Axis):
        tensor = torch.ones(3)
        if axis.rank == axis.size - 1:
            tensor[0], tensor[1] = torch.nan, torch.inf
        axis.sum(tensor)
        assert tensor[0].isnan()
        assert tensor[1:].tolist() == [torch.inf, axis.size]

    def test_no_gradient_goes_through(self, axis: Axis):
        """Whoever wants one says what it is: an axis knows nothing of autograd."""
        weight = torch.ones(4, requires_grad=True)
        assert not axis.gather(weight.detach(), 0).requires_grad
        axis.sum(weight.data)
        assert weight.requires_grad and weight.tolist() == [axis.size] * 4

    @pytest.mark.parametrize("dtype", [*AXIS_DTYPES, torch.uint8, torch.bool])
    def test_broadcast_from_every_rank(self, axis: Axis, dtype: torch.dtype):
        for root in range(axis.size):
            for shape in [(), (3, 2), (0,), (1001,)]:
                tensor = torch.full(shape, axis.rank % 2, dtype=dtype)
                assert axis.broadcast(tensor, root) is tensor
                assert torch.equal(tensor, torch.full_like(tensor, root % 2))

    def test_strided_tensors_are_refused(self, axis: Axis):
        """On every rank, before anything is sent: their elements are not where their memory is."""
        if axis.size == 1:
            return
        strided = torch.zeros(4, 6).T
        for call in (
            lambda: axis.sum(strided),
            lambda: axis.gather(strided, 0),
            lambda: axis.scatter_sum(strided, 0),
            lambda: axis.broadcast(strided, 0),
            lambda: axis.send(strided, (axis.rank + 1) % axis.size),
            lambda: axis.receive(strided, (axis.rank + 1) % axis.size),
        ):
            with pytest.raises(AssertionError):
                call()
        axis.barrier()

    @pytest.mark.parametrize("dtype", [*AXIS_DTYPES, torch.bool])
    def test_messages_come_in_their_order(self, axis: Axis, dtype: torch.dtype):
        """Round a ring, of every size; receives posted ahead of the sends, waited for from the last to the first."""
        if axis.size == 1:
            return
        after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        shapes = [(1,), (), (7, 3), (0,), (70_000,), (2,)]
        came = [torch.empty(shape, dtype=dtype) for shape in shapes]
        receives = [axis.receive(tensor, before) for tensor in came]
        sends = [axis.send(sent_by(axis.rank, shape, dtype, n), after) for n, shape in enumerate(shapes)]
        for number in reversed(range(len(shapes))):
            receives[number].wait()
            assert receives[number].done()
            assert torch.equal(came[number], sent_by(before, shapes[number], dtype, number))
        for one in sends:
            one.wait()
            assert one.done()

    def test_messages_both_ways_and_sums_between(self, axis: Axis):
        """As in 1F1B: what a stage gets from before and from behind, while a sum goes over the axis."""
        if axis.size == 1:
            return
        for turn in range(5):
            pending, came = [], {}
            for other in {(axis.rank - 1) % axis.size, (axis.rank + 1) % axis.size}:
                came[other] = torch.empty(30_000)
                pending.append(axis.send(torch.full((30_000,), float(turn * axis.size + axis.rank)), other))
                pending.append(axis.receive(came[other], other))
            assert axis.sum(torch.tensor([axis.rank])).item() == sum(range(axis.size))
            for one in pending:
                one.wait()
            for other, tensor in came.items():
                assert (tensor == turn * axis.size + other).all()

    def test_a_receive_is_done_when_it_has_come(self, axis: Axis):
        if axis.size == 1:
            return
        tensor = torch.zeros(3)
        if axis.rank == 1:
            pending = axis.receive(tensor, 0)
            assert not pending.done()
        axis.barrier()
        if axis.rank == 0:
            axis.send(torch.ones(3), 1).wait()
        if axis.rank == 1:
            until = time.monotonic() + 30
            while not pending.done() and time.monotonic() < until:
                time.sleep(0.001)
            assert pending.done()
            pending.wait()
            assert tensor.tolist() == [1, 1, 1]


def sent_by(rank: int, shape: Sequence[int], dtype: torch.dtype, number: int) -> torch.Tensor:
    """What ``rank`` sends: numbers whose sum depends on the order in which they are added."""
    draws = torch.Generator().manual_seed(1000 * number + rank)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, tuple(shape), generator=draws).to(dtype)
    return (torch.randn(tuple(shape), generator=draws, dtype=torch.float64) * 10.0 ** (rank % 3)).to(dtype)


def added(axis: Axis, shape: Sequence[int], dtype: torch.dtype, number: int) -> torch.Tensor:
    """The sum that all ranks must have, to the bit."""
    parts = [sent_by(rank, shape, dtype, number) for rank in range(axis.size)]
    if dtype.is_floating_point and dtype.itemsize == 2:
        parts = [part.float() for part in parts]
    return reduce(torch.add, parts).to(dtype)


def traces(group: Ranks, capfd: pytest.CaptureFixture[str]) -> list[int]:
    """How many tracebacks each rank has written. Threads share standard error: the last rank takes what is there."""
    count = 0
    for rank in reversed(range(group.size)):
        if group.rank == rank:
            count = capfd.readouterr().err.count("Traceback")
        group.barrier()
    return group.all_gather_object(count)
