"""Rows go to those who have time for them: of each batch, ranks get parts in proportion to their speed.

In synchronous training all ranks wait for the slowest. What a rank takes for its own part of a step, reading and
computing, without waiting for the others, tells how many rows it does in a second:

    rows of ranks         seconds of their own     rows a second          rows from the next step on
    16   16   16   16     1.0  1.0  1.0  2.0       16   16   16   8       19   18   18   9        longest: 1.2 s

The ranks tell one another their seconds beside the sums of a step, and find the same shares by the same arithmetic.
Rows change hands only where the longest time falls by a twentieth: noise moves nothing, and shares that are right stay.
A share takes more than one look to be right where not all of a rank's time goes with its rows.

Which rows make a step, in which order, does not depend on the shares, nor does their sum: only who computes which.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from hvdtrain.data.dealing import dealt
from hvdtrain.options import Options, option
from hvdtrain.watch.meter import Laps, StepTimes
from hvdtrain.watch.stragglers import own_seconds

_GAIN = 0.05  # of the longest time
_MOST_NAMED = 16  # ranks whose rows are told one by one


class BalanceOptions(Options):
    every: int = option(
        0,
        "steps between looks at how long each rank takes for its rows, upon which slow ranks get fewer; 0: all have as "
        "many; a fast rank may hold more rows at once, unless train.microbatch says how many",
        ge=0,
    )


def new_speeds(rows: int, counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...] | None:
    """Rows a second of each rank, where sharing ``rows`` by them pays; else None.

    counts: the rows that each has; seconds: what it takes for them.
    """
    speeds = tuple(count / took for count, took in zip(counts, seconds, strict=True))
    longest = max(count / speed for count, speed in zip(dealt(rows, speeds), speeds, strict=True))
    return speeds if longest <= (1 - _GAIN) * max(seconds) else None


class Balance:
    """Of replicas that are whole on their ranks. In each step: ``told`` before the ranks' sums, ``note``
    when it is over, ``decide``.

    number: of this rank's replica, of ``replicas``; a server, which has no rows, comes after them. speeds: by which a
    step's rows are shared. rows: what each rank takes of a step, as far as anybody has looked.
    """

    def __init__(self, options: BalanceOptions, number: int, replicas: int, device: torch.device):
        self._every = options.every if replicas > 1 else 0
        self._number, self._replicas, self._device = number, replicas, device
        self.speeds: tuple[float, ...] = (1.0,) * replicas
        self.rows: list[int] = []
        self._changes, self._imbalance = 0, 1.0
        self._noted: list[StepTimes | Laps] = []
        self._told: torch.Tensor | None = None

    def told(self, step: int) -> torch.Tensor | None:
        """What the ranks have to sum in this step: fp64 [replicas], the seconds of a step at this rank's place; None
        where no look is due. 0: it knows of no step since the shares changed (local).
        """
        self._told = None
        if self._every and step % self._every == 0:
            seconds = [own_seconds(times.read()) for times in self._noted if times.is_ready()]
            self._noted.clear()
            self._told = torch.zeros(self._replicas, dtype=torch.float64, device=self._device)
            if self._number < self._replicas and seconds:
                self._told[self._number] = median(seconds)
        return self._told

    def note(self, times: StepTimes | Laps) -> None:
        """A step is over (local)."""
        if self._every:
            self._noted.append(times)

    def decide(self, rows: int) -> str:
        """Once ``told`` is summed: do ``speeds`` change from the next step on? What to say of it, or nothing (local;
        alike on all ranks; asks the device). rows: of the step, over all ranks.
        """
        if self._told is None:
            return ""
        seconds, self._told = self._told.tolist(), None
        if min(seconds) <= 0:
            return ""
        self.rows = dealt(rows, self.speeds)
        self._imbalance = max(seconds) * len(seconds) / sum(seconds)
        if (speeds := new_speeds(rows, self.rows, seconds)) is None:
            return ""
        self.speeds, self.rows = speeds, dealt(rows, speeds)
        self._changes += 1
        self._noted.clear()
        return (
            f"from now on ranks take {_in_words(self.rows)} rows of a step; for what they had, they took "
            f"{min(seconds):.3g} to {max(seconds):.3g} s"
        )

    def report(self) -> Mapping[str, float]:
        """For a line of the metrics. ``imbalance``: the longest time for a rank's own part of a step over the mean, at
        the last look (local).
        """
        if not self.rows:
            return {}
        return {
            "imbalance": round(self._imbalance, 4),
            "fewest_rows": min(self.rows),
            "most_rows": max(self.rows),
            "share_changes": self._changes,
        }

    def summary(self) -> dict[str, Any] | None:
        """For the run's summary; None where nobody has looked (local)."""
        if not self.rows:
            return None
        return {"rows": self.rows, "share_changes": self._changes, "imbalance": round(self._imbalance, 4)}


def _in_words(rows: Sequence[int]) -> str:
    if len(rows) > _MOST_NAMED:
        return f"{min(rows)} to {max(rows)}"
    return ", ".join(map(str, rows))
