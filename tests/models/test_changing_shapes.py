"""Batches of ever new shapes must not make the process grow: a kernel is made for each, and few are kept."""

import os
import subprocess
import sys

import pytest

_CODE = """
import os, torch
from pathlib import Path
from hvdtrain.machine.matmul import use_fast_matmul

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

torch.set_num_threads(1)
use_fast_matmul("fp32")
weight = torch.randn(64, 64, requires_grad=True)
for rows in range(1, 401):
    (torch.randn(rows, 64) @ weight).square().sum().backward()
    if rows == 100:
        before = resident_mib()
print(resident_mib() - before)
"""
_LIMITS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def grown_mib(**env: str) -> float:
    clean = {name: value for name, value in os.environ.items() if name not in _LIMITS}
    command = [sys.executable, "-c", _CODE]
    done = subprocess.run(command, env={**clean, **env}, capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


def test_a_process_does_not_grow():
    assert grown_mib() < 12


@pytest.mark.parametrize("limit", _LIMITS)
def test_who_sets_the_limits_is_obeyed(limit: str, monkeypatch: pytest.MonkeyPatch):
    from hvdtrain.machine import matmul as cpu

    env = {limit: "7"}
    monkeypatch.setattr(cpu.os, "environ", env)
    monkeypatch.setattr(cpu, "use_fast_fp32", lambda: "oneDNN")
    cpu.use_fast_matmul("fp32")
    assert env == {name: "7" if name == limit else "64" for name in _LIMITS}
