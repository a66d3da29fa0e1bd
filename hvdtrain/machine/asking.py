"""Ask another program, but not for ever."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress


def answer_of(command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None) -> str:
    """What a command prints. Errors: OSError where it is not there, fails, or has not ended in time.

    One that does not end in time is killed, and waited for no longer: where it hangs in a driver, it cannot even die.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, env=env,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=0.5)
        raise TimeoutError(f"{command[0]} has not answered within {timeout_s:g} s") from None
    if process.returncode != 0:
        last = (err.strip().splitlines() or out.strip().splitlines() or ["no output"])[-1]
        raise OSError(f"{command[0]} failed (exit {process.returncode}): {last}")
    return out
