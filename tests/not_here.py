"""What a machine may not have or allow."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from hvdtrain.machine.hosts import why_no_hosts


def not_here(reason: str) -> NoReturn:
    """Skip what this machine cannot do; where everything is meant to be tested (CI), that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def require_hosts() -> None:
    """Skip the test, or fail it, where there can be no hosts (hosts.py)."""
    if reason := why_no_hosts():
        not_here(reason)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """``folder``, made, as a file system of its own; ``size`` like 128k, 1m."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=10) if shutil.which("mount") else None
    if done is None or done.returncode:
        not_here(f"no small disk, which takes root: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)
