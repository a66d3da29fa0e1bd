"""The parts of a step: timed, named in the profiler's trace, and told to the watchdog."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hvdtrain.watch.meter import Laps, StepClock
from hvdtrain.watch.profiler import Profiler
from hvdtrain.watch.watchdog import Watchdog


class Phases:
    """``begin(step)``, ``with phases(name):`` around each part, ``end()``; at last ``close()``.

    See watchdog.PHASES for the names.
    """

    def __init__(self, clock: StepClock, profiler: Profiler, watchdog: Watchdog):
        self._clock, self._profiler, self._watchdog = clock, profiler, watchdog
        self._step = 0

    def begin(self, step: int) -> Path | None:
        """Returns the folder of the trace that has just been written, if one was."""
        self._step = step
        written = self._profiler.step(step)
        self._clock.start()
        return self._profiler.trace.parent if written else None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._watchdog.enter(name, self._step)
        with self._profiler.range(name):
            yield
        self._clock.lap(name)

    def end(self) -> Laps:
        return self._clock.stop()

    def after(self, name: str) -> None:
        """What follows is ``name``, which is no part of the step's time: evaluation, checkpoint."""
        self._watchdog.enter(name, self._step)

    def close(self) -> None:
        """Write a trace that is not written yet."""
        self._profiler.close()
