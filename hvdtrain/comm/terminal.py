"""Ranks hand their launcher whole lines; rank 0 speaks to the terminal itself, where its launcher was started on one.

    horovodrun -np 2 ...   standard output and error: the terminal, in whose foreground it is
      rank 0               the launcher's pipes -> the same terminal: plain lines, and a progress bar
      rank 1               the launcher's pipes, which put "[1,1]<stdout>:" before each line

Launchers have no switch for that: their ranks see pipes, whatever they were started on. Rank 0 writes into its pipe, as
the others do, where one of the launcher's outputs leads into a file or a pipe, where the launcher runs in the
background, and where it was asked to write files or times.
"""

import io
import os
import signal
import stat
import sys
from pathlib import Path

from hvdtrain.comm.ancestors import ancestors
from hvdtrain.comm.world import World

_LAUNCHERS = {"horovodrun", "mpirun", "orterun", "mpiexec", "mpiexec.hydra", "prterun"}
_ASKED_FOR = ("output-filename", "timestamp-output", "prefix-timestamp", "prefix-output-with-timestamp")


def write_whole_lines(world: World) -> None:
    """Write each line at once, where a launcher reads it: it puts a rank's number before whatever it reads, and with
    PYTHONUNBUFFERED, which images for containers set, Python writes a line's end apart (local).
    """
    for output in (sys.stdout, sys.stderr) if world.launcher != "none" else ():
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(line_buffering=True, write_through=False)


def take_terminal(world: World) -> bool:
    """Lead rank 0's outputs to its launcher's terminal, if there is one; returns whether it did (local)."""
    if world.launcher == "none" or not world.is_main:
        return False
    try:
        terminal = _terminal_of_launcher()
    except (OSError, ValueError):  # the launcher is another user's, or has ended
        return False
    if terminal is None:
        return False
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # mpirun puts its ranks in the background: `stty tostop` stops them
    sys.stdout.flush()
    sys.stderr.flush()
    for output in (1, 2):
        os.dup2(terminal, output)
    os.close(terminal)
    return True


def _terminal_of_launcher() -> int | None:
    """An open descriptor of the launcher's terminal; None: this rank must not write there."""
    mine = _outputs("self")
    if any(stat.S_ISREG(os.fstat(output).st_mode) for output in (1, 2)):
        return None
    others = []
    for process in ancestors(os.getpid()):
        words = [word.rpartition("/")[2] for word in process.words]
        if not _LAUNCHERS & set(words[:2]):  # a script's name follows that of its interpreter
            others.append(_outputs(process.pid))
            continue
        is_plain = not any(word.lstrip("-").partition("=")[0] in _ASKED_FOR for word in words)
        theirs = _outputs(process.pid)
        # Between it and this process may be a shell of its own, or one of the user's, which may redirect the outputs.
        if not is_plain or any(other not in (mine, theirs) for other in others):
            return None
        return _open_if_in_front(process.pid)
    return None


def _open_if_in_front(pid: int) -> int | None:
    # State, parent, group, session, terminal, group in its foreground.
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    group, terminal, group_in_front = int(state[2]), int(state[4]), int(state[5])
    devices = [os.stat(f"/proc/{pid}/fd/{output}").st_rdev for output in (1, 2)]
    number = os.makedev(terminal >> 8 & 0xFFF, terminal & 0xFF | terminal >> 12 & 0xFFF00)
    if not terminal or group != group_in_front or devices != [number, number]:
        return None
    return os.open(f"/proc/{pid}/fd/1", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


def _outputs(pid: int | str) -> tuple[str, str]:
    return os.readlink(f"/proc/{pid}/fd/1"), os.readlink(f"/proc/{pid}/fd/2")
