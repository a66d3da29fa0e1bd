"""The learning rate at every step, in closed form."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hvdtrain.errors import ConfigError
from hvdtrain.optim.schedules import Length, ScheduleOptions, check_schedule, learning_rate, warmup_length

NAMES = ["cosine", "constant", "linear", "polynomial", "inverse_sqrt", "wsd", "cosine_restarts"]


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
    for wrong in (
        {"name": "line"},
        {"warmup": "none"},
        {"warmup_steps": -1},
        {"warmup_tokens": -1},
        {"warmup_epochs": -0.5},
        {"warmup_start": 1.1},
        {"min_lr": -0.1},
        {"power": 0.0},
        {"decay": "cosine"},
        {"decay_share": 0.0},
        {"decay_share": 1.5},
        {"cycles": 0},
    ):
        with pytest.raises(ValidationError):
            ScheduleOptions(**wrong)


# --- the same as ever for settings as ever -----------------------------------------------------------------------


def as_before(name: str, warmup: int, min_lr: float, peak: float, steps: int, step: int) -> float:
    """The whole of ``learning_rate`` as it was when there were two names."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if name == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


@given(
    st.sampled_from(["cosine", "constant"]),
    st.integers(1, 100),
    st.integers(0, 100),
    st.floats(1e-6, 10),
    st.floats(0, 1),
)
def test_settings_as_before_give_the_same_bits(name: str, steps: int, warmup: int, peak: float, floor: float):
    options = ScheduleOptions(name=name, warmup_steps=warmup, min_lr=floor * peak)
    for step in range(steps + 5):
        expected = as_before(name, warmup, floor * peak, peak, steps, step)
        assert learning_rate(options, peak, steps, step) == expected


def test_the_defaults_are_those_of_before():
    options = ScheduleOptions()
    assert (options.name, options.warmup, options.warmup_steps) == ("cosine", "gradual", 100)
    assert (options.warmup_start, options.warmup_tokens, options.warmup_epochs, options.min_lr) == (0, 0, 0, 0)


# --- warm-up -----------------------------------------------------------------------------------------------------


def test_gradual_warm_up_from_the_base_rate():
    """Goyal et al. 2017, 2.2: from eta by equal amounts to k eta; here k = 5 and eta = 0.2."""
    line = rates(8, name="constant", warmup_steps=4, warmup_start=0.2)
    assert line == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0], rel=1e-12)


def test_constant_warm_up():
    """Goyal et al. 2017, 2.2: eta for all of the warm-up, then k eta."""
    line = rates(6, 2.0, name="constant", warmup="constant", warmup_steps=3, warmup_start=0.25)
    assert line == [0.5, 0.5, 0.5, 2.0, 2.0, 2.0]
    shared = {"name": "linear", "warmup_steps": 3, "warmup_start": 0.1}
    gradual, constant = (rates(9, warmup=way, **shared) for way in ("gradual", "constant"))
    assert gradual[3:] == constant[3:]
    assert gradual[:3] != constant[:3]


def test_a_constant_warm_up_needs_its_rate():
    options = ScheduleOptions(warmup="constant", warmup_steps=3)
    with pytest.raises(ConfigError, match=r"schedule.warmup=constant needs schedule.warmup_start"):
        check_schedule(options, 1.0, 10)
    check_schedule(options, 1.0, None)  # scaling may still find it
    check_schedule(ScheduleOptions(warmup="constant", warmup_steps=0), 1.0, 10)
    check_schedule(ScheduleOptions(warmup="constant", warmup_steps=3, warmup_start=0.1), 1.0, 10)


# --- shapes, each against its source or torch's own --------------------------------------------------------------


def torch_rates(steps: int, peak: float, make, *args, **kwargs) -> list[float]:
    """Rates that a scheduler of torch gives to its first ``steps`` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, line = make(optimizer, *args, **kwargs), []
    for _ in range(steps):
        line.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return line


@pytest.mark.parametrize("warmup", [0, 3])
def test_linear(warmup: int):
    """From the peak to min_lr in equal steps; min_lr would be the rate of one update more."""
    line = rates(warmup + 5, name="linear", warmup_steps=warmup, min_lr=0.5)
    assert line[warmup:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6], rel=1e-12)
    plain = torch_rates(7, 0.3, torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=5)
    options = ScheduleOptions(name="linear", warmup_steps=0, min_lr=0.03)
    assert [learning_rate(options, 0.3, 5, step) for step in range(7)] == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
def test_polynomial(power: float):
    """torch's own, and You et al. 2020, section 4: lr (1 - t / T)."""
    options = ScheduleOptions(name="polynomial", warmup_steps=0, power=power)
    plain = torch_rates(12, 0.3, torch.optim.lr_scheduler.PolynomialLR, total_iters=10, power=power)
    assert [learning_rate(options, 0.3, 10, step) for step in range(12)] == pytest.approx(plain, rel=1e-9, abs=1e-12)
    floored = rates(14, name="polynomial", warmup_steps=4, power=power, min_lr=0.25)
    assert floored[4:] == pytest.approx([0.25 + 0.75 * (1 - n / 10) ** power for n in range(10)], rel=1e-12)
    if power == 1:
        assert floored == rates(14, name="linear", warmup_steps=4, min_lr=0.25)


