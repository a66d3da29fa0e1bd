"""Stop early, in good order: on a signal, before the job's time is over, or because a file asks for it.

    rank 0   SIGUSR2 ---|                     a signal only sets a flag: nothing is ever saved in its handler
    step     ...  k     |  k + 1
    sums          0     |  1                  the flags are added up with the step's sums, so all ranks learn of it
    all                    save, exit 75      at the same step boundary

USR2, because NCCL may use USR1. TERM is what a batch system sends before it kills. ``HVDTRAIN_END_TIME`` (seconds since
1970) is when the job ends; the batch script sets it. A file ``RUN_DIR/stop`` is for the user. Ranks whose launcher is
gone (see comm/ancestors.py) save and stop too: nobody would end them.
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hvdtrain.comm.ancestors import Launcher
from hvdtrain.errors import ConfigError
from hvdtrain.files import exists, seen
from hvdtrain.options import Options, option

if TYPE_CHECKING:
    import torch

# What a rank adds to the sum: counts up to a million ranks stay apart, and all of it exact in fp64.
_ASKED = {signal.SIGUSR2: 1 << 0, signal.SIGTERM: 1 << 20}
_FILE, _TIME = 1 << 40, 1 << 41
_GONE = 1 << 53  # outweighs all others, whose exact sum does not matter then
_LOOK_S = 2.0  # between two looks for the stop file, which may lie on a busy file system


class StopOptions(Options):
    margin_s: float = option(
        60.0,
        "seconds before the job's end (HVDTRAIN_END_TIME) at which a run saves and stops; twice what saving and "
        "evaluating took last comes on top",
        ge=0,
    )


class StopSignals(AbstractContextManager):
    """``with StopSignals() as signals:`` USR2 and TERM set ``signals.flags`` instead of ending the process.
    ``launcher``: its end asks for the same.

    Made before torch is loaded, which takes seconds. Only the main thread can listen; elsewhere nothing is changed.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.flags, self.launcher = 0, launcher
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in _ASKED:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread
                break
        return self

    def got(self, number: signal.Signals) -> bool:
        """Has this process got that signal?"""
        return bool(self.flags & _ASKED[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.flags |= _ASKED[signal.Signals(number)]

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # else somebody has other plans by now
                signal.signal(number, handler)


class Stopping:
    """Shall the run stop after this step? One on each rank.

    is_main: this rank looks at the clock and for the file, for all.
    Errors: ConfigError where HVDTRAIN_END_TIME is no number.
    """

    def __init__(
        self,
        run_dir: Path,
        options: StopOptions,
        is_main: bool,
        signals: StopSignals | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self._file, self._options, self._is_main = run_dir / "stop", options, is_main
        self._signals = signals or StopSignals()
        self._end_s = _end_time(os.environ if env is None else env)
        self._looked_s, self._file_found = -_LOOK_S, False
        self._needed_s: dict[str, float] = {}
        self._late: tuple[torch.Tensor, Any] | None = None

    def check_start(self) -> None:
        """Errors: ConfigError where the stop file is there, OutputError where that cannot be told (rank 0)."""
        if self._is_main and exists(self._file):
            raise ConfigError(f"{self._file} asks this run to stop; remove it, and the same command goes on")

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        """Around evaluating: ``keep_free`` of what it takes."""
        started = time.monotonic()
        yield
        self.keep_free(what, time.monotonic() - started)

    def keep_free(self, what: str, seconds: float) -> None:
        """``what`` took so long, and twice of it is kept free before the job's end (local)."""
        self._needed_s[what] = seconds

    def asked(self) -> int:
        """What this rank adds to the sum of flags (local); 0: nobody asks."""
        flags, launcher = self._signals.flags, self._signals.launcher
        if launcher is not None and launcher.asks:
            flags |= _GONE * launcher.is_gone()
        if self._is_main:
            if not self._file_found and time.monotonic() - self._looked_s >= _LOOK_S:
                self._file_found, self._looked_s = seen(self._file), time.monotonic()
            flags |= _FILE * self._file_found
            if self._end_s is not None:
                margin_s = self._options.margin_s + 2 * sum(self._needed_s.values())
                flags |= _TIME * (time.time() >= self._end_s - margin_s)
        return flags

    def agreed(self, total: "torch.Tensor") -> str | None:
        """Why all ranks stop now, or None. Called by every rank after every step, with the sum of all ranks' ``asked``.

        total: scalar fp64. On a GPU it is that of the step before which is read: this one's is still being computed.
        """
        if total.device.type == "cuda":
            total = self._one_late(total)
        flags = int(total)
        if not flags:
            return None
        if flags >= _GONE:
            return "its launcher is gone"
        if flags >= _TIME:
            return "the job's time ends"
        if flags & _FILE:
            return "stop file"
        return " and ".join(number.name for number, one in _ASKED.items() if flags // one % (1 << 20))

    def _one_late(self, total: "torch.Tensor") -> "torch.Tensor":
        import torch

        here = torch.zeros((), dtype=total.dtype, pin_memory=True).copy_(total, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        (before, event), self._late = self._late or (torch.zeros(()), None), (here, copied)
        if event is not None:
            event.synchronize()
        return before


def _end_time(env: Mapping[str, str]) -> float | None:
    text = env.get("HVDTRAIN_END_TIME", "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"HVDTRAIN_END_TIME={text!r} is no number of seconds since 1970") from None
