"""A recipe at another batch: what the papers say, in exact numbers, and what must hold whatever the numbers."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hvdtrain.errors import ConfigError
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.optim.scaling import Scaled, ScalingOptions, Unscaled, scale, update_size
from hvdtrain.optim.schedules import Length, ScheduleOptions, learning_rate

CONTEXT = 64


def optim_of(name: str = "adamw", **settings) -> OptimOptions:
    return OptimOptions.model_construct(**{**OptimOptions(**settings).model_dump(), "name": name})


def scaled(
    options: dict,
    *,
    batch: int,
    steps: int | Length = 1000,
    optim: OptimOptions | None = None,
    schedule: ScheduleOptions | None = None,
    context: int = CONTEXT,
    global_tokens: int = 0,
    **known: int,
) -> Scaled:
    length = Length("train.", steps) if isinstance(steps, int) else steps
    rates = optim or optim_of(), schedule or ScheduleOptions()
    return scale(Unscaled(ScalingOptions(**options), *rates, length, context, batch, global_tokens), **known)


def fails(message: str, *args, **kwargs) -> None:
    with pytest.raises(ConfigError, match=message):
        scaled(*args, **kwargs)


# --- exact values ------------------------------------------------------------------------------------------------


def test_the_square_root_rule():
    """16 times the batch: 4 times the rate (You et al. 2020), a sixteenth of the steps, rounded up."""
    found = scaled({"rule": "sqrt", "base_batch": 32}, batch=512, schedule=ScheduleOptions(min_lr=1e-4))
    assert (found.global_batch, found.global_tokens, found.factor) == (512, 0, 16.0)
    assert (found.steps, found.warmup_steps) == (63, 50)  # of 100 steps, four fifths of the run
    assert found.lr == pytest.approx(4e-3, rel=1e-15)
    assert found.min_lr == pytest.approx(4e-4, rel=1e-15)
    assert (found.beta1, found.beta2, found.eps, found.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert found.notes == ()
    assert found.about == (
        "scaling: batch 32 -> 512 sequences (16x), lr 0.001 -> 0.004 (sqrt: You et al. 2020), "
        "warm-up 100 -> 50 steps, run 1000 -> 63 steps"
    )


def test_the_linear_rule():
    """Goyal et al. 2017: 0.1 for 256 images becomes 3.2 for 8,192; 5 of 90 epochs of warm-up stay 5 of 90."""
    optim = optim_of("sgd", lr=0.1)
    epoch = 1_281_167
    found = scaled(
        {"rule": "linear", "base_batch": 256},
        batch=8192,
        steps=Length("train.", 1000, epochs=90.0),
        optim=optim,
        schedule=ScheduleOptions(warmup_epochs=5.0),
        context=1,
        epoch_tokens=epoch,
    )
    assert found.lr == pytest.approx(3.2, rel=1e-15)
    assert found.warmup_steps == math.ceil(5 * epoch / 8192) == 782
    assert found.steps == math.ceil(90 * epoch / 8192) == 14_076
    assert found.about == (
        "scaling: batch 256 -> 8192 sequences (32x), lr 0.1 -> 3.2 (linear: Goyal et al. 2017), "
        "warm-up 25023 -> 782 steps, run 450411 -> 14076 steps"
    )
    assert found.notes == ()


def test_no_rule_keeps_the_rate_and_shortens_the_run():
    """What "unscaled" means at equal tokens."""
    found = scaled({"base_batch": 12, "warmup": "tokens"}, batch=192, steps=2000)
    assert (found.lr, found.steps, found.warmup_steps) == (1e-3, 125, 7)
    assert "lr 0.001 -> 0.001 (none), warm-up 100 -> 7 steps, run 2000 -> 125 steps" in found.about


def test_nothing_stated_is_nothing_done():
    schedule = ScheduleOptions(min_lr=1e-5, warmup_steps=33)
    found = scaled({}, batch=48, steps=777, optim=optim_of(lr=0.3), schedule=schedule)
    assert (found.steps, found.warmup_steps, found.lr, found.min_lr) == (777, 33, 0.3, 1e-5)
    assert (found.about, found.notes, found.factor, found.global_batch) == ("", (), 1.0, 48)


def test_a_smaller_batch_than_the_base():
    found = scaled({"rule": "sqrt", "base_batch": 32}, batch=8)
    assert (found.lr, found.steps, found.warmup_steps) == (5e-4, 4000, 100)
    assert "(0.25x)" in found.about


@pytest.mark.parametrize(
    ("optimizer", "batch", "schedule", "expected"),
    [
        ("adamw", 64, {}, 100),
        ("lamb", 64, {}, 100),
        ("adamw", 8, {}, 100),
        ("adamw", 512, {}, 50),  # of 63 steps
        ("adamw", 256, {"name": "wsd", "decay_share": 0.2}, 80),  # of 100 before the decay
        ("adamw", 256, {"warmup_steps": 900}, 113),  # the same tokens take more than four fifths of the run
        ("adamw", 64, {"warmup_tokens": 3200 * CONTEXT}, 50),  # given in tokens
        ("adamw", 64, {"warmup_steps": 0}, 0),
        ("muon", 64, {}, 50),
        ("sgd", 64, {}, 50),
        ("lars", 64, {}, 50),
    ],
)
def test_the_warm_up_is_as_fits_the_optimizer(optimizer: str, batch: int, schedule: dict, expected: int):
    """Its steps for AdamW and LAMB, where they fit into the run; its tokens for others, and where they are given."""
    found = scaled({"base_batch": 32}, batch=batch, optim=optim_of(optimizer), schedule=ScheduleOptions(**schedule))
    assert found.warmup_steps == expected


def test_the_warm_up_of_lamb_as_in_its_paper():
    """You et al. 2020, table 4: 1/320 of the 1,000,000 steps of 512 sequences, 1/5 of the 15,625 of 32,768."""
    schedule = ScheduleOptions(warmup_steps=3125)
    found = scaled({"base_batch": 512}, batch=32_768, steps=1_000_000, optim=optim_of("lamb"), schedule=schedule)
    assert (found.warmup_steps, found.steps) == (3125, 15_625)


@pytest.mark.parametrize(
    ("warmup", "length", "expected"),
    [
        ("tokens", "tokens", (7, 63)),
        ("epochs", "tokens", (7, 63)),
        ("none", "tokens", (0, 63)),
        ("tokens", "steps", (7, 1000)),
        ("steps", "steps", (100, 1000)),
    ],
)
def test_what_stays_the_same(warmup: str, length: str, expected: tuple[int, int]):
    found = scaled({"base_batch": 32, "warmup": warmup, "length": length}, batch=512)
    assert (found.warmup_steps, found.steps) == expected


def test_lengths_in_tokens_need_no_scaling():
    """10,001 tokens at 1,024 an update are 10 steps, whatever the base; with length: steps, as many as at the base."""
    length, schedule = Length("train.", 1000, tokens=10_001), ScheduleOptions(warmup_tokens=2_000)
    found = scaled({"rule": "sqrt", "base_batch": 4}, batch=16, steps=length, schedule=schedule)
    assert (found.steps, found.warmup_steps) == (10, 2)
    kept = {"base_batch": 4, "length": "steps", "warmup": "steps"}
    found = scaled(kept, batch=16, steps=length, schedule=schedule)
    assert (found.steps, found.warmup_steps) == (40, 8)
    found = scaled({}, batch=16, steps=length, schedule=schedule)
    assert (found.steps, found.warmup_steps, found.about) == (10, 2, "")
    resolved = found.schedule(schedule)
    assert (resolved.warmup_steps, resolved.warmup_tokens, resolved.warmup_epochs) == (2, 0, 0.0)


def test_batches_in_tokens():
    """Base and batch may each be in sequences or in tokens; a sequence is ``context`` of them."""
    found = scaled({"rule": "sqrt", "base_tokens": 2048}, batch=1, global_tokens=8192)
    assert (found.global_batch, found.global_tokens, found.factor) == (1, 8192, 4.0)
    assert "batch 2048 -> 8192 tokens (4x), lr 0.001 -> 0.002" in found.about
    for base, sizes in (
        ({"base_batch": 32}, {"batch": 1, "global_tokens": 8192}),
        ({"base_tokens": 2048}, {"batch": 128}),
        ({"base_batch": 32}, {"batch": 128}),
    ):
        again = scaled({"rule": "sqrt", **base}, **sizes)
        assert (again.factor, again.lr, again.steps) == (4.0, found.lr, found.steps)
    assert "batch 100 -> 8192 tokens (81.92x)" in scaled({"base_tokens": 100}, batch=128).about


# --- the moments -------------------------------------------------------------------------------------------------


def test_moments_by_the_square_root_rule():
    """Malladi et al. 2022 at 4 times the batch: 1 - beta grows 4 times, eps halves; weight decay doubles."""
    optim = optim_of(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1)
    found = scaled({"rule": "sqrt", "base_batch": 8, "betas": True}, batch=32, optim=optim)
    assert found.lr == pytest.approx(2e-3, rel=1e-12)
    assert (found.beta1, found.beta2) == pytest.approx((0.6, 0.92), rel=1e-12)
    assert (found.eps, found.weight_decay) == pytest.approx((5e-9, 0.2), rel=1e-12)
    assert found.notes == ()
    assert (
        "lr 0.001 -> 0.002 (sqrt: You et al. 2020), betas 0.9, 0.98 -> 0.6, 0.92, eps 1e-08 -> 5e-09 "
        "(Malladi et al. 2022), weight decay 0.1 -> 0.2, warm-up" in found.about
    )
    resolved = found.optim(optim)
    assert (resolved.lr, resolved.beta1, resolved.beta2) == (found.lr, found.beta1, found.beta2)
    assert (resolved.eps, resolved.weight_decay, resolved.clip_norm) == (found.eps, found.weight_decay, 1.0)


def test_a_token_shrinks_a_weight_as_before():
    """The shrinking of the whole run, updates x lr x weight decay, is kept where betas are scaled, and not else."""
    rule = {"rule": "sqrt", "base_batch": 8}
    for betas, expected in ((True, 100.0 * 1e-3 * 0.1), (False, 25.0 * 2e-3 * 0.1)):
        found = scaled({**rule, "betas": betas}, batch=32, steps=100, schedule=ScheduleOptions(warmup_steps=0))
        assert found.steps * found.lr * found.weight_decay == pytest.approx(expected, rel=1e-12)


def test_a_batch_too_large_for_the_moments():
    rule = {"rule": "sqrt", "base_batch": 12, "betas": True}
    found = scaled(rule, batch=192, optim=optim_of(beta2=0.99))
    assert found.beta1 == 0.0
    assert found.beta2 == pytest.approx(0.84, rel=1e-12)
    assert found.notes == ("scaling.betas: beta1 of 0.9 would be -0.6 at 16x the batch; 0 is used",)
    none = scaled(rule, batch=192, optim=optim_of(beta1=0.0, beta2=0.99))
    assert (none.beta1, none.notes) == (0.0, ())
    assert scaled(rule, batch=6, optim=optim_of(beta1=0.0)).beta1 == 0.0
    fails(r"takes beta2 from 0.95 to -0.6; the rule holds below 20x", rule, batch=12 * 32, optim=optim_of(beta2=0.95))


# --- warm-up -----------------------------------------------------------------------------------------------------


def test_a_constant_warm_up_is_at_the_base_rate():
    """Goyal et al. 2017, 2.2: eta while the warm-up lasts, then k eta."""
    schedule = ScheduleOptions(name="constant", warmup="constant", warmup_steps=4)
    found = scaled({"rule": "linear", "base_batch": 8}, batch=16, optim=optim_of("sgd", lr=0.1), schedule=schedule)
    resolved = found.schedule(schedule)
    line = [learning_rate(resolved, found.lr, found.steps, step) for step in range(4)]
    assert line == pytest.approx([0.1, 0.1, 0.2, 0.2], rel=1e-12)
    stated = ScheduleOptions(warmup="constant", warmup_start=0.3)
    assert scaled({"rule": "sqrt", "base_batch": 8}, batch=16, schedule=stated).warmup_start == 0.3
    assert scaled({"rule": "sqrt", "base_batch": 8}, batch=8, schedule=schedule).warmup_start == 1.0
    assert scaled({"rule": "sqrt", "base_batch": 8}, batch=4, schedule=schedule).warmup_start == 1.0
    assert scaled({"rule": "sqrt", "base_batch": 8}, batch=16).warmup_start == 0.0  # gradual: from 0, as ever
    fails(r"schedule.warmup=constant needs schedule.warmup_start", {}, batch=8, schedule=schedule)


def test_a_warm_up_longer_than_the_run():
    options = {"rule": "sqrt", "base_batch": 32, "warmup": "steps"}
    fails(
        r"batch 32 -> 512 sequences \(16x\): the warm-up of 100 steps is longer than the run, then of 63; set",
        options,
        batch=512,
    )
    fails(r"schedule.warmup_steps=100 is longer than train.steps=99", {}, batch=8, steps=99)
    wsd = ScheduleOptions(name="wsd", decay_share=0.9, warmup_steps=100)
    fails(r"schedule.decay_share=0.9 of train.steps=63 is 57 steps", {"base_batch": 32}, batch=512, schedule=wsd)


# --- a cap, absurd rates -----------------------------------------------------------------------------------------


def test_the_cap():
    schedule = ScheduleOptions(min_lr=1e-4)
    rule = {"rule": "sqrt", "base_batch": 32}
    found = scaled({**rule, "max_lr": 3e-3}, batch=512, schedule=schedule)
    assert found.lr == 3e-3
    assert found.min_lr == pytest.approx(3e-4, rel=1e-12)
    assert "lr 0.001 -> 0.003 (sqrt: You et al. 2020, at scaling.max_lr)" in found.about
    assert scaled({**rule, "max_lr": 5e-3}, batch=512) == scaled(rule, batch=512)
    fails(r"scaling.max_lr=0.0005 is below optim.lr=0.001", {**rule, "max_lr": 5e-4}, batch=512)


def test_absurd_rates():
    rule = {"rule": "linear", "base_batch": 1}
    fails(
        r"4096 sequences \(4096x\) takes lr from 0.01 to 40.96 \(linear\); adamw needs one above 0 and at most 10: set",
        rule,
        batch=4096,
        optim=optim_of(lr=0.01),
    )
    assert scaled(rule, batch=4096, optim=optim_of("lars", lr=0.01)).lr == pytest.approx(40.96)  # usual for LARS
    fails("lars needs one above 0 and at most 1000: set", rule, batch=10**6, optim=optim_of("lars", lr=0.01))
    fails("lr from 1e-300 to 0 ", {"rule": "linear", "base_batch": 10**30}, batch=1, optim=optim_of(lr=1e-300))
    assert scaled({**rule, "max_lr": 1.0}, batch=4096, optim=optim_of(lr=0.01)).lr == 1.0
    assert scaled({}, batch=4096, optim=optim_of(lr=50.0)).lr == 50.0  # not our doing


# --- what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "sgd", "lars"])
@pytest.mark.parametrize("rule", ["none", "auto", "linear", "sqrt"])
def test_a_rule_with_an_optimizer_that_it_does_not_fit(name: str, rule: str):
    notes = scaled({"rule": rule, "base_batch": 8}, batch=16, optim=optim_of(name)).notes
    wrong = {("linear", "adamw"), ("linear", "lamb"), ("linear", "muon"), ("sqrt", "sgd"), ("sqrt", "lars")}
    assert len(notes) == ((rule, name) in wrong)
    if notes:
        paper = "Malladi et al. 2022" if rule == "linear" else "Goyal et al. 2017"
        paper = "as for AdamW" if name == "muon" else paper
        assert f"scaling.rule={rule}" in notes[0]
        assert f"with {name}" in notes[0]
        assert paper in notes[0]


@pytest.mark.parametrize(
    ("name", "rule"), [("adamw", "sqrt"), ("lamb", "sqrt"), ("muon", "sqrt"), ("sgd", "linear"), ("lars", "linear")]
)
def test_auto_is_the_rule_that_fits_the_optimizer(name: str, rule: str):
    by_itself, named = (
        scaled({"rule": one, "base_batch": 8}, batch=32, optim=optim_of(name)) for one in ("auto", rule)
    )
    assert by_itself == named
    assert f"({rule}: " in by_itself.about


def test_both_rates_of_muon_grow_alike():
    optim = optim_of("muon", lr=0.01, adamw_lr=0.002)
    found = scaled({"rule": "auto", "base_batch": 12}, batch=192, optim=optim)
    assert (found.lr, found.adamw_lr) == pytest.approx((0.04, 0.008), rel=1e-12)
    assert "lr 0.01 -> 0.04 (sqrt: as for AdamW), adamw_lr 0.002 -> 0.008, warm-up" in found.about
    assert found.optim(optim).adamw_lr == found.adamw_lr
    assert scaled({"rule": "auto", "base_batch": 12}, batch=192, optim=optim_of("muon")).adamw_lr == 0.0  # as lr


def test_moments_that_do_not_fit():
    betas = {"rule": "sqrt", "base_batch": 8, "betas": True}
    assert ["derived for Adam" in note for note in scaled(betas, batch=16, optim=optim_of("lamb")).notes] == [True]
    message = r"scaling.betas goes with scaling.rule=sqrt and optim.name=adamw or lamb, not with "
    fails(message + "linear and adamw", {**betas, "rule": "linear"}, batch=16)
    fails(message + "none and adamw", {"betas": True}, batch=16)
    fails(message + "sqrt and sgd", betas, batch=16, optim=optim_of("sgd"))


@pytest.mark.parametrize("rule", ["auto", "linear", "sqrt"])
def test_a_rule_needs_one_base(rule: str):
    missing = f"scaling.rule={rule} needs the batch that optim.lr was made for: set scaling.base_batch"
    fails(missing, {"rule": rule}, batch=8)
    both = {"rule": rule, "base_batch": 8, "base_tokens": 512}
    fails(r"scaling.base_batch=8 and scaling.base_tokens=512 are both given; set one of them to 0", both, batch=8)


def test_bad_schedules_are_found_before_scaling():
    schedule, rule = ScheduleOptions(min_lr=1e-2), {"rule": "sqrt", "base_batch": 8}
    fails(r"schedule.min_lr=0.01 is above optim.lr=0.001", rule, batch=64, schedule=schedule)


@pytest.mark.parametrize(
    "wrong", [{"rule": "cube"}, {"base_batch": -1}, {"warmup": "rows"}, {"length": "epochs"}, {"base_ranks": 0}]
)
def test_wrong_values_are_refused(wrong: dict):
    with pytest.raises(ValidationError):
        ScalingOptions(**wrong)


# --- fixed, or growing with the ranks ----------------------------------------------------------------------------


def test_the_batch_is_fixed_unless_it_grows():
    """4 -> 64 ranks: the same run, or 16 times the batch, by one switch."""
    fixed, growing = {"rule": "sqrt"}, {"rule": "sqrt", "per_rank": True, "base_ranks": 4}
    runs = [scaled({**fixed, "base_batch": 32}, batch=32, ranks=ranks) for ranks in (1, 4, 64)]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0].global_batch == 32
    found = scaled(growing, batch=32, ranks=64)
    assert (found.global_batch, found.factor, found.steps) == (512, 16.0, 63)
    assert found.lr == pytest.approx(4e-3, rel=1e-15)
    assert scaled(growing, batch=32, ranks=4).lr == 1e-3
    assert scaled({**growing, "base_batch": 8}, batch=32, ranks=4).factor == 4.0  # lr is that of 8, the batch is 32
    found = scaled(growing, batch=7, ranks=8, global_tokens=1024)
    assert (found.global_batch, found.global_tokens, found.factor) == (7, 2048, 2.0)


def test_a_batch_that_does_not_grow_to_a_whole_number():
    options = ScalingOptions(per_rank=True, base_ranks=4)
    assert update_size(options, 32, 0, 3) == (24, 0)
    assert update_size(options, 30, 0, 4) == (30, 0)
    with pytest.raises(ConfigError, match=r"train.global_batch=30 for scaling.base_ranks=4 ranks is 22.50 for 3, not"):
        update_size(options, 30, 0, 3)
    with pytest.raises(ConfigError, match=r"train.global_tokens=1025 for"):
        update_size(options, 30, 1025, 3)
    assert update_size(ScalingOptions(), 30, 1025, 3) == (30, 1025)


# --- whatever the numbers ----------------------------------------------------------------------------------------

RULES = st.sampled_from(["none", "linear", "sqrt"])
RATES = st.floats(1e-7, 1e-2)


@given(
    RULES,
    st.integers(1, 4096),
    RATES,
    st.floats(0, 1),
    st.floats(0, 0.999),
    st.floats(0.001, 0.9999),
    st.integers(1, 10**6),
    st.floats(0, 1),
    st.sampled_from(["auto", "tokens", "epochs", "steps", "none"]),
    st.booleans(),
)
def test_factor_1_changes_nothing_to_the_bit(
    rule: str,
    batch: int,
    lr: float,
    floor: float,
    beta1: float,
    beta2: float,
    steps: int,
    part: float,
    warmup: str,
    in_tokens: bool,
):
    optim = optim_of(lr=lr, beta1=beta1, beta2=beta2, eps=lr * 1e-3, weight_decay=floor)
    schedule = ScheduleOptions(warmup_steps=int(part * steps), min_lr=floor * lr, warmup_start=part)
    base = {"base_tokens": batch * CONTEXT} if in_tokens else {"base_batch": batch}
    options = {"rule": rule, "betas": rule == "sqrt", "max_lr": lr, "warmup": warmup, **base}
    found = scaled(options, batch=batch, steps=steps, optim=optim, schedule=schedule)
    assert (found.global_batch, found.global_tokens, found.factor, found.steps) == (batch, 0, 1.0, steps)
    assert found.optim(optim) == optim
    assert found.schedule(schedule) == schedule


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 10**6), st.floats(0, 1))
def test_tokens_of_run_and_warm_up_are_kept_within_one_step(base: int, batch: int, steps: int, part: float):
    schedule = ScheduleOptions(warmup_steps=int(part * steps))
    found = scaled({"base_batch": base, "warmup": "tokens"}, batch=batch, steps=steps, schedule=schedule)
    assert 0 <= found.steps * batch - steps * base < batch
    assert 0 <= found.warmup_steps * batch - schedule.warmup_steps * base < batch
    assert found.warmup_steps <= found.steps
    assert found.steps >= 1


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 10**6), st.floats(0, 1))
def test_a_warm_up_in_steps_is_no_shorter_than_in_tokens_and_no_longer_than_the_run(
    base: int, batch: int, steps: int, part: float
):
    schedule = ScheduleOptions(warmup_steps=int(part * steps))
    found = scaled({"base_batch": base}, batch=batch, steps=steps, schedule=schedule)
    tokens = scaled({"base_batch": base, "warmup": "tokens"}, batch=batch, steps=steps, schedule=schedule)
    least, most = sorted((tokens.warmup_steps, schedule.warmup_steps))
    assert least <= found.warmup_steps <= min(most, found.steps)
    assert base != batch or found.warmup_steps == schedule.warmup_steps


@given(RULES, st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096), RATES, st.floats(0, 1), st.booleans())
def test_a_larger_batch_has_no_lower_rate_and_no_longer_run(
    rule: str, base: int, batch: int, other: int, lr: float, floor: float, is_capped: bool
):
    small, large = sorted((batch, other))
    optim, schedule = optim_of("lars", lr=lr), ScheduleOptions(min_lr=floor * lr, warmup_steps=500)
    options = {"rule": rule, "base_batch": base, "max_lr": 3 * lr if is_capped else 0.0}
    low, high = (scaled(options, batch=size, optim=optim, schedule=schedule) for size in (small, large))
    assert low.lr <= high.lr
    assert low.min_lr <= high.min_lr * (1 + 1e-12)
    assert low.steps >= high.steps
    assert low.warmup_steps >= high.warmup_steps
    assert all(found.min_lr <= found.lr for found in (low, high))
    assert low.min_lr * high.lr == pytest.approx(high.min_lr * low.lr, rel=1e-9)  # min_lr is scaled as lr is


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_two_steps_are_one(base: int, middle: int, times: int):
    """Scaling to a batch, and from there to another, is scaling to that: rates and moments."""
    optim = optim_of(beta1=0.999, beta2=0.9999)
    options = {"rule": "sqrt", "betas": True, "length": "steps", "warmup": "steps"}
    last = middle * times
    halfway = scaled({**options, "base_batch": base}, batch=middle, optim=optim)
    there = scaled({**options, "base_batch": middle}, batch=last, optim=halfway.optim(optim))
    direct = scaled({**options, "base_batch": base}, batch=last, optim=optim)
    for name in ("lr", "beta1", "beta2", "eps", "weight_decay"):
        assert getattr(there, name) == pytest.approx(getattr(direct, name), rel=1e-9), name


def test_what_is_found_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        scaled({}, batch=8).lr = 1.0
