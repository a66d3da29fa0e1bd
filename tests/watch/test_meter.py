"""Where a step's time goes, on a host and on a device that runs behind it; memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hvdtrain.watch import meter
from hvdtrain.watch.meter import EventStamps, StepClock, StepTimes, memory_peak_mib

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def test_laps_on_the_host(monkeypatch: pytest.MonkeyPatch):
    #          start  data compute sync compute optimizer stop
    moments = [10.0, 11.0, 13.0, 17.0, 17.5, 18.25, 20.0]
    ticks = iter(moments)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock = StepClock(CPU)
    clock.start()
    for name in ("data", "compute", "sync", "compute", "optimizer"):
        clock.lap(name)
    laps = clock.stop()
    assert laps.is_ready()
    times = laps.read()
    assert times == StepTimes(data=1.0, compute=2.5, sync=4.0, optimizer=0.75, total=10.0)
    assert times.other == 1.75


def test_the_host_clock_is_real():
    clock = StepClock(CPU)
    clock.start()
    time.sleep(0.2)
    clock.lap("data")
    times = clock.stop().read()
    assert 0.2 <= times.data <= times.total < 5.0
    assert times.other < times.data


def test_a_step_without_laps_and_one_that_is_given_up():
    clock = StepClock(CPU)
    clock.start()
    clock.lap("data")
    clock.start()
    times = clock.stop().read()
    assert times.data == 0.0
    assert times.other == times.total >= 0.0


def test_times_are_added_and_read_as_they_are():
    times = StepTimes(data=1.0, compute=2.0, sync=3.0, optimizer=4.0, total=11.0)
    times.add(StepTimes(data=1.0, compute=1.0, sync=1.0, optimizer=1.0, total=4.0))
    assert times == StepTimes(data=2.0, compute=3.0, sync=4.0, optimizer=5.0, total=15.0)
    assert times.is_ready()
    assert times.read() is times
    assert StepTimes(data=1.0, total=0.5).other == 0.0  # two clocks may disagree by a tick


class Stream:
    """A device that reaches what was recorded on it one second after another, when told to."""

    def __init__(self) -> None:
        self.recorded: list[Event] = []
        self.made, self.waited, self.now = 0, 0, 0.0

    def run(self, events: int) -> None:
        for event in self.recorded[:events]:
            self.now += 1.0
            event.passed = self.now
        del self.recorded[:events]


class Event:
    """Stands in for torch.cuda.Event; holds the loop to its contract (a reused event is of a step that was read)."""

    stream: Stream

    def __init__(self, enable_timing: bool = False):
        assert enable_timing
        self.passed: float | None = None
        self.is_recorded = False
        self.stream.made += 1

    def record(self, stream: Stream) -> None:
        assert stream is self.stream
        assert not self.is_recorded or self.passed is not None, "recorded again while it was still awaited"
        self.is_recorded, self.passed = True, None
        stream.recorded.append(self)

    def query(self) -> bool:
        return self.passed is not None

    def synchronize(self) -> None:
        if self.passed is None:
            self.stream.waited += 1
            self.stream.run(self.stream.recorded.index(self) + 1)

    def elapsed_time(self, other: "Event") -> float:
        return (other.passed - self.passed) * 1000


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(Event, "stream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


def one_step(clock: StepClock) -> meter.Laps:
    clock.start()
    for name in ("data", "compute", "sync", "compute", "optimizer"):
        clock.lap(name)
    return clock.stop()


def test_laps_on_a_device(stream: Stream):
    clock = StepClock(torch.device("cuda", 0))
    laps = one_step(clock)
    assert not laps.is_ready()
    stream.run(6)  # the last, the stop, is not there yet
    assert not laps.is_ready()
    stream.run(1)
    assert laps.is_ready()
    assert laps.read() == StepTimes(data=1.0, compute=2.0, sync=1.0, optimizer=1.0, total=6.0)
    assert laps.is_ready() and laps.read() is laps.read()  # by now, other steps have its events
    assert stream.waited == 0


def test_reading_what_is_not_there_waits(stream: Stream):
    laps = one_step(StepClock(torch.device("cuda", 0)))
    assert laps.read() == StepTimes(data=1.0, compute=2.0, sync=1.0, optimizer=1.0, total=6.0)
    assert stream.waited > 0


def test_events_are_used_again_and_never_before_they_were_read(stream: Stream):
    clock = StepClock(torch.device("cuda", 0))
    unread = []
    for step in range(100):
        unread.append(one_step(clock))
        if step >= 2:  # a device two steps behind
            stream.run(len(stream.recorded) - 2 * 7)
            assert unread.pop(0).read().total == 6.0
    assert stream.waited == 0
    assert stream.made <= 4 * 7


def test_events_belong_to_a_device_that_is_none_here():
    assert isinstance(StepClock(CPU)._stamps, meter.HostStamps)
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        clock = StepClock(device)
        clock.start()
        torch.rand(2048, 2048, device=device).mm(torch.rand(2048, 2048, device=device))
        clock.lap("compute")
        times = clock.stop().read()
        assert isinstance(clock._stamps, EventStamps)
        assert 0.0 < times.compute <= times.total < 60.0
        assert memory_peak_mib(device) >= 32.0


def test_the_peak_of_memory_is_that_of_this_process():
    """It counts what was held and let go, and not what the parent holds."""
    code = (
        "import torch\n"
        "from hvdtrain.watch.meter import memory_peak_mib\n"
        "cpu = torch.device('cpu'); before = memory_peak_mib(cpu)\n"
        "x = torch.ones(64 << 18); after = memory_peak_mib(cpu); del x\n"
        "print(before, after, memory_peak_mib(cpu))"
    )
    ballast = torch.ones(512 << 18)  # 512 MiB here
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    before, after, later = map(float, done.stdout.split())
    assert 60 <= after - before <= 80
    assert later >= after - 1  # Linux counts pages in batches
    assert before < 500
    assert ballast.numel()


def test_without_proc_the_system_is_asked(monkeypatch: pytest.MonkeyPatch):
    honest = memory_peak_mib(CPU)

    class Nowhere:
        def __init__(self, path: str):
            assert path == "/proc/self/status"

        def read_text(self, **_: str) -> str:
            raise FileNotFoundError

    monkeypatch.setattr(meter, "Path", Nowhere)
    assert memory_peak_mib(CPU) == pytest.approx(honest, rel=0.5)
