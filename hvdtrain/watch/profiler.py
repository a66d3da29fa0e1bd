"""A look inside chosen steps: torch's profiler, as a Chrome trace (chrome://tracing, ui.perfetto.dev) and a table.

RUN_DIR/profile/rank-00000.json.gz   every operator and, on a GPU, every kernel; the loop's parts as named ranges
RUN_DIR/profile/rank-00000.txt       the operators that took longest

The first ``RANKS`` ranks write: enough to see one wait for another, without thousands of files from a large job.
Profiled steps are slower than others, and so is their tokens/s.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch

from hvdtrain.files import make_folder, optional

RANKS = 8
_OPERATORS = 30  # lines of the table
_NOTHING = contextlib.nullcontext()


def parse_steps(spec: str) -> range:
    """The steps of ``FIRST-LAST``, both included, or of one ``STEP``; empty for an empty text. Errors: ValueError."""
    if not spec:
        return range(0)
    matched = re.fullmatch(r"(\d+)(?:-(\d+))?", spec, re.ASCII)
    first, last = (int(matched[1]), int(matched[2] or matched[1])) if matched else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"{spec!r}: give FIRST-LAST, steps counted from 1 (like '10-12'), or one step (like '10')")
    return range(first, last + 1)


class Profiler:
    """Profiles ``steps`` on this rank (local). ``step(n)`` before each step, ``range`` around its parts, ``close()``.

    A run that resumes within ``steps`` profiles what is left of them. ``close`` must be called, whatever happens: torch
    ends the process by a segmentation fault where its profiler was started and not stopped.
    """

    def __init__(self, steps: range, run_dir: Path, rank: int, device: torch.device):
        self._steps = steps if rank < RANKS else range(0)
        self._trace = run_dir / "profile" / f"rank-{rank:05d}.json.gz"
        self._is_cuda = device.type == "cuda"
        self._profile: Any = None
        self._step: Any = None

    @property
    def trace(self) -> Path:
        return self._trace

    def step(self, number: int) -> bool:
        """Step ``number`` begins; True where what was profiled has just been written.

        To be called outside of what is timed: starting and writing take seconds. A trace that cannot be written is no
        error.
        """
        if not self._steps:
            return False
        written = self._profile is not None and number not in self._steps and self._write()
        if number in self._steps:
            if self._profile is None:
                self._start()
            self._next_step(f"step {number}")
        return written

    def range(self, name: str) -> contextlib.AbstractContextManager:
        """What runs inside is called ``name`` in the trace; nothing at all where no step is being profiled."""
        return _NOTHING if self._profile is None else torch.profiler.record_function(name)

    def close(self) -> bool:
        """Write what is not written yet; True where something was."""
        return self._profile is not None and self._write()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._is_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # or the kernels of earlier steps would come into the trace
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _next_step(self, name: str | None) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self._step = torch.profiler.record_function(name) if name else None
        if self._step is not None:
            self._step.__enter__()

    def _write(self) -> bool:
        self._next_step(None)
        profile, self._profile = self._profile, None
        profile.stop()  # which waits for the device
        return optional(lambda: self._save(profile), f"cannot write {self._trace}", False)

    def _save(self, profile: Any) -> bool:
        by = "self_device_time_total" if self._is_cuda else "self_cpu_time_total"
        temporary = self._trace.with_name(f".{self._trace.name}")
        make_folder(self._trace.parent)
        profile.export_chrome_trace(str(temporary))
        temporary.replace(self._trace)
        table = profile.key_averages().table(sort_by=by, row_limit=_OPERATORS)
        self._trace.with_suffix("").with_suffix(".txt").write_text(f"{table}\n", encoding="utf-8")
        return True
