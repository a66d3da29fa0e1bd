"""What a run says of itself, step by step."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hvdtrain.comm.group import Group
from hvdtrain.cut.compiling import CompileClock
from hvdtrain.optim.update import Agreed
from hvdtrain.watch.balance import Balance
from hvdtrain.watch.metrics import Metrics
from hvdtrain.watch.phases import Phases
from hvdtrain.watch.stragglers import Stragglers, own_seconds


class Log(contextlib.AbstractContextManager):
    """Times the parts of each step, writes its line, names slow ranks; once, tells how long it took to begin.

        with log.step(step) as phase:
            with phase("data"): ...
        log.add(step, epoch, agreed, lr)

    stragglers: None where nobody looks for slow ranks; else every ``stragglers_every`` steps, 1 or more.
    notes: what it had to say beyond the lines, for the run's record. startup_s: from the process's start to the end of
    its first step; None before that.
    """

    def __init__(
        self,
        metrics: Metrics,
        phases: Phases,
        group: Group,
        stragglers: Stragglers | None,
        stragglers_every: int,
        compiling: CompileClock | None,
        balance: Balance,
    ):
        self.metrics, self.compiling, self.balance, self.notes = metrics, compiling, balance, list[str]()
        self.startup_s: float | None = None
        self._phases, self._group = phases, group
        self._stragglers, self._stragglers_every = stragglers, stragglers_every

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[Callable[[str], contextlib.AbstractContextManager[None]]]:
        """Around the parts of a step; each stands in a ``with`` of what this gives (see watchdog.PHASES for names)."""
        if (folder := self._phases.begin(step)) is not None:
            self.say(f"step {step}: wrote {folder}")
        yield self._phases
        self._times = self._phases.end()

    def add(self, step: int, epoch: int, agreed: Agreed, lr: float) -> None:
        """What came of a step. Errors: DivergedError, on all ranks alike."""
        self.balance.note(self._times)
        self.metrics.add(step, epoch, agreed, lr, self._times)
        if self._stragglers is not None and step % self._stragglers_every == 0:
            seconds = self._group.all_gather_object(own_seconds(self.metrics.spent))
            found = self._stragglers.compare(seconds, step)
            self.notes += found
            self.say_all(f"hvdtrain: note: {note}" for note in found)
        if self.startup_s is None:
            self.startup_s = _seconds_since_process_start()
            if self.compiling is not None:
                self.say(f"hvdtrain: compiled in {self.compiling.seconds:.1f} s")

    def is_due(self, step: int) -> bool:
        """Will ``add`` write a line of this step?"""
        return self.metrics.is_due(step)

    def pass_by(self) -> None:
        """A step of which nothing is known but its times."""
        self.metrics.pass_by(self._times)

    def after(self, name: str) -> None:
        """What follows belongs to no part of a step: evaluation, checkpoint."""
        self._phases.after(name)

    def say(self, message: str) -> None:
        """One line for the user, from rank 0."""
        self.metrics.say(message)

    def say_all(self, messages: Iterable[str]) -> None:
        self.metrics.say_all(messages)

    def __exit__(self, *_: object) -> None:
        self._phases.close()
        self.metrics.close()


def _seconds_since_process_start() -> float:
    """Wall time since this process began, imports and all (Linux)."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")
