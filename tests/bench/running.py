"""Commands as a user types them: ours on one process, and two ranks of them."""

import os
import subprocess
import sys
import time

PYTHON = [sys.executable, "-m"]
RANKS = ["mpirun", "-np", "2", "--bind-to", "none"]


def run(command: list[str], threads: int | None = None) -> tuple[float, str]:
    """Wall seconds and output of one command; stops the benchmark where it fails."""
    env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    started = time.perf_counter()
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=1800)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stdout