@pytest.mark.parametrize("warmup", [1, 5, 40])
def test_inverse_sqrt(warmup: int):
    """Vaswani et al. 2017, eq. 3: d_model^-0.5 min(s^-0.5, s w^-1.5), s from 1; its peak is (d_model w)^-0.5."""
    width = 512
    paper = [width**-0.5 * min(s**-0.5, s * warmup**-1.5) for s in range(1, 101)]
    line = rates(100, (width * warmup) ** -0.5, name="inverse_sqrt", warmup_steps=warmup)
    assert line == pytest.approx(paper, rel=1e-12)
    floored = rates(100, (width * warmup) ** -0.5, name="inverse_sqrt", warmup_steps=warmup, min_lr=paper[80])
    assert floored[warmup:] == pytest.approx([max(paper[80], rate) for rate in paper[warmup:]], rel=1e-12)


def test_inverse_sqrt_without_a_warm_up():
    assert rates(4, name="inverse_sqrt", warmup_steps=0) == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5], rel=1e-12)


@pytest.mark.parametrize("decay", ["1-sqrt", "linear"])
@pytest.mark.parametrize(("steps", "warmup", "share"), [(100, 10, 0.2), (50, 0, 1.0), (37, 5, 0.3), (10, 9, 0.1)])
def test_wsd(decay: str, steps: int, warmup: int, share: float):
    """Hägele et al. 2024, section 3: the peak, then 1 - sqrt((n - (N - D)) / D) or 1 - (n - (N - D)) / D."""
    count = round(share * steps)

    def paper(n: int) -> float:
        if n < warmup:
            return (n + 1) / warmup
        if n <= steps - count:
            return 1.0
        gone = (n - (steps - count)) / count
        return 1 - math.sqrt(gone) if decay == "1-sqrt" else 1 - gone

    options = ScheduleOptions(name="wsd", warmup_steps=warmup, decay=decay, decay_share=share)
    check_schedule(options, 1.0, steps)
    line = [learning_rate(options, 1.0, steps, step) for step in range(steps + 1)]
    assert line == pytest.approx([paper(n) for n in range(steps + 1)], rel=1e-12, abs=1e-12)
    assert line.count(1.0) == steps - count - warmup + 1 + (warmup > 0)
    assert line[-1] == 0
    floored = rates(steps, 2.0, name="wsd", warmup_steps=warmup, decay=decay, decay_share=share, min_lr=0.5)
    assert floored[warmup:] == pytest.approx([0.5 + 1.5 * rate for rate in line[warmup:-1]], rel=1e-12)


@pytest.mark.parametrize(("cycles", "period"), [(1, 12), (3, 8), (49, 3), (7, 1)])
def test_cosine_restarts(cycles: int, period: int):
    """torch's CosineAnnealingWarmRestarts (SGDR with T_mult = 1); with 49 cycles i / 49 * 49 is below i for some i."""
    steps = cycles * period
    make = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    plain = torch_rates(steps, 0.3, make, T_0=period, eta_min=0.03)
    line = rates(steps, 0.3, name="cosine_restarts", warmup_steps=0, min_lr=0.03, cycles=cycles)
    assert line == pytest.approx(plain, rel=1e-9)
    assert [step for step, rate in enumerate(line) if rate == pytest.approx(0.3)] == list(range(0, steps, period))
    later = rates(steps + 5, 0.3, name="cosine_restarts", warmup_steps=5, min_lr=0.03, cycles=cycles)
    assert later[5:] == line


def test_one_cycle_is_the_cosine_to_the_bit():
    for steps, warmup in ((37, 0), (100, 9), (5, 5)):
        options = ScheduleOptions(name="cosine_restarts", warmup_steps=warmup, min_lr=0.1)
        for step in range(steps + 3):
            expected = as_before("cosine", warmup, 0.1, 0.7, steps, step)
            assert learning_rate(options, 0.7, steps, step) == expected


