"""Calls on chosen files that fail now and then, in whole processes and below Python: a library that is preloaded."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from not_here import not_here


@dataclass(frozen=True)
class Fault:
    """``call`` (see failing_files.c) on paths that hold ``text`` fails ``times`` times by errno, after ``skip``."""

    call: str
    text: str
    number: int
    skip: int = 0
    times: int = 1


@dataclass(frozen=True)
class FailingFiles:
    """``launch(..., env=FailingFiles.build(folder).env(Fault(...), ...))``; ``failed()``: what has failed since."""

    library: Path
    log: Path

    @classmethod
    def build(cls, folder: Path) -> "FailingFiles":
        library = folder / "failing_files.so"
        source = Path(__file__).with_suffix(".c")
        compiler = shutil.which("cc") or not_here("no C compiler to build what makes files fail")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True, timeout=60
        )
        return cls(library, folder / "failed")

    def env(self, *faults: Fault) -> dict[str, str]:
        self.log.unlink(missing_ok=True)
        spec = ";".join(f"{f.call} {f.text} {f.number} {f.skip} {f.times}" for f in faults)
        return {"LD_PRELOAD": str(self.library), "HVDTRAIN_FAULTS": spec, "HVDTRAIN_FAULTS_LOG": str(self.log)}

    def failed(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

    def assert_all_failed(self, faults: Sequence[Fault]) -> None:
        """Or the test has not tested what it says."""
        failed = self.failed()
        idle = [f for f in faults if not any(line.startswith(f"{f.call} ") and f.text in line for line in failed)]
        assert not idle, f"never came to pass: {idle}; failed: {failed}"
