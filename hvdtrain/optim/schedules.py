"""Learning rate as a pure function of the step, and lengths given in steps, tokens or epochs.

lr |     ____
   |    /    \\__          warm-up over ``warmup_steps``, then the shape that ``name`` says
   |   /        \\__       from ``lr`` down to ``min_lr`` at the last step
   |  /            \\____
   +-----------------------> step

    constant ------    linear \\      polynomial \\_      inverse_sqrt \\__    wsd -----\\    cosine_restarts \\|\\|\\
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.options import Options, option


class ScheduleOptions(Options):
    name: Literal["cosine", "constant", "linear", "polynomial", "inverse_sqrt", "wsd", "cosine_restarts"] = option(
        "cosine", "shape after the warm-up; wsd: constant, then a decay at the end (warm-up, stable, decay)"
    )
    warmup: Literal["gradual", "constant"] = option(
        "gradual", "gradual: linear up to the peak; constant: the base rate, then the peak at once"
    )
    warmup_steps: int = option(100, "steps of warm-up", ge=0)
    warmup_tokens: int = option(0, "tokens of warm-up, padding counted, instead of warmup_steps; 0: not given", ge=0)
    warmup_epochs: float = option(0.0, "epochs of warm-up instead of warmup_steps; 0: not given", ge=0)
    warmup_start: float = option(
        0.0, "share of the peak: gradual begins there, constant stays there (0: the base rate of scaling.*)", ge=0, le=1
    )
    min_lr: float = option(0.0, "learning rate at the last step; inverse_sqrt: the least; constant: unused", ge=0)
    power: float = option(1.0, "polynomial: exponent of the share of the run that is left", gt=0)
    decay: Literal["1-sqrt", "linear"] = option("1-sqrt", "wsd: shape of the decay")
    decay_share: float = option(0.2, "wsd: share of the run's steps, at its end, that the decay takes", gt=0, le=1)
    cycles: int = option(1, "cosine_restarts: periods of equal length after the warm-up", ge=1)


# --- lengths -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """A length as a recipe gives it: ``tokens`` or ``epochs`` where one is not 0, else ``steps``.

    ``key``: what the three names begin with, such as "schedule.warmup_", for messages.
    Errors: ConfigError where both tokens and epochs are given.
    """

    key: str
    steps: int
    tokens: int = 0
    epochs: float = 0.0

    def __post_init__(self):
        if self.tokens and self.epochs:
            raise ConfigError(
                f"{self.key}tokens={self.tokens} and {self.key}epochs={self.epochs:g} are both given; "
                "set one of them to 0"
            )

    @property
    def is_in_steps(self) -> bool:
        return not (self.tokens or self.epochs)

    def in_steps(self, update_tokens: int, epoch_tokens: int = 0) -> int:
        """Updates of ``update_tokens`` (rows of a step x context) that it takes; of tokens no fewer than asked for.

        epoch_tokens: of the corpus, counted as those of an update are (rows of an epoch x context).
        Errors: ConfigError where epochs are given and the corpus's size is not known.
        """
        if self.tokens:
            return -(-self.tokens // update_tokens)
        if self.epochs:
            if epoch_tokens < 1:
                raise ConfigError(
                    f"{self.key}epochs={self.epochs:g} needs the number of the corpus's tokens, which is not known "
                    f"here; set {self.key}tokens or {self.key}steps"
                )
            # By way of its digits: the float 0.1 is a little above 1/10, and would ask for one more step.
            return math.ceil(Fraction(repr(self.epochs)) * epoch_tokens / update_tokens)
        return self.steps


def warmup_length(options: ScheduleOptions) -> Length:
    return Length("schedule.warmup_", options.warmup_steps, options.warmup_tokens, options.warmup_epochs)


# --- rates -------------------------------------------------------------------------------------------------------


def check_schedule(options: ScheduleOptions, peak: float, steps: int | None) -> None:
    """Errors: ConfigError where the warm-up or the decay does not fit into the run, or the end is above the peak.

    steps: of the run. None: not known yet, since lengths are in tokens or epochs, or will be scaled; then only what
    does not depend on them is checked, and a second call with the lengths in ``options`` in steps has to follow.
    """
    if options.min_lr > peak:
        raise ConfigError(f"schedule.min_lr={options.min_lr} is above optim.lr={peak}")
    length = warmup_length(options)
    if steps is None:
        return
    assert length.is_in_steps, "resolve the warm-up first"
    warmup = options.warmup_steps
    if warmup > steps:
        raise ConfigError(f"schedule.warmup_steps={warmup} is longer than train.steps={steps}")
    if options.warmup == "constant" and warmup and not options.warmup_start:
        raise ConfigError(
            "schedule.warmup=constant needs schedule.warmup_start, the share of optim.lr to stay at "
            "(or scaling.base_batch, from which the base rate is known)"
        )
    if options.name == "wsd" and warmup + (decay := _decay_steps(options, steps)) > steps:
        raise ConfigError(
            f"schedule.decay_share={options.decay_share:g} of train.steps={steps} is {decay} steps, "
            f"which leaves no room for schedule.warmup_steps={warmup}"
        )
    if options.name == "cosine_restarts" and options.cycles > max(1, steps - warmup):
        raise ConfigError(f"schedule.cycles={options.cycles} is more than the {steps - warmup} steps after the warm-up")


def learning_rate(options: ScheduleOptions, peak: float, steps: int, step: int) -> float:
    """Rate of update number ``step`` (0 .. steps-1). The first update of a warm-up of w has peak / w, the w-th peak.

    From ``steps`` on the rate stays at its end. Sources, with n for ``step``, N for ``steps``, w for ``warmup_steps``:

    - warm-up: Goyal et al. 2017 (1706.02677), section 2.2; theirs starts at ``warmup_start`` = base rate / peak
    - cosine, cosine_restarts: Loshchilov and Hutter 2017, SGDR, eq. 5, periods of (N - w) / ``cycles``, T_mult = 1
    - linear, polynomial: (1 - (n - w) / (N - w)) ^ power of the way; the rate of BERT, and You et al. 2020 (LAMB)
    - inverse_sqrt: Vaswani et al. 2017 (1706.03762), eq. 3, scaled to reach ``peak`` with update w: sqrt(w / (n + 1))
    - wsd: Hägele et al. 2024 (2405.18392), section 3: 1 - sqrt((n - (N - D)) / D) in the last D updates
    """
    warmup, floor = options.warmup_steps, options.min_lr
    if step < warmup:
        if options.warmup == "constant":
            return peak * options.warmup_start
        rate = peak * (step + 1) / warmup
        return rate + (peak - rate) * options.warmup_start
    if options.name == "constant":
        return peak
    if options.name == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(1, warmup) / (step + 1)))
    if options.name == "wsd":
        decay = _decay_steps(options, steps)
        gone = min(1.0, max(0, step - (steps - decay)) / decay)
        left = 1 - (math.sqrt(gone) if options.decay == "1-sqrt" else gone)
        return floor + (peak - floor) * left if gone else peak
    since, length = step - warmup, max(1, steps - warmup)
    gone = min(1.0, since / length)
    if options.name == "linear":
        return floor + (peak - floor) * (1 - gone)
    if options.name == "polynomial":
        return floor + (peak - floor) * (1 - gone) ** options.power
    if options.name == "cosine_restarts" and gone < 1:
        gone = since * options.cycles % length / length  # in whole numbers: a restart is not missed by rounding
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * gone))


def before_decay(options: ScheduleOptions, steps: int) -> int:
    """Of a run's steps those before a decay that has steps of its own (wsd); else all."""
    return steps - _decay_steps(options, steps) if options.name == "wsd" else steps


def _decay_steps(options: ScheduleOptions, steps: int) -> int:
    return max(1, round(options.decay_share * steps))
