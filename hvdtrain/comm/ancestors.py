"""Who started this rank, and is it still there? A launcher that is killed leaves its ranks to themselves.

    horovodrun -np 2 ...    sh -c "mpirun ..."  <-  mpirun  <-  rank       horovodrun has become that shell
    horovodrun --gloo       horovodrun  <-  python  <-  sh  <-  rank
    mpirun, another node    orted  <-  rank
    srun                    slurmstepd  <-  rank

A rank watches its ancestors, from its parent up to the first whose name is a launcher's. It also watches a shell above
that, if the shell was started for this launcher alone (``sh -c "mpirun ..."``) and waits for it. Any other shell may
end before its launcher does, as with ``nohup mpirun ... &``. A process without a launcher watches nothing.
"""

import ctypes
import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hvdtrain.comm.world import World
from hvdtrain.errors import EXIT_CRASH, say, say_from

OUTLAST_S = 300  # for a rank to save after its launcher is gone
PMIX_WAITS = "PMIX_MCA_pmix_event_caching_window"  # seconds until PMIx tells Open MPI that a connection was lost
_LOOK_S = 1.0  # between two looks
_READER_S = 2.0  # a launcher's pipes close before it is gone
_LAUNCHER = re.compile("(mpirun|mpiexec|orte|prte|hydra|pmi_proxy|slurmstepd|srun|horovodrun|flux|pals|jsrun|jsm).*")
_SHELL = re.compile("(ba|da|k|z|a)?sh")
_STARTS_ONE = re.compile(r"\b(mpirun|mpiexec|orterun|prterun|srun|flux|jsrun|horovodrun)\b")
_BACKGROUND = re.compile(r"(?<![&>|])&(?![&>])|\b(nohup|setsid|disown)\b")


@dataclass(frozen=True)
class Process:
    """``began``: in ticks since the machine's start; ``words``: of its command line."""

    pid: int
    began: str
    parent: int
    name: str
    words: tuple[str, ...]


class Launcher:
    """The processes that started a rank of ``world``. Make it while they are there. No method is a collective."""

    def __init__(self, world: World, pid: int | None = None, proc: Path = Path("/proc")):
        self._proc, self._looked_s, self._gone = proc, -_LOOK_S, False
        self.watched = [] if world.launcher == "none" else _started_by(pid or os.getpid(), proc)
        self._rank = world.rank
        self.asks = world.local_rank == 0  # one rank of a node is enough to tell the others

    def is_gone(self) -> bool:
        """Is one of them gone? It looks at most once a second."""
        if not self._gone and time.monotonic() - self._looked_s >= _LOOK_S:
            self._looked_s = time.monotonic()
            with suppress(OSError):  # such as too many open files: the next look will tell
                self._gone = any(process_began(one.pid, self._proc) != one.began for one in self.watched)
        return self._gone

    def end_with_it(self) -> None:
        """End this process too when its launcher is gone: for work that has nothing to save."""

        def watch() -> None:
            while not self.is_gone():
                time.sleep(_LOOK_S)
            say_from(self._rank, "its launcher is gone", past_locks=True)
            os._exit(EXIT_CRASH)

        if self.watched:
            threading.Thread(target=watch, name="hvdtrain-launcher", daemon=True).start()

    def is_deaf(self) -> bool:
        """Is the launcher a shell that is a container's first process? The kernel keeps TERM from such a process, so
        ``docker stop`` waits ten seconds and then kills all.
        """
        return any(one.pid == 1 and _SHELL.fullmatch(one.name) for one in self.watched)

    def outlast(self) -> None:
        """Let this process outlive its launcher for as long as it takes to save (before MPI starts).

        What it prints then is dropped. Open MPI ends a rank 1 s after it has lost its mpirun; now it waits OUTLAST_S,
        whatever the rank is doing.
        """
        if self.watched:
            os.environ.setdefault(PMIX_WAITS, str(OUTLAST_S))
            if self._rank == 0 and self.is_deaf():
                say(
                    "note: the launcher is a shell, as horovodrun is over MPI, and the first process of a container: "
                    "`docker stop` will not reach it; start mpirun or horovodrun --gloo there"
                )
            sys.stdout, sys.stderr = (_Lasting(stream, self) for stream in (sys.stdout, sys.stderr))


class _Lasting:
    """A stream that a launcher reads. What is written after the launcher's end is dropped."""

    def __init__(self, stream: TextIO, launcher: Launcher):
        self._stream, self._launcher = stream, launcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._outlast(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._outlast(self._stream.flush)

    def _outlast(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) or not self._is_gone_soon():
                raise  # somebody else has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self._stream.fileno())

    def _is_gone_soon(self) -> bool:
        until = time.monotonic() + _READER_S
        while not self._launcher.is_gone() and time.monotonic() < until:
            time.sleep(0.05)
        return self._launcher.is_gone()


# --- up the tree -----------------------------------------------------------------------------------------------------


def _started_by(pid: int, proc: Path) -> list[Process]:
    """The ancestors that a rank watches (see the top of this file), its parent first."""
    found: list[Process] = []
    known = 0  # how many of them there are up to the last launcher
    for process in ancestors(pid, proc):
        if known and not _waits_for_a_launcher(process):
            break
        found.append(process)
        if known or _LAUNCHER.fullmatch(process.name) or _is_remote_end(found):
            known = len(found)
    return found[: known or 1]


def ancestors(pid: int, proc: Path = Path("/proc")) -> Iterator[Process]:
    """From the parent up, as far as can be seen."""
    with suppress(OSError):
        process = find_process(pid, proc)
        while process is not None and (process := find_process(process.parent, proc)) is not None:
            yield process


def _is_remote_end(found: list[Process]) -> bool:
    """Is the last of ``found`` an sshd, with nothing but shells below it? Horovod's Gloo starts a rank on another node
    so; the sshd of a user who is logged in has other programs below it.
    """
    *shells, sshd = found
    return sshd.name.startswith("sshd") and all(_command_of(shell) for shell in shells)


def _waits_for_a_launcher(process: Process) -> bool:
    """Is it a shell that was started for a launcher, and will not end before it?"""
    command = _command_of(process)
    return bool(_STARTS_ONE.search(command)) and not _BACKGROUND.search(command)


def _command_of(process: Process) -> str:
    """What a shell was started with (``sh -c COMMAND``); else nothing."""
    if _SHELL.fullmatch(process.name):
        for option, command in zip(process.words[1:], process.words[2:], strict=False):
            if re.fullmatch("-[a-z]*c", option):
                return command
    return ""


def process_began(pid: int, proc: Path = Path("/proc")) -> str:
    """When a process began, in ticks since the machine's start; its number may be used again. Empty: it is gone.

    Errors: OSError where that cannot be told.
    """
    process = find_process(pid, proc)
    return "" if process is None else process.began


def find_process(pid: int, proc: Path = Path("/proc")) -> Process | None:
    """None: it is gone, or has ended and waits for its parent to ask. Errors: OSError where that cannot be told."""
    try:
        head, _, tail = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
        words = (proc / str(pid) / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = tail.split()
    if fields[0] in ("Z", "X"):
        return None
    return Process(pid, fields[19], int(fields[1]), head.partition("(")[2], tuple(words[:-1]))


def signal_at_parents_end(number: signal.Signals) -> None:
    """Let the kernel send that signal to this process as soon as its parent has ended, however that ends (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
