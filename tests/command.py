"""Run a command that may hang, and wait for things that may not come."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

Arg = str | Path


def run(
    args: Sequence[Arg], timeout_s: float, cwd: Path | None, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """subprocess.run with the output as text, the exit code unchecked, and a timeout that also ends the grandchildren.

    At the timeout the process group gets SIGTERM (upon which srun cancels its step) and, when its leader has ended or
    2 s later, SIGKILL. TimeoutExpired has what was printed until then.
    """
    # Files, not pipes: a pipe that some detached grandchild holds open would keep us waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            args, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            process.wait(timeout_s)
        except BaseException as error:  # also Ctrl-C and pytest's own timeout
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(2)
            if isinstance(error, subprocess.TimeoutExpired):
                error.stdout, error.stderr = text(out), text(err)
            raise
        return subprocess.CompletedProcess(args, process.returncode, text(out), text(err))


def text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def until(ready: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Ask again and again; TimeoutError says what did not happen."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.1)
