"""Learning rate as a pure function of the step.

lr |     ____
   |    /    \\__          linear warm-up over ``warmup_steps``, then a half cosine
   |   /        \\__       from ``lr`` down to ``min_lr`` at the last step
   |  /            \\____
   +-----------------------> step
"""

import math
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.options import Options, option


class ScheduleOptions(Options):
    name: Literal["cosine", "constant"] = option("cosine", "shape after the warm-up")
    warmup_steps: int = option(100, "steps of linear warm-up from 0", ge=0)
    min_lr: float = option(0.0, "learning rate at the last step (cosine)", ge=0)


def check_schedule(options: ScheduleOptions, peak: float, steps: int) -> None:
    """Errors: ConfigError where the warm-up is longer than the run or the end is above the peak."""
    if options.warmup_steps > steps:
        raise ConfigError(f"schedule.warmup_steps={options.warmup_steps} is longer than train.steps={steps}")
    if options.min_lr > peak:
        raise ConfigError(f"schedule.min_lr={options.min_lr} is above optim.lr={peak}")


def learning_rate(options: ScheduleOptions, peak: float, steps: int, step: int) -> float:
    """Rate of update number ``step`` (0 .. steps-1). The first update of a warm-up of w has peak / w, the w-th peak.

    Source of the cosine: Loshchilov and Hutter 2017, SGDR, eq. 5, one period.
    """
    if step < options.warmup_steps:
        return peak * (step + 1) / options.warmup_steps
    if options.name == "constant":
        return peak
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return options.min_lr + 0.5 * (peak - options.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))
