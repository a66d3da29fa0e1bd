"""A recipe at another batch than the one it was made for: learning rate, warm-up and length by a stated rule.

    what                     times, with k = batch / base batch           source
    lr, adamw_lr, min_lr     k (linear): sgd, lars                        Goyal et al. 2017, section 2.1
                             sqrt k (sqrt): adamw, lamb                   You et al. 2020; Malladi et al. 2022
                             sqrt k (sqrt): muon                          none: as for AdamW, see below
    steps of the run         1 / k: the same tokens, hence epochs         Goyal et al. 2017, section 2.2
    steps of warm-up         1: adamw, lamb                               You et al. 2020, table 4; see below
                             1 / k: sgd, lars, muon                       Goyal et al. 2017, section 2.2
    1 - beta1, 1 - beta2     k (with ``betas``)                           Malladi et al. 2022, square root rule
    eps                      1 / sqrt k (with ``betas``)                  the same
    weight decay             sqrt k (with ``betas``)                      lr x weight decay x steps stays

All of it is arithmetic on what the recipe says; nothing is measured. Where the base batch is not stated, nothing moves.

Adam's second moments need a number of updates, whatever their size. You et al. 2020 let the epochs of warm-up grow with
the batch, which is the same number of steps at every batch; with the tokens kept, AdamW loses 42 % instead of 10 % at
8 times the batch (make bench BENCH=large_batch). Muon, whose momentum alone counts, loses nothing by the shorter one.

Nobody has derived a rule for Muon. It is given AdamW's, because its updates are as large (Liu et al. 2025, 2502.16982)
and its other parameters are AdamW's; make bench BENCH=large_batch compares rules with rates that are tuned.

Sources: Goyal et al. 2017 (1706.02677), Hoffer et al. 2017 (1705.08741), You et al. 2020 (1904.00962), Malladi et al.
2022 (2205.10287).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.optim.schedules import Length, ScheduleOptions, before_decay, check_schedule, warmup_length
from hvdtrain.options import Options, option


class ScalingOptions(Options):
    rule: Literal["none", "auto", "linear", "sqrt"] = option(
        "none",
        "how optim.lr, optim.adamw_lr and schedule.min_lr grow with the batch; auto: as fits the optimizer: linear for "
        "sgd and lars, sqrt for adamw, lamb and muon",
    )
    base_batch: int = option(
        0, "sequences of an update that lr, warm-up and length of the recipe were made for; 0: not stated", ge=0
    )
    base_tokens: int = option(0, "the same in tokens, padding counted, instead of base_batch; 0: not stated", ge=0)
    warmup: Literal["auto", "tokens", "epochs", "steps", "none"] = option(
        "auto",
        "what of the warm-up stays the same at another batch (epochs: as tokens); auto: for adamw and lamb the steps "
        "where the recipe gives steps, up to four fifths of the run, else the tokens; none: no warm-up there",
    )
    length: Literal["tokens", "steps"] = option("tokens", "what of the run's length stays the same at another batch")
    betas: bool = option(False, "with sqrt for adamw and lamb: scale betas, eps and weight decay too")
    max_lr: float = option(0.0, "no scaled learning rate above this; 0: no limit", ge=0)
    per_rank: bool = option(
        False, "the recipe's batch is that of base_ranks replicas and grows with their number; else it is fixed"
    )
    base_ranks: int = option(
        1, "per_rank: replicas that the batch of the recipe is for; without mesh.* a replica is a rank", ge=1
    )


@dataclass(frozen=True)
class Scaled:
    """What a run uses. ``global_tokens`` as in the recipe: 0 where the batch is given in sequences (``global_batch``).

    ``factor``: batch / base batch. ``about``: one line for rank 0 to print; empty where no base is stated.
    ``notes``: one line each on what does not fit.
    """

    global_batch: int
    global_tokens: int
    factor: float
    steps: int
    warmup_steps: int
    warmup_start: float
    lr: float
    adamw_lr: float
    min_lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    about: str
    notes: tuple[str, ...]

    def optim(self, options: OptimOptions) -> OptimOptions:
        names = ("lr", "adamw_lr", "beta1", "beta2", "eps", "weight_decay")
        return options.model_copy(update={name: getattr(self, name) for name in names})

    def schedule(self, options: ScheduleOptions) -> ScheduleOptions:
        """With the warm-up in steps."""
        names = ("min_lr", "warmup_steps", "warmup_start")
        resolved = {name: getattr(self, name) for name in names}
        return options.model_copy(update={**resolved, "warmup_tokens": 0, "warmup_epochs": 0.0})


@dataclass(frozen=True)
class Unscaled:
    """Batch, rates and lengths as a recipe gives them. ``context``: tokens of a sequence. ``global_tokens``: 0 where
    the batch is given in sequences (``global_batch``).
    """

    scaling: ScalingOptions
    optim: OptimOptions
    schedule: ScheduleOptions
    length: Length
    context: int
    global_batch: int
    global_tokens: int = 0


_ADAM_LIKE = ("adamw", "lamb")
_FITS = {"adamw": "sqrt", "lamb": "sqrt", "muon": "sqrt", "sgd": "linear", "lars": "linear"}
_LARGEST_ADAM_RATE, _LARGEST_RATE = 10.0, 1000.0  # an update of Adam moves a weight by about the rate


def update_size(options: ScalingOptions, global_batch: int, global_tokens: int = 0, ranks: int = 1) -> tuple[int, int]:
    """(sequences, tokens) of an update on ``ranks`` ranks, from the recipe's; the tokens 0 where sequences count.

    ranks: that share the data, each with a replica of its own.
    Needs no data, so that batches can be laid out before the corpus is open.
    Errors: ConfigError where growing with the ranks gives no whole number.
    """
    if not options.per_rank or ranks == options.base_ranks:
        return global_batch, global_tokens
    key, size = ("train.global_tokens", global_tokens) if global_tokens else ("train.global_batch", global_batch)
    if size * ranks % options.base_ranks:
        raise ConfigError(
            f"scaling.per_rank: {key}={size} for scaling.base_ranks={options.base_ranks} ranks is "
            f"{size * ranks / options.base_ranks:.2f} for {ranks}, not a whole number; change one of the three"
        )
    grown = size * ranks // options.base_ranks
    return (global_batch, grown) if global_tokens else (grown, 0)


def scale(
    given: Unscaled, ranks: int = 1, epoch_tokens: int = 0, lengthened: Callable[[int], int] | None = None
) -> Scaled:
    """What the run uses at its batch: a pure function, the same on every rank.

    epoch_tokens: of the corpus, needed where a length is in epochs; 0: not known. lengthened: for a batch that grows
    within the run, the steps in which it takes as many rows as in that number of steps with the whole batch; lengths
    that are given in steps, for this batch, stay what they are.
    Errors: ConfigError where a rule has no base or two, the result is no learning rate that one would train with, or
    the warm-up is longer than the run.
    """
    _check_base(given.scaling)
    if given.scaling.rule == "auto":
        fitting = given.scaling.model_copy(update={"rule": _FITS[given.optim.name]})
        given = replace(given, scaling=fitting)
    options, optim, schedule = given.scaling, given.optim, given.schedule
    _check(options, optim)
    check_schedule(schedule, optim.lr, None)
    rows, tokens = update_size(options, given.global_batch, given.global_tokens, ranks)
    change = _change_of(given, rows, tokens)
    is_scaled = bool(options.base_batch or options.base_tokens or options.per_rank)

    steps = _steps(given.length, options.length, change, epoch_tokens, lengthened)
    warmup = _warmup(given, change, steps, epoch_tokens, lengthened)
    lr, adamw_lr, min_lr = _rates(options, optim, schedule.min_lr, change)
    beta1, beta2, eps, decay, beta_notes = _moments(options, optim, change)
    start = schedule.warmup_start
    if is_scaled and schedule.warmup == "constant" and not start:
        start = min(1.0, optim.lr / lr)  # Goyal et al. 2017, "constant warmup": the base rate, which is lr / k
    if is_scaled and warmup > steps:
        raise ConfigError(
            f"scaling: {change.words}: the warm-up of {warmup} steps is longer than the run, then of {steps}; "
            "set scaling.warmup=auto, scaling.length=steps or a shorter warm-up"
        )

    scaled = Scaled(
        global_batch=rows,
        global_tokens=tokens,
        factor=float(change.factor),
        steps=steps,
        warmup_steps=warmup,
        warmup_start=start,
        lr=lr,
        adamw_lr=adamw_lr,
        min_lr=min_lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=decay,
        about="",
        notes=(*_fit_notes(options, optim), *beta_notes),
    )
    check_schedule(scaled.schedule(schedule), lr, steps)
    return replace(scaled, about=_about(given, scaled, change, epoch_tokens)) if is_scaled else scaled


@dataclass(frozen=True)
class _Change:
    """From the batch that the recipe was made for to the one that is used: tokens of an update, and in words."""

    base: int
    new: int
    words: str

    @property
    def factor(self) -> Fraction:
        return Fraction(self.new, self.base)


def _change_of(given: Unscaled, rows: int, tokens: int) -> _Change:
    """rows, tokens: of an update as it is used, see ``update_size``."""
    options, context = given.scaling, given.context
    new = tokens or rows * context
    base = options.base_tokens or options.base_batch * context
    if not base:  # not stated: with per_rank what the recipe says, else what is used
        base = (given.global_tokens or given.global_batch * context) if options.per_rank else new
    in_rows = not tokens and base % context == 0
    sizes = f"{base // context} -> {rows} sequences" if in_rows else f"{base} -> {new} tokens"
    return _Change(base, new, f"batch {sizes} ({new / base:.4g}x)")


def _about(given: Unscaled, scaled: Scaled, change: _Change, epoch_tokens: int) -> str:
    options, optim = given.scaling, given.optim
    lengths = warmup_length(given.schedule), given.length
    base_warmup, base_steps = (length.in_steps(change.base, epoch_tokens) for length in lengths)
    source = {"none": "", "linear": ": Goyal et al. 2017", "sqrt": ": You et al. 2020"}[options.rule]
    if (options.rule, optim.name) == ("sqrt", "muon"):
        source = ": as for AdamW"
    if options.max_lr and scaled.lr == options.max_lr != optim.lr:
        source += ", at scaling.max_lr"
    parts = [f"scaling: {change.words}", f"lr {optim.lr:g} -> {scaled.lr:g} ({options.rule}{source})"]
    if optim.name == "muon" and optim.adamw_lr:
        parts[-1] += f", adamw_lr {optim.adamw_lr:g} -> {scaled.adamw_lr:g}"
    if options.betas:
        parts += [
            f"betas {optim.beta1:g}, {optim.beta2:g} -> {scaled.beta1:g}, {scaled.beta2:g}",
            f"eps {optim.eps:g} -> {scaled.eps:g} (Malladi et al. 2022)",
            f"weight decay {optim.weight_decay:g} -> {scaled.weight_decay:g}",
        ]
    parts += [f"warm-up {base_warmup} -> {scaled.warmup_steps} steps", f"run {base_steps} -> {scaled.steps} steps"]
    return ", ".join(parts)


def _check_base(options: ScalingOptions) -> None:
    if options.base_batch and options.base_tokens:
        raise ConfigError(
            f"scaling.base_batch={options.base_batch} and scaling.base_tokens={options.base_tokens} are both given; "
            "set one of them to 0"
        )
    is_stated = options.base_batch or options.base_tokens or options.per_rank
    if options.rule != "none" and not is_stated:
        raise ConfigError(
            f"scaling.rule={options.rule} needs the batch that optim.lr was made for: set scaling.base_batch "
            "(sequences) or scaling.base_tokens"
        )


def _check(options: ScalingOptions, optim: OptimOptions) -> None:
    if options.betas and (options.rule != "sqrt" or optim.name not in _ADAM_LIKE):
        raise ConfigError(
            f"scaling.betas goes with scaling.rule=sqrt and optim.name={' or '.join(_ADAM_LIKE)}, "
            f"not with {options.rule} and {optim.name}"
        )
    if options.rule != "none" and 0 < options.max_lr < optim.lr:
        raise ConfigError(f"scaling.max_lr={options.max_lr:g} is below optim.lr={optim.lr:g}, the base batch's rate")


def _steps(
    length: Length, keep: str, change: _Change, epoch_tokens: int, lengthened: Callable[[int], int] | None
) -> int:
    """Updates of the new batch that a length made for the base batch takes. Tokens are kept or exceeded, by less than
    one update's.
    """
    base, new = change.base, change.new
    steps = length.in_steps(base, epoch_tokens)
    if keep == "none" and base != new:
        return 0
    if keep == "steps" or (base == new and (length.is_in_steps or lengthened is None)):
        return steps
    steps = -(-steps * base // new) if length.is_in_steps else length.in_steps(new, epoch_tokens)
    return lengthened(steps) if lengthened else steps


def _warmup(
    given: Unscaled, change: _Change, run: int, epoch_tokens: int, lengthened: Callable[[int], int] | None
) -> int:
    """Steps of warm-up in a run of ``run`` steps. auto: at most four fifths of those before a decay at the end,
    unless the same tokens take more.
    """
    length, keep = warmup_length(given.schedule), given.scaling.warmup
    if keep != "auto":
        return _steps(length, keep, change, epoch_tokens, lengthened)
    in_tokens = _steps(length, "tokens", change, epoch_tokens, lengthened)
    if given.optim.name not in _ADAM_LIKE or not length.is_in_steps:
        return in_tokens
    return min(length.steps, max(in_tokens, 4 * before_decay(given.schedule, run) // 5))


def _rates(options: ScalingOptions, optim: OptimOptions, min_lr: float, change: _Change) -> tuple[float, float, float]:
    """Peak of the schedule, that of what muon leaves to AdamW, and its end, scaled alike."""
    gain = {"none": 1.0, "linear": float(change.factor), "sqrt": math.sqrt(change.factor)}[options.rule]
    lr = optim.lr * gain
    if gain > 1 and 0 < options.max_lr < lr:
        lr, gain = options.max_lr, options.max_lr / optim.lr
    largest = _LARGEST_ADAM_RATE if _FITS[optim.name] == "sqrt" else _LARGEST_RATE
    if gain != 1 and not 0 < lr <= largest:
        raise ConfigError(
            f"scaling: {change.words} takes lr from {optim.lr:g} to {lr:g} ({options.rule}); {optim.name} "
            f"needs one above 0 and at most {largest:g}: set scaling.max_lr, another scaling.rule or a batch nearer to "
            "the base"
        )
    return lr, optim.adamw_lr * gain, min(lr, min_lr * gain)


def _moments(
    options: ScalingOptions, optim: OptimOptions, change: _Change
) -> tuple[float, float, float, float, list[str]]:
    """(beta1, beta2, eps, weight decay, notes). Moments forget by the token as they did, and eps keeps its share of the
    second moment's root, which is noise and shrinks with sqrt k (Malladi et al. 2022, square root scaling rule). They
    say nothing of weight decay: lr x weight decay is what an update takes from a weight, so it must grow with k.
    """
    kept = optim.beta1, optim.beta2, optim.eps, optim.weight_decay
    if not options.betas or change.factor == 1:
        return *kept, []
    k, root = float(change.factor), math.sqrt(change.factor)
    beta1, beta2 = (1 - k * (1 - beta) for beta in (optim.beta1, optim.beta2))
    if beta2 <= 0:
        raise ConfigError(
            f"scaling.betas: {change.words} takes beta2 from {optim.beta2:g} to {beta2:g}; the rule holds below "
            f"{1 / (1 - optim.beta2):.4g}x: set scaling.betas=false, a larger optim.beta2 or a smaller batch"
        )
    notes = []
    if optim.beta1 == 0:
        beta1 = 0.0  # none asked for
    if beta1 < 0:
        notes.append(f"scaling.betas: beta1 of {optim.beta1:g} would be {beta1:.4g} at {k:.4g}x the batch; 0 is used")
        beta1 = 0.0
    return beta1, beta2, optim.eps / root, optim.weight_decay * root, notes


def _fit_notes(options: ScalingOptions, optim: OptimOptions) -> list[str]:
    notes = []
    if options.rule == "linear" and _FITS.get(optim.name) == "sqrt":
        notes.append(
            f"scaling.rule=linear is for SGD; with {optim.name} the rate goes with the square root of the batch "
            f"({'as for AdamW' if optim.name == 'muon' else 'Malladi et al. 2022'}): scaling.rule=sqrt"
        )
    if options.rule == "sqrt" and _FITS.get(optim.name) == "linear":
        notes.append(
            f"scaling.rule=sqrt is for Adam and LAMB; with {optim.name} the rate goes with the batch "
            "(Goyal et al. 2017): scaling.rule=linear"
        )
    if options.betas and optim.name == "lamb":
        notes.append("scaling.betas was derived for Adam (Malladi et al. 2022); with lamb it is carried over")
    return notes
