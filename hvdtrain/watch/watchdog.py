"""A rank that hangs is noticed: its Python stacks are written, it is named, and the job ends. So is a lost node.

    rank 0   compute 7 | sync 7 ....................  no progress; waits for others: lets them speak first
    rank 1   compute 7 ..............................  no progress; waits for nobody: stacks, message, end of the job
    rank 2   (stopped, or gone)                        says nothing: rank 0 finds its heartbeat old, and ends the job

The loop tells its watchdog what it does; that only sets an attribute. A thread reads it now and then, and writes it to
``RUN_DIR/heartbeats/rank-00000.json``, where the others find it. The thread goes on while the loop is stuck in C code
that has released Python's lock, as it does when it waits for a collective, a file or a GPU. Where the lock is held, the
other ranks end the job, and a thread of ``faulthandler``, which needs no lock, writes the stacks.

A node that cannot be reached any more is known by its silence (comm/silence.py).
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from hvdtrain.comm.ranks import Ranks
from hvdtrain.comm.silence import Silence
from hvdtrain.errors import EXIT_CRASH, say_from
from hvdtrain.options import Options, option

T = TypeVar("T")

# In the order in which a step comes past them.
PHASES = ("start", "data", "compute", "sync", "optimizer", "evaluation", "checkpoint")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# Where a rank waits for the others: in these modules, as long as they do not call back.
_COMM = f"{_PACKAGE}comm{os.sep}"
_WAITING = tuple(
    f"{_COMM}{name}.py" for name in ("horovod_group", "mpi", "mpi_axis", "shared_axis", "torch_axis", "waiting")
)
_LEAVE_S = 15.0  # for stacks, message and MPI's farewell; then the process goes without
_LINE_BYTES = 512  # of a heartbeat, padded, so that one write replaces it


class WatchdogOptions(Options):
    timeout_s: float = option(
        1800.0,
        "seconds without progress of a rank (a phase of a step, a batch of an evaluation) until its stacks are "
        "written and the job ends with exit 70; 0: no watchdog",
        ge=0,
    )
    start_timeout_s: float = option(
        7200.0, "the same until the first step is done, with reading, staging and compiling; 0: no limit", ge=0
    )
    network_timeout_s: float = option(
        120.0,
        "seconds for which another node's TCP answers nothing until it is named and the job ends with exit 70; "
        "0: TCP itself gives up, after a quarter of an hour",
        ge=0,
    )
    check_replicas_every: int = option(
        0, "steps between comparisons of all replicas' weights, bit by bit; 0: only before checkpoints", ge=0
    )
    stragglers_every: int = option(100, "steps between looks for ranks slower than the others; 0: none", ge=0)
    straggler_factor: float = option(1.5, "times the median's time that make a rank slow", gt=1)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself. ``time``: seconds since 1970, by its own clock. ``idle_s``: since progress.

    ``waits``: it is in a collective. ``where``: the place in hvdtrain's code, ``function (file:line)``.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    time: float
    idle_s: float
    waits: bool
    where: str


class Watchdog(contextlib.AbstractContextManager):
    """``with Watchdog(options, run_dir, group) as watchdog: ... watchdog.enter("data", step) ...``, on every rank.

    Made by the thread that trains. ``hosts``: address -> name, of the job's other nodes. ``timeout_s`` 0: no thread, no
    files. Heartbeats begin when the run folder is there, and go with the end of the ``with``, unless an error ends it.
    Nothing here is a collective or raises an error.
    """

    def __init__(self, options: WatchdogOptions, run_dir: Path, group: Ranks, hosts: Mapping[str, str] | None = None):
        self._options, self._folder, self._group = options, run_dir / "heartbeats", group
        self._silence = Silence(hosts or {})
        self._host = socket.gethostname()
        self._place = ("start", 0)
        self._first: int | None = None
        self._loop = threading.get_ident()
        shortest_s = min(options.timeout_s, options.network_timeout_s or options.timeout_s)
        self._period_s = min(5.0, max(0.1, shortest_s / 10))
        self._file: int | None = None
        self._stacks: int | None = None
        self._told_of_files = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, phase: str, step: int) -> None:
        """The loop begins with ``phase`` (of PHASES) of ``step``: progress."""
        self._place = (phase, step)
        if self._first is None and step:
            self._first = step

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """``items``, of which each counts as progress in the phase that was entered last."""
        phase, step = self._place
        for item in items:
            self._place = (phase, step)
            yield item

    def __enter__(self) -> "Watchdog":
        if self._options.timeout_s:
            self._thread = threading.Thread(target=self._watch, name="hvdtrain-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join(_LEAVE_S)
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive():  # a file system that does not answer: it keeps its files
            return
        self._file, self._stacks = self._closed(self._file), self._closed(self._stacks)
        with contextlib.suppress(OSError):
            if kind is None:
                self._path("json").unlink(missing_ok=True)
            if not self._path("stacks.txt").stat().st_size:  # an earlier start's too, before this one's first beat
                self._path("stacks.txt").unlink()
        with contextlib.suppress(OSError):  # another rank's are still there
            self._folder.rmdir()

    # --- the thread --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        idle = Idle(self._place, self._period_s)
        while not self._stopping.wait(self._period_s):
            place, now = self._place, time.monotonic()
            idle_s, limit_s = idle.look(place, now), self._limit_s(place[1])
            self._beat(place, idle_s, limit_s)
            if limit_s and idle_s >= limit_s:
                self._alarm(place, idle_s)
            elif not idle_s:
                self._silence.forget()
            elif self._options.network_timeout_s and (gone := self._gone(now)):
                self._end_without(gone, place, idle_s)

    def _limit_s(self, step: int) -> float:
        is_first = not step or step == self._first
        return self._options.start_timeout_s if is_first else self._options.timeout_s

    def _beat(self, place: tuple[str, int], idle_s: float, limit_s: float) -> None:
        """Write this rank's heartbeat, and have faulthandler wait for the next one."""
        beat = self._heartbeat(place, idle_s)
        try:
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                self._file = os.open(self._path("json"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            if self._stacks is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
                self._stacks = os.open(self._path("stacks.txt"), flags, 0o666)
            os.pwrite(self._file, json.dumps(vars(beat)).ljust(_LINE_BYTES - 1).encode()[: _LINE_BYTES - 1] + b"\n", 0)
        except FileNotFoundError:  # the run folder is not there yet
            pass
        except OSError as error:
            self._file = self._closed(self._file)  # one that went stale stays so: the next beat opens it again
            if not self._told_of_files and self._group.rank == 0:
                told = f"note: cannot write {self._folder}: {error.strerror}; a rank that hangs is noticed without"
                say_from(self._group.rank, told, past_locks=True)
            self._told_of_files = True
        if self._stacks is not None and limit_s:
            faulthandler.dump_traceback_later(limit_s + 3 * self._period_s, file=self._stacks)

    def _heartbeat(self, place: tuple[str, int], idle_s: float) -> Heartbeat:
        waits, where = look_at(sys._current_frames().get(self._loop))
        phase, step = place
        now, idle_s = round(time.time(), 3), round(idle_s, 1)
        return Heartbeat(
            self._group.rank, self._host[:64], os.getpid(), step, phase[:16], now, idle_s, waits, where[:100]
        )

    def _alarm(self, place: tuple[str, int], idle_s: float) -> None:
        """Write the stacks. Then end the job, unless another rank shall speak first or there is progress after all."""
        mine = self._heartbeat(place, idle_s)
        stacks = None
        if self._stacks is not None:
            with contextlib.suppress(OSError):
                os.write(self._stacks, f"no progress for {idle_s:.0f} s in {_at(mine)}\n".encode())
                faulthandler.dump_traceback(self._stacks)
                stacks = self._path("stacks.txt")
        if mine.waits and self._group.size > 1:
            # Whoever is waited for speaks for itself, if it can. Then the ranks one by one, so that few do.
            until = time.monotonic() + 2 * self._period_s + patience_s(self._group.rank)
            while time.monotonic() < until:
                if self._place is not place or self._stopping.wait(0.1):
                    return
        _end_process_after(_LEAVE_S)
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(2)
        others = ""
        if self._group.size > 1:
            if mine.waits:
                silent_s = max(5.0, 4 * self._period_s)
                behind = who_is_behind([*self._read_all()], time.time(), silent_s)
                others = f"; behind: {_few([_named(rank, beat, silent_s) for rank, beat in behind])}"
            else:
                others = "; it waits for no other rank"
        told = f"no progress for {idle_s:.0f} s in {_at(mine)}{others}; stacks: {stacks or 'above'}"
        say_from(self._group.rank, told, past_locks=True)
        self._group.abort(EXIT_CRASH)

    def _closed(self, descriptor: int | None) -> None:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _read_all(self) -> Iterator[Heartbeat | None]:
        for rank in range(self._group.size):
            yield read_heartbeat(self._folder / f"rank-{rank:05d}.json")

    def _gone(self, now: float) -> dict[str, float]:
        """The nodes that have been silent for too long, and for how long."""
        silent = self._silence.look(now)
        return {node: seconds for node, seconds in silent.items() if seconds >= self._options.network_timeout_s}

    def _end_without(self, gone: Mapping[str, float], place: tuple[str, int], idle_s: float) -> None:
        """End the job: these nodes will not come back. The first rank that notices says so."""
        if self._stopping.wait(patience_s(self._group.rank) - patience_s(0)) or self._place is not place:
            return
        _end_process_after(_LEAVE_S)
        names, silent_s = _few([*gone]), max(gone.values())
        at = _at(self._heartbeat(place, idle_s))
        told = f"no answer from {names} for {silent_s:.0f} s, in {at}: the network to it or the node itself is gone"
        say_from(self._group.rank, told, past_locks=True)
        self._group.abort(EXIT_CRASH)

    def _path(self, suffix: str) -> Path:
        return self._folder / f"rank-{self._group.rank:05d}.{suffix}"


# --- for how long ---------------------------------------------------------------------------------------------------


class Idle:
    """How long has there been no progress? ``look`` is called every ``period_s`` or so."""

    def __init__(self, place: object, period_s: float):
        self._place, self._most_s = place, 3 * period_s
        self._then, self._idle_s = time.monotonic(), 0.0

    def look(self, place: object, now: float) -> float:
        """Seconds up to ``now`` (of time.monotonic) with this very ``place``.

        Between two looks they count up to three periods: a process that a scheduler had suspended did not hang.
        """
        passed, self._then = now - self._then, now
        self._idle_s = self._idle_s + min(passed, self._most_s) if place is self._place else 0.0
        self._place = place
        return self._idle_s


# --- who is behind ---------------------------------------------------------------------------------------------------


def look_at(frame: FrameType | None) -> tuple[bool, str]:
    """Does the stack that ends with ``frame`` wait for other ranks? And its innermost place in hvdtrain above comm/."""
    frames = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            frames.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    waits = bool(frames) and frames[0][0] in _WAITING
    for path, name, line in frames:
        if not path.startswith(_COMM):
            return waits, f"{name} ({path.removeprefix(_PACKAGE)}:{line})"
    return waits, ""


def read_heartbeat(path: Path) -> Heartbeat | None:
    """None: there is none, or none that can be read."""
    try:
        return Heartbeat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def who_is_behind(beats: list[Heartbeat | None], now: float, silent_s: float) -> list[tuple[int, Heartbeat | None]]:
    """The ranks (with their heartbeats) that the others wait for.

    These are the ranks without a heartbeat in the last ``silent_s`` seconds. If there are none, they are the earliest
    of those that wait for nobody; if all wait, the earliest of all. ``beats``: of each rank; ``now``: seconds since
    1970.
    """
    ranks = list(enumerate(beats))
    silent = [(rank, beat) for rank, beat in ranks if beat is None or now - beat.time > silent_s]
    if silent:
        return silent
    busy = [(rank, beat) for rank, beat in ranks if not beat.waits]
    candidates = busy or ranks
    earliest = min(_order(beat) for _, beat in candidates)
    return [(rank, beat) for rank, beat in candidates if _order(beat) == earliest]


def _order(beat: Heartbeat) -> tuple[int, int]:
    return beat.step, PHASES.index(beat.phase) if beat.phase in PHASES else len(PHASES)


def patience_s(rank: int) -> float:
    """How long a rank that waits lets the one that it waits for, and the ranks before it, end the job."""
    return 3.0 + min(rank, 2) * 2.0 + max(0, rank - 2) * 0.01


def _at(beat: Heartbeat) -> str:
    step = f" of step {beat.step}" if beat.step else ""
    return f"{beat.phase}{step}" + (f", {beat.where}" if beat.where else "")


def _named(rank: int, beat: Heartbeat | None, silent_after_s: float) -> str:
    if beat is None:
        return f"rank {rank}, which left no heartbeat"
    who = f"rank {rank} on {beat.host} (process {beat.pid})"
    silent_s = time.time() - beat.time
    if silent_s > silent_after_s:
        return f"{who}, silent for {silent_s:.0f} s, last seen in {_at(beat)}"
    return f"{who} in {_at(beat)} for {beat.idle_s:.0f} s"


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def _end_process_after(seconds: float, exit_code: int = EXIT_CRASH, end: Callable[[int], None] = os._exit) -> None:
    """End this process after so long, even if it cannot leave: another thread holds MPI, or nobody reads its pipe."""
    timer = threading.Timer(seconds, end, (exit_code,))
    timer.daemon = True
    timer.start()
