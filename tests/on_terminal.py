"""What a person sees: a command is run on a terminal of its own, in a shell's foreground."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from launch import environment

_WIDTH = 120


@dataclass(frozen=True)
class Screen:
    """``lines``: what stands on the screen at the end. ``states``: of each line whenever it was begun anew."""

    exit_code: int
    lines: list[str]
    states: list[str]

    def __str__(self) -> str:
        return "\n".join([f"exit code {self.exit_code}", *self.lines])


def on_terminal(command: str, cwd: Path, timeout_s: float = 100) -> Screen:
    """AssertionError with what there is to see where ``bash -c command`` has not ended by then."""
    pid, screen = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execvpe("bash", ["bash", "-c", command], environment())
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, _WIDTH, 0, 0))
    shown, until, has_ended = b"", time.monotonic() + timeout_s, False
    try:
        while not has_ended and time.monotonic() < until:
            if select.select([screen], [], [], 1)[0]:
                try:
                    part = os.read(screen, 1 << 16)
                except OSError:  # the last process has closed its end
                    part = b""
                shown, has_ended = shown + part, not part
    finally:
        if not has_ended:
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(screen)
    found = Screen(os.waitstatus_to_exitcode(status), *_draw(shown.decode(errors="replace")))
    assert has_ended, found
    return found


def _draw(text: str) -> tuple[list[str], list[str]]:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines, states, column = [""], [], 0
    for letter in text:
        if letter in "\r\n":
            states.append(lines[-1].rstrip())
            column = 0
            if letter == "\n":
                lines.append("")
        else:
            line = lines[-1].ljust(column)
            lines[-1] = line[:column] + letter + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()], states
