"""What to do with a step whose loss or gradient is out of all proportion: leave it out, go slower, give up.

Judged from the global sums, which are the same bits on all ranks, so that all do the same without another word. It is
done on the device; the host learns of it where a line is logged. A step is left out where

    the loss or the gradient norm is not a finite number,
    the loss is more than ``spike_loss`` nats above its smoothed value (0: not judged), or
    the gradient norm is more than ``spike_norm`` times its smoothed value (0: not judged)

Smoothed values are averages over about 50 steps that were not left out, and count after 20 of them. PaLM (Chowdhery et
al. 2022, 5.1) went back to a checkpoint and left out some hundred batches by hand; here it is the batch itself.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from hvdtrain.errors import DivergedError
from hvdtrain.options import Options, option

_DECAY, _SETTLED = 0.98, 20
# Of a sum over thousands of targets; fairseq gives up at 1e-4, of a mean (--min-loss-scale).
_LEAST_LOSS_SCALE = 2.0**-24


class GuardOptions(Options):
    policy: Literal["stop", "skip"] = option(
        "stop", "at a loss or gradient that is no finite number; stop: exit 76; skip: leave such steps and spikes out"
    )
    spike_loss: float = option(0.0, "skip steps with a loss so far above the smoothed one (nats); 0: none", ge=0)
    spike_norm: float = option(0.0, "skip steps with so many times the smoothed gradient norm; 0: none", ge=0)
    backoff: float = option(1.0, "factor on the learning rate after each step that was skipped", gt=0, le=1)
    recovery: int = option(100, "steps until a halved learning rate is whole again", ge=1)
    stop_after: int = option(10, "skipped steps in a row that end the run with exit 76", ge=1)


class Guard:
    """The one judge of divergence. ``judge`` each step, then ``skip`` (bool; None: the policy skips nothing) and
    ``factor`` of the learning rate are scalars on the device; the host learns of them where it checks.
    """

    def __init__(self, options: GuardOptions, device: torch.device):
        self._options = options
        # smoothed loss, smoothed norm, steps in them, skipped in a row, most in a row, skipped, factor
        self._state = torch.tensor([0.0, 0, 0, 0, 0, 0, 1], dtype=torch.float64, device=device)
        self.skip = torch.zeros((), dtype=torch.bool, device=device) if options.policy == "skip" else None

    @property
    def factor(self) -> torch.Tensor:
        return self._state[6]

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor, overflowed: torch.Tensor | None = None) -> None:
        """Scalars, fp64, of the global batch. ``overflowed``: by a loss scale; the norm then says nothing."""
        if self.skip is None:
            return
        o = self._options
        mean_loss, mean_norm, count, row, most, skipped, factor = self._state.unbind()
        judged = loss.isfinite() if overflowed is None else loss.isfinite() & ~overflowed
        bad = ~(loss.isfinite() & (grad_norm.isfinite() if overflowed is None else grad_norm.isfinite() | overflowed))
        settled = judged & (count >= _SETTLED)
        if o.spike_loss:
            bad = bad | (settled & (loss > mean_loss + o.spike_loss))
        if o.spike_norm:
            bad = bad | (settled & (grad_norm > mean_norm * o.spike_norm))
        takes_part = judged & ~bad
        # The first steps are a plain mean: an average that began at 0 would be far too low for long.
        share = 1 - torch.clamp(count / (count + 1), max=_DECAY)
        row = torch.where(bad, row + 1, torch.zeros_like(row))
        recovered = (factor * 2 ** (1 / o.recovery)).clamp(max=1.0)
        self._state = torch.stack([
            torch.where(takes_part, torch.lerp(mean_loss, loss, share), mean_loss),
            torch.where(takes_part, torch.lerp(mean_norm, grad_norm, share), mean_norm),
            count + takes_part, row, torch.maximum(most, row), skipped + bad,
            torch.where(bad, factor * o.backoff, recovered),
        ])  # fmt: skip
        self.skip = bad

    def check(self, step: int) -> tuple[int, float]:
        """Steps skipped so far, and the factor on the learning rate (asks the device).

        Errors: DivergedError, on all ranks alike, where too many were skipped in a row.
        """
        if self.skip is None:
            return 0, 1.0
        _, _, _, _, most, skipped, factor = self._state.tolist()
        if most >= self._options.stop_after:
            raise DivergedError(
                f"step {step}: {int(most)} steps in a row were skipped, because loss or gradient was not finite or "
                "out of all proportion; lower optim.lr or lengthen schedule.warmup_steps; "
                "the last checkpoint is from before"
            )
        return int(skipped), factor

    def check_step(
        self, step: int, loss: float, grad_norm: float, loss_scale: float | None = None
    ) -> tuple[int, float]:
        """``check`` of a step whose numbers the host knows.

        Errors: as there; and where the policy skips no step: where loss or gradient is no finite number, and no
        overflow of a loss scale explains it.
        """
        is_finite = math.isfinite(loss) and (math.isfinite(grad_norm) or is_overflow(grad_norm, loss_scale))
        if self.skip is None and not is_finite:
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; lower optim.lr or lengthen "
                "schedule.warmup_steps; the last checkpoint is from before"
            )
        return self.check(step)

    def check_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Of a validation. Errors: DivergedError, on all ranks alike."""
        if not all(math.isfinite(score) for score in scores.values()):
            raise DivergedError(
                f"step {step}: evaluation gave {dict(scores)}; lower optim.lr; the last checkpoint is from before"
            )

    def check_weights(self, step: int, weights: Sequence[torch.Tensor]) -> None:
        """Before they are saved: are they numbers? (asks the device) Errors: DivergedError, on all ranks alike."""
        self.check(step)
        norms = torch.stack(torch._foreach_norm([weight.detach() for weight in weights]))
        if not bool(norms.isfinite().all()):
            raise DivergedError(
                f"step {step}: parameters are no longer finite numbers; lower optim.lr or lengthen "
                "schedule.warmup_steps; the last checkpoint is from before"
            )

    def state(self) -> tuple[float, ...] | None:
        """For a checkpoint; None where the policy keeps nothing."""
        return None if self.skip is None else tuple(self._state.tolist())

    def load(self, state: tuple[float, ...] | None) -> None:
        if self.skip is not None and state is not None:
            self._state.copy_(torch.tensor(state, dtype=torch.float64))


def is_overflow(grad_norm: float, loss_scale: float | None) -> bool:
    """Did a scaled loss overflow? Now and then one does: its step is left out and the scale lowered. Not for ever."""
    return loss_scale is not None and loss_scale >= _LEAST_LOSS_SCALE and not math.isfinite(grad_norm)
