"""Whole runs on a GPU, started as users start them, against the same runs on the CPU."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import launch
import pytest
from launch import environment, succeed, summary

RECIPE = ("train.steps=8", "checkpoint.every=4", "eval.every=4", "metrics.every=2", "metrics.tensorboard=false")
LIMIT_S = 120
# Eight steps in fp32, whose sums have another order on a GPU.
LOSS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def on_cpu(prepared, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("gpu") / "cpu"
    succeed("train", prepared.recipe, *RECIPE, "device=cpu", "--run-dir", run_dir, timeout_s=LIMIT_S)
    return run_dir


def test_a_run_goes_on_from_the_gpu_on_the_cpu_and_back(prepared, on_cpu: Path, device, tmp_path: Path):
    run_dir = tmp_path / "run"
    for steps, where in ((4, device), (6, "cpu"), (8, device)):
        words = ("train", prepared.recipe, *RECIPE, f"train.steps={steps}", "checkpoint.every=2", f"device={where}")
        succeed(*words, "--run-dir", run_dir, timeout_s=LIMIT_S)
    found, truth = summary(run_dir), summary(on_cpu)
    assert found["sample_digest"] == truth["sample_digest"]
    assert found["val_loss"] == pytest.approx(truth["val_loss"], abs=LOSS_TOLERANCE)
    scores = json.loads(succeed("evaluate", run_dir, timeout_s=LIMIT_S).stdout)
    assert scores["val_loss"] == pytest.approx(truth["val_loss"], abs=LOSS_TOLERANCE)
    assert succeed("generate", run_dir, "--prompt", "def ", "--max-tokens", 5, timeout_s=LIMIT_S).stdout.startswith(
        "def "
    )


NCCL = """
import torch
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.world import World
group = HorovodGroup(World(0, 1, 0, 1, "mpirun"))
assert group.backend == "nccl", group.backend
torch.cuda.set_device(0)
for turn in range(5):  # what the sum reads is written just before, by kernels that are still under way
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        big = torch.tanh(big @ big / 64)
    mine = big.abs().clamp(max=1).flatten() + turn
    expected = mine.clone()
    pending = group.all_reduce_sum_async(mine, f"sum.{turn}")
    pending.wait()
    assert torch.equal(mine * 2, expected * 2), turn
group.close()
print("NCCL", torch.cuda.nccl.version())
"""


@pytest.mark.cuda
def test_horovod_sums_through_nccl_in_the_order_of_the_streams():
    done = succeed(program=(sys.executable, "-c", NCCL), how="mpirun", ranks=1, timeout_s=LIMIT_S)
    assert "NCCL" in done.stdout


@pytest.mark.cuda
def test_two_ranks_on_one_gpu_are_refused_unless_they_are_asked_for(prepared, on_cpu: Path, tmp_path: Path):
    """NCCL takes a device once. Asked for, gradients travel through the host's memory, which is said."""
    import torch

    if torch.cuda.device_count() > 1:
        pytest.skip("more GPUs than one")
    words = ("train", prepared.recipe, *RECIPE, "device=cuda", "--run-dir", tmp_path / "run")
    refused = launch.launch(*words, how="mpirun", ranks=2, timeout_s=LIMIT_S)
    assert refused.exit_code == 2, refused
    assert "HVDTRAIN_SHARE_GPUS=1" in refused.stderr
    succeed(*words, how="mpirun", ranks=2, env={"HVDTRAIN_SHARE_GPUS": "1"}, timeout_s=LIMIT_S)
    found, truth = summary(tmp_path / "run"), summary(on_cpu)
    assert found["sample_digest"] == truth["sample_digest"]
    assert found["val_loss"] == pytest.approx(truth["val_loss"], abs=LOSS_TOLERANCE)
    assert any("through host memory" in note for note in found["fallbacks"])


@pytest.mark.cuda
@pytest.mark.alone
def test_too_little_memory_ends_with_71_and_the_plan(prepared, tmp_path: Path):
    large = ("model.width=8192", "model.layers=64", "model.heads=64", "train.steps=2")
    done = launch.launch(
        "train", prepared.recipe, *large, "device=cuda", "--run-dir", tmp_path / "run", timeout_s=LIMIT_S
    )
    assert done.exit_code == 71, done
    assert "Traceback" not in done.stderr
    assert "plan" in done.stderr


@pytest.mark.cuda
def test_the_planned_memory_is_that_of_the_allocator(prepared, tmp_path: Path, record_property):
    sizes = ("model.layers=8", "model.width=768", "model.heads=12", "model.context=512", "train.global_batch=8")
    words = (prepared.recipe, *sizes, "train.steps=3", "eval.every=0", "device=cuda", "precision=bf16")
    plan = json.loads(succeed("plan", *words, "--ranks", 1, "--json", timeout_s=LIMIT_S).stdout)
    succeed("train", *words, "metrics.every=1", "--run-dir", tmp_path / "run", timeout_s=LIMIT_S)
    measured = summary(tmp_path / "run")["memory_peak_mib"]
    record_property("planned_over_measured", round(plan["memory_peak_mib"] / measured, 3))
    assert plan["memory_peak_mib"] == pytest.approx(measured, rel=0.1)


WATCHED = """
import sys, warnings, torch
torch.cuda.set_sync_debug_mode("warn")
warnings.simplefilter("always")
from hvdtrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_the_gpu_nowhere(prepared, tmp_path: Path, record_property, optimizer: str):
    """Whatever waits at the start and the end of a run: twenty more steps make it wait no more often."""
    waits = []
    for steps in (10, 30):
        words = ("train", prepared.recipe, f"train.steps={steps}", "eval.every=0", "checkpoint.every=0", "device=cuda")
        more = (f"optim.name={optimizer}", "metrics.every=1000", "watchdog.stragglers_every=0")
        run_dir = ("--run-dir", str(tmp_path / str(steps)))
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, *map(str, words), *more, *run_dir],
            env=environment(), capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        waits.append(Counter(re.findall(r"^(\S+:\d+): UserWarning: called a synchronizing CUDA", done.stderr, re.M)))
    record_property("waits", [found.total() for found in waits])
    assert waits[0]
    assert waits[1] - waits[0] == Counter()  # each by its place
