"""The contract of every group (tests/contract.py), where no launcher is needed; and what the threads add to it."""

import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from contract import GroupContract, RanksContract
from launch import succeed
from threads import JobEnded, LateGroup, ThreadGroup, in_process, on_every_rank, on_ranks

from hvdtrain.comm.group import Group
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.ranks import OneRank
from hvdtrain.errors import DataError, RankError, RankLostError

OVER_MPI = Path(__file__).parents[1] / "mpi"


class TestOneRank(RanksContract):
    @pytest.fixture
    def group(self) -> OneRank:
        return OneRank()


class TestLocalGroup(GroupContract):
    @pytest.fixture
    def group(self) -> LocalGroup:
        return LocalGroup()


@on_every_rank
class TestThreads(GroupContract):
    @pytest.fixture(params=[1, 2, 3, 4])
    def group(self, request: pytest.FixtureRequest) -> int:
        return request.param


@on_every_rank
class TestHalfOfThreads(GroupContract):
    @pytest.fixture
    def group(self) -> int:
        return 4

    @staticmethod
    def part_of(group: ThreadGroup) -> Group | None:
        part = group.split([[1, 3]])
        return part if group.rank in (1, 3) else None


def test_over_gloo():
    """The same tests of the same class as over MPI, which are those of this file; and a mesh, whose axes are Gloo's."""
    tests = (OVER_MPI / "test_group.py", OVER_MPI / "test_mesh.py", "-k", "TestHorovod or reaches_its_ranks")
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    done = succeed(how="gloo", ranks=2, program=(sys.executable, *words), timeout_s=120)
    names = [name for name in dir(GroupContract) if name.startswith("test_")]
    passed = int(done.text.rpartition(" passed")[0].split()[-1])
    assert passed >= len(names) + 3, done
    assert "skipped" not in done.text


def test_a_group_of_one_changes_nothing():
    group, tensor = LocalGroup(), torch.arange(3.0)
    group.broadcast(tensor, 0, "t")
    group.barrier()
    assert group.all_reduce_sum(tensor, "t") is tensor
    assert tensor.tolist() == [0, 1, 2]
    assert (group.rank, group.size, group.all_gather_object("x")) == (0, 1, ["x"])
    group.close()


@pytest.mark.parametrize("fails", [False, True])
def test_together_meets_once(fails: bool):
    """One meeting more or less on a rank, and the job hangs."""

    def work(group: ThreadGroup) -> int:
        with pytest.raises(RankError) if fails else nullcontext():
            group.together(lambda: 1 // (0 if fails and group.rank > 0 else 1))
        return group.meetings

    assert on_ranks(3, work) == [1, 1, 1]


# --- what threads find out, and a network would forgive ----------------------------------------------------------


def test_a_tensor_is_spoilt_until_it_was_waited_for():
    group = LateGroup()
    tensor, rows, received = torch.ones(2), torch.ones(1, 2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    pending = [group.all_reduce_sum_async(tensor, "a"), group.all_to_all_async(rows, received, "b")]
    assert tensor.isnan().all()
    assert received.tolist() == [[-(2**31)] * 2]
    assert [one.done() for one in pending] == [True, True]
    tensor.fill_(5)  # lost
    for one in pending:
        one.wait()
    assert (tensor.tolist(), received.tolist()) == ([1, 1], [[1, 1]])
    assert (group.sent, group.under_way) == (["a", "b"], {})


def test_what_is_sent_must_not_change():
    group = LateGroup()
    rows = torch.ones(1, 2, dtype=torch.int32)
    pending = group.all_to_all_async(rows, torch.zeros_like(rows), "a")
    rows[0, 1] = 7
    with pytest.raises(AssertionError, match="a was written to while it was under way"):
        pending.wait()


def test_a_name_is_under_way_once():
    group = LateGroup()
    group.all_reduce_sum_async(torch.ones(2), "a")
    with pytest.raises(AssertionError, match="a is under way already"):
        group.all_reduce_sum_async(torch.ones(2), "a")


def test_ranks_that_do_not_mean_the_same():
    with pytest.raises(AssertionError, match=r"a: rank 0 has a sum of \[1\] float32, rank 1 a sum of \[2\] float32"):
        on_ranks(2, lambda group: group.all_reduce_sum(torch.ones(1 + group.rank), "a"))
    with pytest.raises(AssertionError, match=r"rank 0 has a copy of .* from rank 0, rank 1 a copy of .* from rank 1"):
        on_ranks(2, lambda group: group.broadcast(torch.ones(1), group.rank, "a"))


def test_who_would_wait_for_ever_in_one_thread_fails_at_once():
    first, second = in_process(2, patience_s=0)
    pending = first.all_reduce_sum_async(torch.ones(1), "a")
    assert not pending.done()
    with pytest.raises(RankLostError, match="rank 0 waits for a, but rank 1 has not come within 0 s"):
        pending.wait()
    tensor = torch.ones(1)
    second.all_reduce_sum(tensor, "a")
    assert (pending.done(), tensor.item()) == (True, 2)


@pytest.mark.parametrize("failing", [0, 2])
def test_one_that_fails_leaves_nobody_waiting(failing: int):
    """Its error is the one that is raised, with its rank; all threads have ended."""
    lost: list[str] = []

    def work(group: ThreadGroup) -> None:
        group.barrier()
        if group.rank == failing:
            raise DataError("bad shard")
        try:
            group.all_reduce_sum(torch.ones(1), "a")
        except RankLostError as error:
            lost.append(str(error))
            raise

    began = time.monotonic()
    with pytest.raises(DataError, match="bad shard") as caught:
        on_ranks(3, work)
    assert caught.value.__notes__ == [f"on rank {failing} of 3"]
    assert time.monotonic() - began < 20
    assert sorted(lost) == [
        f"rank {rank} waits for a, but rank {failing} has failed (DataError: bad shard)"
        for rank in range(3)
        if rank != failing
    ]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]


def test_one_that_returns_too_early_is_named():
    with pytest.raises(RankLostError, match="rank 0 waits for objects, but rank 1 has returned"):
        on_ranks(2, lambda group: group.rank or group.barrier())


def test_one_that_never_waits_is_named():
    with pytest.raises(AssertionError, match="never waited for a, b"):
        on_ranks(2, lambda group: [group.all_reduce_sum_async(torch.ones(1), name) for name in "ab"])


def test_an_abort_ends_all():
    ended: list[int] = []

    def work(group: ThreadGroup) -> None:
        try:
            group.abort(71) if group.rank == 1 else group.barrier()
        except JobEnded as error:
            ended.append(error.exit_code)
            raise

    with pytest.raises(JobEnded, match="rank 1 has ended the job with exit code 71"):
        on_ranks(3, work)
    assert ended == [71] * 3


def test_a_closed_group_carries_nothing():
    def work(group: ThreadGroup) -> None:
        group.close()
        with pytest.raises(AssertionError, match=f"rank {group.rank} has closed its group"):
            group.barrier()

    on_ranks(2, work)
