"""What a step costs: its time, split by what it was spent on, and memory.

On a GPU the host only launches work, so its clock measures how fast it launches. There the laps are events on the
stream, which the GPU stamps as it passes them; they are read when it has, and nobody waits for it:

    host     |data|launch ...|sync .....|launch|   |data|launch ...
    GPU           |compute ........|  wait |optimizer|  |compute ...
    events   *    *                *       *         *
"""

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass
class StepTimes:
    """Seconds of one step, or of several. ``sync``: exposed waiting for the all-reduce, what backward did not hide."""

    data: float = 0.0
    compute: float = 0.0
    sync: float = 0.0
    optimizer: float = 0.0
    total: float = 0.0

    @property
    def other(self) -> float:
        """What no lap names."""
        return max(0.0, self.total - self.data - self.compute - self.sync - self.optimizer)

    def add(self, times: "StepTimes") -> None:
        for name, value in vars(times).items():
            setattr(self, name, getattr(self, name) + value)

    def is_ready(self) -> bool:
        """See ``Laps``: times that are numbers already."""
        return True

    def read(self) -> "StepTimes":
        return self


class Stamps(Protocol):
    """A source of moments."""

    def now(self) -> Any: ...

    def has_passed(self, stamp: Any) -> bool:
        """Can it be read without waiting?"""

    def seconds(self, first: Any, last: Any) -> float:
        """Waits, where the moments have not passed."""

    def give_back(self, stamps: list[Any]) -> None:
        """They are no longer needed."""


class HostStamps:
    """The host's clock."""

    def now(self) -> float:
        return time.perf_counter()

    def has_passed(self, stamp: float) -> bool:
        return True

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def give_back(self, stamps: list[float]) -> None:
        pass


class EventStamps:
    """Events on the device's current stream, used again once read. Recording one or asking it takes microseconds."""

    def __init__(self, device: torch.device):
        self._device = device
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_passed(self, stamp: torch.cuda.Event) -> bool:
        return stamp.query()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1000  # milliseconds

    def give_back(self, stamps: list[torch.cuda.Event]) -> None:
        self._free.extend(stamps)


class Laps:
    """A step's moments, not read yet: (what the time up to it was spent on, moment)."""

    def __init__(self, stamps: Stamps, moments: list[tuple[str, Any]]):
        self._stamps, self._moments = stamps, moments
        self._times: StepTimes | None = None

    def is_ready(self) -> bool:
        """Can they be read without waiting for the device?"""
        return self._times is not None or self._stamps.has_passed(self._moments[-1][1])

    def read(self) -> StepTimes:
        """Waits for the device where it is not there yet."""
        if self._times is None:
            self._times = self._measured()
        return self._times

    def _measured(self) -> StepTimes:
        times, seconds = StepTimes(), self._stamps.seconds
        (_, started), *_, (_, stopped) = self._moments
        for (_, before), (name, moment) in zip(self._moments, self._moments[1:-1], strict=False):
            setattr(times, name, getattr(times, name) + seconds(before, moment))
        times.total = seconds(started, stopped)
        self._stamps.give_back([moment for _, moment in self._moments])
        self._moments = []
        return times


class StepClock:
    """Laps of steps on ``device``: the host's clock for a CPU, events for CUDA (and ROCm, as torch calls it).

    clock.start();  ...;  clock.lap("data");  ...;  clock.lap("compute");  ...;  metrics.add(..., clock.stop())

    A name may come several times in a step; time after the last lap belongs to none.
    """

    def __init__(self, device: torch.device):
        self._stamps: Stamps = EventStamps(device) if device.type == "cuda" else HostStamps()
        self._moments: list[tuple[str, Any]] = []

    def start(self) -> None:
        """A step begins."""
        self._moments = [("", self._stamps.now())]

    def lap(self, name: str) -> None:
        """What has passed since the last lap went to ``name``: data, compute, sync or optimizer."""
        self._moments.append((name, self._stamps.now()))

    def stop(self) -> Laps:
        """The step ends; no waiting."""
        moments, self._moments = self._moments, []
        return Laps(self._stamps, [*moments, ("", self._stamps.now())])


def memory_peak_mib(device: torch.device) -> float:
    """The most memory that this process has held so far (MiB): tensors on a GPU, all its pages in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / (1 << 20)  # torch's own count: the device is not asked
    return _resident_peak_kib() / (1 << 10)


def _resident_peak_kib() -> int:
    # VmHWM and not getrusage: ru_maxrss survives exec, so that a large parent (mpirun's Python, a test) shows up in it.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
