"""Schedules of a pipeline: what the checker finds of them, against what their authors say."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.cut.checker import Costs, Deadlock, WrongSchedule, check, draw
from hvdtrain.cut.schedules import (
    SCHEDULES,
    Backward,
    Forward,
    InputGradient,
    Receive,
    Send,
    WeightGradient,
    gpipe,
    interleaved,
    one_forward_one_backward,
    with_transfers,
    zero_bubble,
)

names = st.sampled_from(sorted(SCHEDULES))
DOCS = Path(__file__).parents[2] / "docs" / "cuts.md"


def stages_of(name: str, ranks: int, chunks: int) -> tuple[int, int]:
    """Stages per rank, and stages."""
    chunks = chunks if name == "interleaved" else 1
    return chunks, ranks * chunks


@given(names, st.integers(1, 6), st.integers(1, 17), st.integers(1, 4), st.integers(0, 2))
@settings(deadline=None)
def test_every_schedule_ends(name, ranks, microbatches, chunks, ahead):
    chunks, stages = stages_of(name, ranks, chunks)
    schedule = with_transfers(SCHEDULES[name](ranks, microbatches, chunks), ahead)
    checked = check(schedule, Costs.alike(stages, transfer=0.3))
    work = 3 * microbatches * chunks
    assert checked.makespan >= work
    assert checked.bubble == pytest.approx(1 - work / checked.makespan)
    assert max(checked.alive) <= microbatches * chunks


@given(names, st.integers(2, 5), st.integers(1, 12), st.integers(2, 3), st.data())
@settings(deadline=None)
def test_every_schedule_ends_with_stages_of_any_cost(name, ranks, microbatches, chunks, data):
    chunks, stages = stages_of(name, ranks, chunks)
    costs = st.lists(st.floats(0.1, 10), min_size=stages, max_size=stages)
    schedule = with_transfers(SCHEDULES[name](ranks, microbatches, chunks))
    forward, backward = data.draw(costs), data.draw(costs)
    checked = check(schedule, Costs(forward, backward))
    busiest = max(sum(forward[rank::ranks]) + sum(backward[rank::ranks]) for rank in range(ranks))
    assert checked.makespan >= microbatches * busiest * (1 - 1e-9)


@pytest.mark.parametrize("ranks, microbatches", [(2, 2), (4, 8), (4, 4), (3, 7)])
def test_the_bubble_is_that_of_the_papers(ranks, microbatches):
    def bubble(schedule, chunks=1):
        return check(with_transfers(schedule), Costs.alike(ranks * chunks)).bubble

    ends = ranks - 1
    assert bubble(gpipe(ranks, microbatches)) == pytest.approx(ends / (microbatches + ends))
    assert bubble(one_forward_one_backward(ranks, microbatches)) == pytest.approx(ends / (microbatches + ends))
    # Forward, input's and weights' gradient cost 1 each: (p - 1)(F + B - W) is a third of 1F1B's (p - 1)(F + B + W).
    assert bubble(zero_bubble(ranks, microbatches)) == pytest.approx(ends / (3 * microbatches + ends))
    if microbatches % ranks == 0:
        for chunks in (2, 3):
            expected = ends / (chunks * microbatches + ends)
            assert bubble(interleaved(ranks, microbatches, chunks), chunks) == pytest.approx(expected)


def test_the_activations_alive_are_those_of_the_papers():
    def alive(schedule, chunks=1):
        return check(with_transfers(schedule), Costs.alike(4 * chunks)).alive

    assert alive(gpipe(4, 8)) == [8, 8, 8, 8]
    assert alive(one_forward_one_backward(4, 8)) == [4, 3, 2, 1]
    assert alive(zero_bubble(4, 8)) == [4, 4, 4, 4]
    assert alive(interleaved(4, 8, 2), 2) == [11, 9, 7, 5]  # of half the size


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
def test_sends_that_wait_for_their_receive_deadlock(name, chunks):
    """Neighbours send to one another at the same time: the one an activation, the other a gradient."""
    schedule = with_transfers(SCHEDULES[name](4, 8, chunks), ahead=0)
    with pytest.raises(Deadlock, match=r"rank 0 at Send.*rank 1 at Send"):
        check(schedule, Costs.alike(4 * chunks), synchronous=True)
    check(schedule, Costs.alike(4 * chunks))


def test_gpipe_sends_in_one_direction_at_a_time_and_may_wait():
    assert check(with_transfers(gpipe(4, 8), ahead=0), Costs.alike(4), synchronous=True).makespan == 33


def test_1f1b_with_receives_posted_ahead_needs_no_buffers():
    assert check(with_transfers(one_forward_one_backward(4, 8)), Costs.alike(4), synchronous=True).makespan == 33


def test_transfers_are_posted_a_pass_before_they_are_needed():
    assert with_transfers(one_forward_one_backward(2, 2))[1] == [
        Receive(Forward(0, 0), source=0),
        Forward(1, 0),
        Receive(Forward(0, 1), source=0),
        Backward(1, 0),
        Send(Backward(1, 0), to=0),
        Forward(1, 1),
        Backward(1, 1),
        Send(Backward(1, 1), to=0),
    ]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([[Forward(0, 0)]], "stage 0 makes Forward$"),
        ([[Backward(0, 0), Forward(0, 0)]], "microbatch 0: Backward, Forward"),
        ([[Forward(0, 0), WeightGradient(0, 0), InputGradient(0, 0)]], "microbatch 0: Forward, WeightGradient, Input"),
        ([[Forward(0, 0), Backward(0, 0), Backward(0, 0)]], r"Backward of the microbatches \[0, 0\]"),
        ([[Forward(0, 1), Forward(0, 0), Backward(0, 0), Backward(0, 1)]], r"Forward of the microbatches \[1, 0\]"),
        ([[Forward(0, 0), Backward(0, 0), Forward(1, 0), Backward(1, 0)], []], r"rank 0 makes Forward.*rank 1's"),
    ],
)
def test_a_wrong_order_is_told(wrong, message):
    with pytest.raises(WrongSchedule, match=message):
        check(wrong, Costs.alike(2))


def test_receives_in_another_order_than_the_sends_are_told():
    schedule = with_transfers(gpipe(2, 2), ahead=0)
    first, second = (place for place, action in enumerate(schedule[1]) if isinstance(action, Receive))
    schedule[1][first], schedule[1][second] = schedule[1][second], schedule[1][first]
    with pytest.raises(WrongSchedule, match="rank 0 to 1, number 0"):
        check(schedule, Costs.alike(2))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_docs_show_the_schedules_as_they_are(name):
    chunks, _ = stages_of(name, 4, 2)
    assert draw(with_transfers(SCHEDULES[name](4, 8, chunks))) in DOCS.read_text(encoding="utf-8")
