"""This computer in one line, for what was measured on it."""

import os
import platform
from collections import Counter
from pathlib import Path

from hvdtrain.errors import plural


def machine() -> str:
    """Processor, usable cores and memory (Linux), and the GPUs that this process sees."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    here = f"{model}, {plural(len(os.sched_getaffinity(0)), 'core')}, {memory_gib:.0f} GiB, {platform.system()}"
    return ", ".join([here, *(f"{count} x {name}" for name, count in _gpus().items())])


def _gpus() -> Counter[str]:
    import torch

    return Counter(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
