"""A run that does not fit: what the plan says it needs, what to lower, and an exit code that nobody tries again."""

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from breaking import program
from launch import TRACE, Prepared, launch

from hvdtrain.config import load_config
from hvdtrain.errors import MemoryLimitError, is_out_of_memory
from hvdtrain.planner import shortage
from hvdtrain.planner.shortage import memory_explained

# 200 MiB more than the process has when its first step begins, which needs some 600.
_LIMIT = (
    "size = next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith('VmSize')); "
    "resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), -1))"
)
_LARGE = ("model.width=256", "train.global_batch=1024", "model.context=32")


def test_torch_finds_no_memory(prepared: Prepared, tmp_path: Path):
    broken = program(_LIMIT, "first step", rank=0)
    done = launch("train", prepared.recipe, "--run-dir", "run", *_LARGE, program=broken, cwd=tmp_path)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (71, 1, False), done
    message, plan, cure = done.stderr.splitlines()[-3:]
    assert message.startswith("hvdtrain: MemoryLimitError: out of memory: RuntimeError: "), done
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in message
    assert plan.startswith("planned for a rank, MiB: "), done
    assert "activations" in plan
    assert cure.startswith("lower train.microbatch (now 1024; the result stays the same) or ")
    assert "recompute.name=" in cure


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("work", "is_memory"),
    [
        (lambda: torch.empty(1 << 50), True),
        (lambda: np.empty(1 << 50), True),
        (lambda: bytearray(1 << 60), True),
        (lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")), True),
        (lambda: _raise(RuntimeError("CUDA error: out of memory")), True),
        (lambda: _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")), True),
        (lambda: _raise(OSError(12, "Cannot allocate memory")), True),
        (lambda: _raise(OSError(28, "No space left on device")), False),
        (lambda: _raise(ValueError("the label is 'out of memory'")), False),
        (lambda: torch.ones(2) @ torch.ones(3), False),
    ],
)
def test_how_libraries_say_it(work: Callable[[], object], is_memory: bool):
    with pytest.raises(Exception) as caught:
        work()
    assert is_out_of_memory(caught.value) == is_memory


def test_without_a_plan_the_cure_is_told_all_the_same():
    """The data may be gone, or the plan itself find no memory."""
    config = load_config("demo", ["data.dir=/nowhere", "train.microbatch=4", "recompute.name=full", "eval.rows=1"])
    with pytest.raises(MemoryLimitError) as caught, memory_explained(config, ranks=1):
        raise MemoryError
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (71, False)
    message, cure = str(caught.value).split("\n")
    assert message == "out of memory: MemoryError"
    assert cure.startswith("lower train.microbatch (now 4; the result stays the same) or model.context (now ")
    assert "recompute" not in cure
    with pytest.raises(KeyError), memory_explained(config, ranks=1):
        raise KeyError


def test_what_the_run_held_is_let_go_of_before_the_plan_is_made(monkeypatch: pytest.MonkeyPatch):
    held, still_there = [], []

    def train() -> None:
        weights = torch.zeros(3)
        weights.itself = weights  # only the garbage collector finds it
        held.append(weakref.ref(weights))
        raise MemoryError

    def plan(*_: object) -> str:
        still_there.append(held[0]() is not None)
        return "plan"

    monkeypatch.setattr(shortage, "_plan_words", plan)
    with pytest.raises(MemoryLimitError, match="out of memory: MemoryError\nplan"), memory_explained(None, ranks=1):
        train()
    assert still_there == [False]
