"""What every group inherits: failing together, agreeing; and the group of one."""

from typing import Any

import pytest
import torch

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_CRASH, DataError, RankError, describe


class Scripted(LocalGroup):
    """Rank 0 of several; ``others`` is what the other ranks say in every exchange."""

    def __init__(self, *others: Any):
        self.others, self.size, self.meetings = others, 1 + len(others), 0

    def all_gather_object(self, value: Any) -> list[Any]:
        self.meetings += 1
        return [value, *self.others]


def test_together_gives_each_its_own_result():
    group = Scripted(None, None)
    assert group.together(lambda: "mine") == "mine"
    assert group.meetings == 1  # the others meet too: one more or less and the job hangs


def test_the_failure_of_one_is_the_failure_of_all():
    group = Scripted(None, ("DataError: no shards", EXIT_BAD_DATA))
    with pytest.raises(RankError) as caught:
        group.together(lambda: "mine")
    assert (str(caught.value), caught.value.exit_code) == ("DataError: no shards (on rank 2)", EXIT_BAD_DATA)
    assert caught.value.on_all_ranks


def test_the_lowest_rank_that_failed_speaks():
    group = Scripted(("ConfigError: b", 2))

    def fail() -> None:
        raise DataError("a")

    with pytest.raises(RankError) as caught:
        group.together(fail)
    assert (describe(caught.value), caught.value.exit_code, group.meetings) == ("DataError: a", EXIT_BAD_DATA, 1)


def test_a_crash_shows_where_and_ends_all(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RankError) as caught:
        LocalGroup().together(lambda: 1 // 0)
    assert caught.value.exit_code == EXIT_CRASH
    assert str(caught.value) == "ZeroDivisionError: integer division or modulo by zero"
    assert "Traceback" in capsys.readouterr().err


def test_agree():
    Scripted({"a": 1}, {"a": 1}).agree({"a": 1}, "the configuration")
    with pytest.raises(RankError, match=r"the data differs between ranks: rank 0 has 'x', rank 2 has 'y'"):
        Scripted("x", "y").agree("x", "the data")


def test_a_group_of_one_changes_nothing():
    group, tensor = LocalGroup(), torch.arange(3.0)
    group.broadcast(tensor, 0, "t")
    group.barrier()
    assert group.all_reduce_sum(tensor, "t") is tensor
    assert tensor.tolist() == [0, 1, 2]
    assert (group.rank, group.size, group.all_gather_object("x")) == (0, 1, ["x"])
    group.close()
