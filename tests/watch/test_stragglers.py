"""A rank that is slow again and again is named once; a slow moment is not."""

import pytest

from hvdtrain.watch.meter import StepTimes
from hvdtrain.watch.stragglers import Stragglers, own_seconds


def _named(intervals: list[list[float]], factor: float = 1.5, **more: int) -> list[list[str]]:
    """The messages after each interval of 10 steps, in which the ranks took those seconds."""
    ranks = len(intervals[0])
    found = Stragglers(factor, [f"node{rank}" for rank in range(ranks)], **more)
    totals, messages = [0.0] * ranks, []
    for number, seconds in enumerate(intervals, start=1):
        totals = [total + took for total, took in zip(totals, seconds, strict=True)]
        messages.append(found.compare(totals, more.get("step", 0) + 10 * number))
    return messages


def test_a_slow_rank_is_named_once():
    messages = _named([[1, 1, 2, 1]] * 5, step=100)
    assert messages == [
        [],
        [
            "rank 2 on node2 is slow: its own part of a step takes 0.2 s, 2.0 times the median's 0.1 s "
            "(steps 111 to 120); the others wait for it"
        ],
        [],
        [],
        [],
    ]


@pytest.mark.parametrize(
    "intervals",
    [
        [[1, 1, 2, 1], [1, 1, 1, 1]] * 3,  # now and then
        [[1, 1, 2, 1], [1, 2, 1, 1]] * 3,  # another one every time
        [[1, 1, 1.49, 1]] * 4,
        [[2, 2, 2, 2]] * 4,
        [[0, 0, 0, 0]] * 4,
        [[5, 1.5, 1, 1.2], [1.1, 1, 1, 1]] * 2,
        [[3]] * 4,
    ],
)
def test_what_is_not_a_straggler(intervals: list[list[float]]):
    assert not any(_named(intervals))


def test_of_two_ranks_the_slower_one():
    """Their mean would call neither slow: 1.5 times (1 + 2) / 2 is more than 2."""
    assert [len(found) for found in _named([[1, 2]] * 3)] == [0, 1, 0]


def test_several_at_once():
    (second,) = (found for found in _named([[1, 3, 1, 1, 2]] * 2) if found)
    assert [message.split(" is ")[0] for message in second] == ["rank 1 on node1", "rank 4 on node4"]


def test_waiting_for_the_others_is_not_counted():
    assert own_seconds(StepTimes(data=1, compute=2, sync=40, optimizer=4, total=50)) == 7
