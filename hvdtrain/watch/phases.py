"""The parts of a step: timed, named in the profiler's trace, and told to the watchdog."""

import contextlib
from collections.abc import Iterator

from hvdtrain.watch.meter import Laps, StepClock
from hvdtrain.watch.profiler import Profiler
from hvdtrain.watch.watchdog import Watchdog


class Phases(contextlib.AbstractContextManager):
    """``begin(step)``, then ``with phases(name):`` around each part, then ``end()``; see watchdog.PHASES for names."""

    def __init__(self, clock: StepClock, profiler: Profiler, watchdog: Watchdog):
        self._clock, self._profiler, self._watchdog = clock, profiler, watchdog
        self._step = 0

    def begin(self, step: int) -> bool:
        """Returns whether a trace has just been written."""
        self._step = step
        written = self._profiler.step(step)
        self._clock.start()
        return written

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

    def __exit__(self, *_: object) -> None:
        self._profiler.close()