@given(
    st.sampled_from(NAMES),
    st.sampled_from(["1-sqrt", "linear"]),
    st.integers(2, 150),
    st.floats(0, 0.7),
    st.floats(1e-6, 10),
    st.floats(0, 1),
)
def test_every_shape_stays_within_its_bounds(name: str, decay: str, steps: int, part: float, peak: float, floor: float):
    """min_lr <= rate <= peak after the warm-up, the peak reached, the end at min_lr and kept, down all the way."""
    warmup, floor = int(part * steps), floor * peak
    options = ScheduleOptions(name=name, decay=decay, warmup_steps=warmup, min_lr=floor, power=1.5)
    check_schedule(options, peak, steps)
    line = [learning_rate(options, peak, steps, step) for step in range(steps + 3)]
    rest, slack = line[warmup:], 1 + 1e-12
    assert all(floor / slack <= rate <= peak * slack for rate in rest)
    assert all(later <= rate * slack for rate, later in itertools.pairwise(rest))
    if name != "inverse_sqrt":
        assert rest[0] == pytest.approx(peak)
    assert all(0 < rate <= peak * slack for rate in line[:warmup])
    if name not in ("constant", "inverse_sqrt") and warmup < steps:
        assert line[-3:] == pytest.approx([floor] * 3, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "wsd", "warmup_steps": 85}, r"decay_share=0.2 of train.steps=100 is 20 steps, which leaves no room"),
        ({"name": "cosine_restarts", "warmup_steps": 90, "cycles": 11}, r"cycles=11 is more than the 10 steps after"),
    ],
)
def test_a_shape_that_does_not_fit_the_run(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_schedule(ScheduleOptions(**options), 1.0, 100)
    check_schedule(ScheduleOptions(**{**options, "name": "cosine"}), 1.0, 100)
    check_schedule(ScheduleOptions(**options), 1.0, None)


# --- lengths -----------------------------------------------------------------------------------------------------


def test_lengths_in_steps():
    assert Length("train.", 70).in_steps(1000) == 70
    assert Length("train.", 70, tokens=5000).in_steps(1000) == 5
    assert Length("train.", 70, tokens=5001).in_steps(1000) == 6  # no fewer tokens than asked for
    assert Length("train.", 70, tokens=1).in_steps(1000) == 1
    assert Length("train.", 70, epochs=2.0).in_steps(1000, 50_000) == 100
    assert Length("train.", 70, epochs=0.5).in_steps(1000, 3_001) == 2
    assert Length("schedule.warmup_", 0).in_steps(1000) == 0


def test_a_tenth_of_an_epoch_is_a_tenth():
    """The float 0.1 is 0.1000000000000000055: taken as it is, a hundredth step would follow the 99th."""
    assert [Length("train.", 0, epochs=n / 10).in_steps(10, 1000) for n in range(1, 8)] == [10, 20, 30, 40, 50, 60, 70]
    assert Length("train.", 0, epochs=1e-05).in_steps(1, 100_000) == 1


@given(st.integers(1, 10**12), st.integers(1, 10**7))
def test_tokens_are_kept_within_one_step(tokens: int, update_tokens: int):
    steps = Length("train.", 3, tokens=tokens).in_steps(update_tokens)
    assert 0 <= steps * update_tokens - tokens < update_tokens


@given(st.integers(1, 30), st.integers(1, 10**9), st.integers(1, 10**6))
def test_epochs_are_that_many_times_the_corpus(epochs: int, corpus: int, update_tokens: int):
    by_epochs = Length("train.", 3, epochs=float(epochs)).in_steps(update_tokens, corpus)
    assert by_epochs == Length("train.", 3, tokens=epochs * corpus).in_steps(update_tokens)


def test_lengths_that_cannot_be():
    both = r"train.tokens=5 and train.epochs=2 are both given; set one of them to 0"
    with pytest.raises(ConfigError, match=both):
        Length("train.", 100, 5, 2.0)
    with pytest.raises(ConfigError, match=r"train.epochs=2 needs the number of the corpus's tokens"):
        Length("train.", 100, epochs=2.0).in_steps(10)
    for steps in (None, 10):
        with pytest.raises(ConfigError, match=r"schedule.warmup_tokens=5 and schedule.warmup_epochs=0.5 are both"):
            check_schedule(ScheduleOptions(warmup_tokens=5, warmup_epochs=0.5), 1.0, steps)


def test_the_warm_ups_length():
    assert warmup_length(ScheduleOptions(warmup_steps=7)).in_steps(10) == 7
    assert warmup_length(ScheduleOptions(warmup_tokens=101)).in_steps(10) == 11
    assert warmup_length(ScheduleOptions(warmup_epochs=0.25)).in_steps(10, 400) == 10
    assert warmup_length(ScheduleOptions()).is_in_steps
    assert not warmup_length(ScheduleOptions(warmup_tokens=1)).is_in_steps
