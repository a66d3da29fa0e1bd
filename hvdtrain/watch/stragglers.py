"""Ranks that are slower than the others, all the time: a hot GPU, a busy node, a slow disk.

In synchronous training all ranks wait for the slowest, so wall time does not tell who it is. What tells it is the time
that a rank takes for its own part of a step, reading and computing, without waiting for the others:

    seconds of steps 101-200   rank 0 12.1   rank 1 12.0   rank 2 19.8   rank 3 12.2     median 12.1
    seconds of steps 201-300   rank 0 12.0   rank 1 12.2   rank 2 20.1   rank 3 12.1     rank 2 is slow, twice in a row
"""

from collections.abc import Sequence
from statistics import median_low

from hvdtrain.watch.meter import StepTimes


def own_seconds(times: StepTimes) -> float:
    """What a rank spent on its own part of one or several steps."""
    return times.data + times.compute + times.optimizer


class Stragglers:
    """Fed with every rank's seconds now and then, it names a rank that was slow in ``patience`` intervals in a row.

    factor: times the median that make a rank slow. hosts: of each rank that trains; those that
    keep parameters come after them. step: where the run begins. A rank is named
    once.
    """

    def __init__(self, factor: float, hosts: Sequence[str], step: int = 0, patience: int = 2):
        self._factor, self._hosts, self._patience = factor, list(hosts), patience
        self._step, self._totals = step, [0.0] * len(hosts)
        self._slow_in_a_row = [0] * len(hosts)
        self._named: set[int] = set()

    def compare(self, totals: Sequence[float], step: int) -> list[str]:
        """A message for each rank that is found slow for the first time.

        totals: each rank's own seconds from the start to ``step``; the interval is what came since the last call.
        """
        totals = totals[: len(self._hosts)]
        seconds = [now - before for now, before in zip(totals, self._totals, strict=True)]
        first, count = self._step + 1, step - self._step
        self._step, self._totals = step, list(totals)
        # Of an even number the lower one: of two ranks, the faster.
        median = median_low(seconds)
        found = []
        for rank, took in enumerate(seconds):
            is_slow = took > self._factor * median > 0
            self._slow_in_a_row[rank] = self._slow_in_a_row[rank] + 1 if is_slow else 0
            if self._slow_in_a_row[rank] >= self._patience and rank not in self._named:
                self._named.add(rank)
                found.append(
                    f"rank {rank} on {self._hosts[rank]} is slow: its own part of a step takes {took / count:.3g} s, "
                    f"{took / median:.1f} times the median's {median / count:.3g} s "
                    f"(steps {first} to {step}); the others wait for it"
                )
        return found
