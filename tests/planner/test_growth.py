"""The law of growth: what it says where the runs determine it, and how it leans on what is usual where they do not."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.errors import ConfigError
from hvdtrain.planner.growth import PRIOR, Growth, Point, Prior

# Runs that say all, and a prior that says nothing.
OPEN = Prior(usual=(0.0, 0.0, 0.0, 0.0), spread=(1.0, 1.0, 1.0, 1.0), noise=1e-5, scales=(1.0,), noises=(1.0,))


def law(a: float, e: float, u: float, s: float, c: float, nodes: float, microbatches: float) -> Point:
    doublings, left = math.log2(nodes), float(nodes > 1)
    return Point(nodes, a * (1 + e * doublings + (u + s * left + c * doublings) / microbatches), microbatches)


def test_what_the_runs_determine_is_found():
    """Seven runs, five unknowns; what is paid once a step and what is paid once a microbatch are told apart."""
    truth = 0.25, 0.01, 0.4, 0.05, 0.02
    sizes = [(1, 64), (1, 8), (2, 32), (2, 4), (4, 16), (4, 2), (8, 8)]
    growth = Growth([law(*truth, *size) for size in sizes], OPEN)
    for size in [(32, 2), (32, 64), (512, 1)]:
        told, expected = growth.predict(*size), law(*truth, *size).seconds
        assert told.seconds == pytest.approx(expected, rel=1e-3)
        assert told.low < expected < told.high < 1.01 * told.low


def test_a_fixed_global_batch_pays_for_the_step_more_often():
    """By hand: a step of 16, 8, 4 microbatches of 1 s and 2 s that are paid once; of one microbatch it takes 3 s."""
    points = [Point(nodes, 1 + 2 / m, m) for nodes, m in ((1, 16), (2, 8), (4, 4))]
    alone = replace(OPEN, spread=(1e-4, 1.0, 1e-4, 1e-4))  # nothing grows with the nodes
    assert Growth(points, alone).predict(16, 1).seconds == pytest.approx(3.0, rel=0.01)
    blind = [Point(point.nodes, point.seconds) for point in points]  # without knowing the microbatches
    assert Growth(blind, OPEN).predict(16, 1).seconds < 2.2


def test_two_runs_lean_on_what_is_usual_and_say_how_far():
    few = Growth([Point(1, 1.0), Point(2, 1.03)])
    more = Growth([Point(1, 1.0), Point(2, 1.03), Point(4, 1.045), Point(8, 1.06)])
    width = [(told.high - told.low) / told.seconds for told in (few.predict(64), more.predict(64))]
    assert width[1] < 0.6 * width[0]
    near, far = (few.predict(nodes) for nodes in (4, 1024))
    assert near.high - near.low < far.high - far.low
    wide = few.predict(64, share=0.95)
    assert wide.low < few.predict(64).low < few.predict(64).seconds < few.predict(64).high < wide.high
    # A lucky second run does not promise that a thousand nodes are faster than one.
    assert Growth([Point(1, 1.0), Point(2, 0.99)]).predict(1024).seconds > 0.99


@settings(max_examples=30, deadline=None)
@given(seconds=st.floats(1e-6, 1e6), second=st.floats(0.9, 1.5), nodes=st.integers(4, 4096))
def test_an_interval_holds_its_middle(seconds: float, second: float, nodes: int):
    told = Growth([Point(1, seconds), Point(2, seconds * second)]).predict(nodes)
    assert 0.8 * min(seconds, seconds * second) <= told.low <= told.seconds < told.high


def test_what_is_usual_depends_on_how_long_a_microbatch_takes():
    """By hand: 0.1 s once a step are a tenth of a microbatch of 1 s, and at most three of a short one."""
    prior = replace(OPEN, usual=(0.0, 0.1, 0.2, 0.0), short_s=0.1)
    assert prior.sizes(1.0).tolist() == pytest.approx([1, 1, 0.1 / 1.1, 0.1 / 1.1])
    assert prior.sizes(0.1).tolist() == pytest.approx([1, 3, 0.5, 0.5])  # 1 / 0.1 would be ten
    assert OPEN.sizes(1.0).tolist() == [1, 1, 1, 1]
    sure = replace(prior, spread=(1e-9,) * 4)
    told = Growth([Point(1, 1.0, 100), Point(1.5, 1.0, 100), Point(2, 1.0, 100)], sure).predict(2, 1)
    expected = 1 + 0.1 * (1 - 0.01) + 0.2 * 0.1 / 1.1
    assert told.seconds == pytest.approx(expected, rel=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.99, 1.2), st.floats(0.01, 0.2))
def test_a_slower_second_run_predicts_a_slower_large_one(second: float, more: float):
    slow, slower = (Growth([Point(1, 1.0), Point(4, x)]).predict(64) for x in (second, second + more))
    assert slower.seconds > slow.seconds


def test_runs_of_one_size_are_no_growth():
    with pytest.raises(ConfigError, match="only runs on 2: how the time grows needs runs of two sizes"):
        Growth([Point(2, 1.0), Point(2, 1.1)])
    with pytest.raises(ConfigError, match="no run: how the time grows"):
        Growth([])
    with pytest.raises(ConfigError, match="nan s on 2: nothing that a run can take"):
        Growth([Point(1, 1.0), Point(2, math.nan)])


def test_the_prior_is_of_machines_that_exist():
    """Costs grow with the nodes; a measurement repeats itself within a few per cent."""
    assert all(value >= 0 for value in PRIOR.usual)
    assert all(value > 0 for value in PRIOR.spread)
    assert 0.001 < PRIOR.noise < 0.05
