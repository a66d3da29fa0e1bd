"""Stop early, in good order: on a signal, before the job's time is over, or because a file asks for it.

    rank 0   SIGUSR2 ---|                     a signal only sets a flag: nothing is ever saved in its handler
    step     ...  k     |  k + 1
    sums          0     |  1                  the flags are added up with the step's sums, so all ranks learn of it
    all                    save, exit 75      at the same step boundary

The signal is USR2 because NCCL may use USR1. A batch system sends TERM before it kills. INT is Ctrl-C. The end of the
job is known from ``HVDTRAIN_END_TIME`` (seconds since 1970), else from Slurm. A user makes the file ``RUN_DIR/stop``.
Ranks whose launcher is gone (see comm/ancestors.py) save and stop too, because nobody would end them.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hvdtrain.comm.ancestors import Launcher
from hvdtrain.errors import ConfigError
from hvdtrain.files import exists, seen
from hvdtrain.machine.asking import answer_of
from hvdtrain.options import Options, option

if TYPE_CHECKING:
    import torch

# What a rank adds to the sum: counts up to a hundred thousand ranks stay apart, and all of it exact in fp64.
_ASKED = {signal.SIGUSR2: 1 << 0, signal.SIGTERM: 1 << 17, signal.SIGINT: 1 << 34}
_FILE, _TIME = 1 << 51, 1 << 52
_GONE = 1 << 53  # outweighs all others, whose exact sum does not matter then
_LOOK_S = 2.0  # between two looks for the stop file, which may lie on a busy file system
_ANSWER_S = 10.0  # for Slurm to say when the job ends; all ranks wait for it


class StopOptions(Options):
    margin_s: float = option(
        60.0,
        "seconds before the job's end (HVDTRAIN_END_TIME, else as Slurm says) at which a run saves and stops; twice "
        "what saving and evaluating took last comes on top",
        ge=0,
    )


class StopSignals(AbstractContextManager):
    """``with StopSignals() as signals:`` USR2 and TERM set ``signals.flags`` instead of ending the process, and so does
    Ctrl-C after ``hold_interrupts``. ``launcher``: its end sets a flag too.

    Made before torch is loaded, which takes seconds. Only a main thread can have handlers; in another, nothing changes.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.flags, self.launcher, self._speaks = 0, launcher, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGUSR2, signal.SIGTERM):
            self._listen(number, self._note)
        return self

    def hold_interrupts(self, speaks: bool) -> None:
        """From now on Ctrl-C sets a flag too. It still ends the process until there is a step to save, and if it comes
        a second time.

        speaks: this process tells the user. Where interrupts are ignored, as of a job in the background, they stay so.
        """
        if self._before and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._speaks = speaks
            self._listen(signal.SIGINT, self._note_interrupt)

    def _listen(self, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
        with suppress(ValueError):  # not the main thread
            self._before[number] = signal.signal(number, handler)

    def got(self, number: signal.Signals) -> bool:
        """Has this process got that signal?"""
        return bool(self.flags & _ASKED[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.flags |= _ASKED[signal.Signals(number)]

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # not an exception: the next one shall end even what hangs in C
        if self._speaks:
            os.write(2, b"\nhvdtrain: interrupted: saving after this step; Ctrl-C again ends at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # else somebody has other plans by now
            if signal.getsignal(number) in (self._note, self._note_interrupt, signal.SIG_DFL):
                signal.signal(number, handler)


class Stopping:
    """Shall the run stop after this step? One on each rank.

    is_main: this rank looks at the clock and for the file, for all. ``notes``: what has to be said about the job's end.
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
        self._end_s, self.notes = end_of_job(os.environ if env is None else env) if is_main else (None, [])
        self._looked_s, self._file_found = -_LOOK_S, False
        self._needed_s: dict[str, float] = {}
        self._late: tuple[torch.Tensor, Any] | None = None

    def check_start(self) -> None:
        """Errors: ConfigError where the stop file is there, OutputError where that cannot be told (rank 0)."""
        if self._is_main and exists(self._file):
            raise ConfigError(f"{self._file} asks this run to stop; remove it, and the same command goes on")

    def begin(self) -> None:
        """The first step begins: from now on there is something to save (local)."""
        self._signals.hold_interrupts(self._is_main)

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        """``keep_free`` of what the block takes, such as an evaluation."""
        started = time.monotonic()
        yield
        self.keep_free(what, time.monotonic() - started)

    def keep_free(self, what: str, seconds: float) -> None:
        """Note how long ``what`` took: the run stops while twice that is left before the job's end (local)."""
        self._needed_s[what] = seconds

    def asked(self) -> int:
        """What this rank adds to the sum of flags (local); 0: it has no reason to stop."""
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

        total: scalar fp64. On a GPU the sum of the step before is read, because this one's is still being computed.
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
        return " and ".join(number.name for number, one in _ASKED.items() if flags // one % (1 << 17))

    def _one_late(self, total: "torch.Tensor") -> "torch.Tensor":
        import torch

        here = torch.zeros((), dtype=total.dtype, pin_memory=True).copy_(total, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        (before, event), self._late = self._late or (torch.zeros(()), None), (here, copied)
        if event is not None:
            event.synchronize()
        return before


def end_of_job(env: Mapping[str, str]) -> tuple[float | None, list[str]]:
    """When this process's job ends, in seconds since 1970 (None: it does not, or nobody knows), and what has to be said
    about that. Asks Slurm where no variable tells (local; up to 10 s).

    Errors: ConfigError where HVDTRAIN_END_TIME is no number.
    """
    if text := env.get("HVDTRAIN_END_TIME", ""):
        try:
            return float(text), []
        except ValueError:
            raise ConfigError(f"HVDTRAIN_END_TIME={text!r} is no number of seconds since 1970") from None
    job_id, end = env.get("SLURM_JOB_ID", ""), env.get("SLURM_JOB_END_TIME", "")
    if not job_id.isdecimal():
        return None, []
    if end.isdecimal() and int(end) > 0:  # Slurm 23.02 and later
        return float(end), []
    asking = {name: value for name, value in env.items() if not name.startswith("SQUEUE_")}  # a user's own filters
    asking["SLURM_TIME_FORMAT"] = "%s"  # free of time zones
    try:
        said = answer_of(["squeue", "--noheader", f"--jobs={job_id}", "--format=%A|%e"], _ANSWER_S, asking)
        return parse_end(said, job_id), []
    except (OSError, ValueError) as error:
        return None, [
            f"when job {job_id} ends is not known ({error}): nothing is saved ahead of its time limit; "
            "set HVDTRAIN_END_TIME (seconds since 1970)"
        ]


def parse_end(squeue: str, job_id: str) -> float | None:
    """The end of a job in lines of ``JOBID|SECONDS``; those of an array's other tasks may stand beside it. None: it has
    no limit. Errors: ValueError where there is no such line.
    """
    ends = dict(line.strip().split("|", 1) for line in squeue.splitlines() if "|" in line)
    end = ends.get(job_id, "").strip()
    if end in ("NONE", "N/A", "Unknown", "UNLIMITED"):
        return None
    if not end.isdecimal():
        raise ValueError(f"squeue said {' '.join(squeue.split())[:100]!r}")
    return float(end)
