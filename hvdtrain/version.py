"""What a result was made with: this package's version, those of what it stands on, and the commit of the source."""

import sys
from functools import cache
from pathlib import Path

from hvdtrain.files import again, optional

__version__ = "0.1.0"


@cache  # of this process: its packages were loaded once, and lie on a file system that may fail
def versions() -> dict[str, str]:
    """Versions of what a result depends on, read from the installed packages' metadata."""
    return optional(lambda: again(_versions, "versions"), "cannot read the versions of the installed packages", {})


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version  # which every command would load otherwise

    found = {"python": sys.version.split()[0]}
    for name in ("hvdtrain", "torch", "horovod", "mpi4py", "h5py", "numpy", "tokenizers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> str | None:
    """``COMMIT`` or ``COMMIT-dirty`` of the source tree that runs; None where it is not a git checkout."""
    import subprocess

    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
