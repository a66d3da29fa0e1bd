"""The learning rate at every step, in closed form."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hvdtrain.errors import ConfigError
from hvdtrain.optim.schedules import ScheduleOptions, check_schedule, learning_rate


def rates(steps: int, peak: float = 1.0, **options) -> list[float]:
    return [learning_rate(ScheduleOptions(**options), peak, steps, step) for step in range(steps)]


def test_warm_up_is_linear_and_never_0():
    assert rates(6, name="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(3, name="constant", warmup_steps=0) == [1.0, 1.0, 1.0]


def test_cosine():
    """Half a period over the steps after the warm-up; with 4 of them: 1, (2 + sqrt 2) / 4, 1/2, (2 - sqrt 2) / 4."""
    root = math.sqrt(2)
    expected = [0.5, 1.0, 1.0, (2 + root) / 4, 0.5, (2 - root) / 4]
    assert rates(6, name="cosine", warmup_steps=2) == pytest.approx(expected, rel=1e-12)
    floored = [0.5, 1.0, *(0.2 + 0.8 * rate for rate in expected[2:])]
    assert rates(6, name="cosine", warmup_steps=2, min_lr=0.2) == pytest.approx(floored, rel=1e-12)


def test_the_end_of_a_long_run_is_the_minimum():
    assert rates(10_000, 6e-4, warmup_steps=100, min_lr=6e-5)[-1] == pytest.approx(6e-5, rel=1e-4)
    assert learning_rate(ScheduleOptions(warmup_steps=0, min_lr=0.1), 1.0, 10, 10) == pytest.approx(0.1)
    assert learning_rate(ScheduleOptions(warmup_steps=0, min_lr=0.1), 1.0, 10, 99) == pytest.approx(0.1)  # stays


@given(st.integers(1, 200), st.integers(0, 200), st.floats(1e-6, 10), st.floats(0, 1))
def test_up_then_down_within_bounds(steps: int, warmup: int, peak: float, floor: float):
    warmup = min(warmup, steps)
    line = rates(steps, peak, warmup_steps=warmup, min_lr=floor * peak)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in line) or floor == 0
    assert line[:warmup] == sorted(line[:warmup])
    assert line[warmup:] == sorted(line[warmup:], reverse=True)
    assert max(line) == pytest.approx(peak)
    assert all(rate >= floor * peak * (1 - 1e-12) for rate in line[warmup:])


def test_what_cannot_be_is_refused():
    check_schedule(ScheduleOptions(warmup_steps=10), 1e-3, 10)
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps=11 is longer than train.steps=10"):
        check_schedule(ScheduleOptions(warmup_steps=11), 1e-3, 10)
    with pytest.raises(ConfigError, match=r"schedule.min_lr=0.01 is above optim.lr=0.001"):
        check_schedule(ScheduleOptions(warmup_steps=0, min_lr=1e-2), 1e-3, 10)
    for wrong in ({"name": "linear"}, {"warmup_steps": -1}, {"min_lr": -0.1}):
        with pytest.raises(ValidationError):
            ScheduleOptions(**wrong)
