"""The contract of every axis (tests/contract.py), where no launcher is needed; and what the threads add to it."""

from collections.abc import Callable

import pytest
import torch
from contract import AxisContract
from threads import ThreadAxis, ThreadGroup, on_every_rank, on_ranks

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.comm.staged import StagedAxis
from hvdtrain.errors import RankLostError


class TestLocal(AxisContract):
    @pytest.fixture
    def axis(self) -> LocalAxis:
        return LocalAxis()


@on_every_rank
class TestThreads(AxisContract):
    @pytest.fixture(params=[2, 3])
    def axis(self, request: pytest.FixtureRequest) -> int:
        return request.param

    @staticmethod
    def part_of(group: ThreadGroup) -> Axis:
        return group.axis([range(group.size)], torch.device("cpu"))


# --- what threads find out, and a network would forgive ----------------------------------------------------------


def on_axis(size: int, work: Callable[[ThreadAxis], object]) -> list:
    return on_ranks(size, lambda group: work(group.axis([range(size)], torch.device("cpu"))))


def test_what_will_be_received_is_spoilt():
    def work(axis: ThreadAxis) -> None:
        tensor = torch.ones(2)
        if axis.rank:
            pending = axis.receive(tensor, 0)
            assert tensor.isnan().all()
        else:
            pending = axis.send(tensor, 1)
        pending.wait()
        assert tensor.tolist() == [1, 1]

    on_axis(2, work)


def test_what_is_sent_must_not_change():
    def work(axis: ThreadAxis) -> None:
        tensor = torch.ones(2)
        pending = axis.receive(tensor, 0) if axis.rank else axis.send(tensor, 1)
        tensor += 1
        pending.wait()

    with pytest.raises(AssertionError, match="message from rank 0 to 1 was written to while it was under way"):
        on_axis(2, work)


def test_sends_that_wait_for_one_another_never_end():
    """Small ones would pass over MPI, which keeps them, and large ones hang."""

    def work(axis: ThreadAxis) -> None:
        axis.send(torch.ones(1), 1 - axis.rank).wait()
        axis.receive(torch.ones(1), 1 - axis.rank).wait()

    with pytest.raises(RankLostError, match="rank 0 waits for message from rank 0 to 1, but rank 1 has returned"):
        on_axis(2, lambda axis: axis.rank or work(axis))


def test_ranks_that_do_not_mean_the_same():
    with pytest.raises(AssertionError, match=r"rank 0 has a sum of \[1\] float32, rank 1 a sum of \[2\] float32"):
        on_axis(2, lambda axis: axis.sum(torch.ones(1 + axis.rank)))
    with pytest.raises(AssertionError, match=r"rank 0 has a sum of .*, rank 1 a gather of .* along 0"):
        on_axis(2, lambda axis: axis.gather(torch.ones(1), 0) if axis.rank else axis.sum(torch.ones(1)))


def test_a_message_that_nobody_waits_for_is_named():
    with pytest.raises(AssertionError, match="never waited for send 1, message from rank 0 to 1"):
        on_axis(2, lambda axis: axis.rank or axis.send(torch.ones(1), 1))


def test_one_that_fails_leaves_nobody_waiting():
    with pytest.raises(ZeroDivisionError):
        on_axis(3, lambda axis: axis.sum(torch.ones(1 // axis.rank)))


# --- through the host's memory ---------------------------------------------------------------------------------------


@on_every_rank
class TestStaged(AxisContract):
    """As where several ranks use one GPU; here the GPU is the host as well."""

    @pytest.fixture
    def axis(self) -> int:
        return 2

    @staticmethod
    def part_of(group: ThreadGroup) -> Axis:
        return StagedAxis(TestThreads.part_of(group), "ranks share a GPU")
