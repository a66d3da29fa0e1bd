"""The bar that rank 0 shows on a terminal: it moves while a run evaluates or saves too, and has the newest numbers.

     38%|███▊      | 114/300 [00:41<01:06,  2.79step/s, loss 5.1290  val loss 5.3342  5,714 tokens/s]
     50%|█████     | 150/300 [00:55<00:55,  2.71step/s, evaluating 37 %  loss 4.9071  val loss 5.3342  5,714 tokens/s]

Nothing here waits for the device: a loss that is still being computed there is shown when it has arrived.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")

_PERIOD_S = 0.1  # between two changes


def is_for_people() -> bool:
    """Do both outputs go to a terminal? Where one goes into a file or a pipe, plain lines go with it."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class Bar:
    """``step`` after each step, ``evaluating`` around the batches of an evaluation, ``say`` for lines above it."""

    def __init__(self, steps: int, start_step: int):
        self._bar = tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=_PERIOD_S)
        self._doing = ""
        self._parts = {"loss": "", "val loss": "", "speed": ""}
        self._looked_s = 0.0
        self._arriving: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def step(self, loss: torch.Tensor) -> None:
        """loss: scalar, of the step that has just been started."""
        if time.monotonic() - self._looked_s >= _PERIOD_S:
            self._looked_s = time.monotonic()
            self._doing = ""
            if (value := self._arrived(loss)) is not None:
                self._parts["loss"] = f"loss {value:.4f}"
            self._show(draw=False)
        self._bar.update()

    def pass_by(self) -> None:
        """A step whose loss is not known."""
        self._bar.update()

    def log(self, loss: float, speed: str) -> None:
        """What a logged line has read anyway."""
        self._parts |= {"loss": f"loss {loss:.4f}", "speed": speed}
        self._show(draw=True)

    def validated(self, val_loss: float) -> None:
        self._doing = ""
        self._parts["val loss"] = f"val loss {val_loss:.4f}"
        self._show(draw=True)

    def evaluating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """``batches``, of which there are about ``count``."""
        for number, batch in enumerate(batches):
            if time.monotonic() - self._looked_s >= _PERIOD_S:
                self._looked_s = time.monotonic()
                self.doing(f"evaluating {min(99, 100 * number // max(1, count))} %")
            yield batch

    def doing(self, what: str) -> None:
        """What the run is at, until the next step."""
        self._doing = what
        self._show(draw=True)

    def say(self, message: str) -> None:
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._doing = ""
        self._show(draw=False)
        self._bar.close()

    def _show(self, draw: bool) -> None:
        self._bar.set_postfix_str("  ".join(part for part in (self._doing, *self._parts.values()) if part), draw)

    def _arrived(self, loss: torch.Tensor) -> float | None:
        """The newest loss that can be had without waiting; None: none that was not shown before."""
        if loss.device.type != "cuda":
            return float(loss)
        value = None
        if self._arriving is not None:
            here, event = self._arriving
            if not event.query():
                return None
            value = float(here)
        else:
            here, event = torch.zeros((), dtype=loss.dtype, pin_memory=True), torch.cuda.Event()
        here.copy_(loss, non_blocking=True)
        event.record()
        self._arriving = here, event
        return value


def evaluating(batches: Iterable[T], count: int, is_main: bool, what: str = "evaluating") -> Iterable[T]:
    """A bar of its own for an evaluation, or an answering, that stands alone; gone when it is over."""
    hidden = not (is_main and is_for_people())
    return tqdm(batches, what, count, leave=False, unit="batch", dynamic_ncols=True, disable=hidden)
