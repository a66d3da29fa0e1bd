"""A run that is stopped, killed or continued on other ranks ends where an unbroken one does."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from launch import Prepared, launch, snapshot, succeed, summary

LAST = Path("checkpoints/step-00000012")


def _tensors(run_dir: Path) -> dict[str, bytes]:
    """Parameters and optimizer state after the last step."""
    return {name: raw for name, raw in snapshot(run_dir / LAST).items() if name.endswith(".safetensors")}


def _logged(run_dir: Path) -> list[tuple[str, int]]:
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["step"]) for line in lines]


def test_stopped_and_resumed_is_bit_equal(prepared: Prepared, trained: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    succeed("train", prepared.recipe, "train.steps=6", "--run-dir", run_dir)
    half = summary(run_dir)
    done = succeed("train", prepared.recipe, "--run-dir", run_dir)
    assert f"hvdtrain: resumed from {run_dir}/checkpoints/step-00000006" in done.text
    found, expected = summary(run_dir), summary(trained)
    assert (half["step"], found["step"], half["tokens"], found["tokens"]) == (6, 12, 1152, 2304)
    for key in ("sample_digest", "val_loss", "best_val_loss", "train_loss"):
        assert found[key] == expected[key] != half[key], key
    assert _tensors(run_dir) == _tensors(trained)
    # As the first line after a start is always logged, step 7 is one more.
    assert [entry for entry in _logged(run_dir) if entry != ("train", 7)] == _logged(trained)


@pytest.mark.parametrize(("first", "then"), [(("mpirun", 2), ("none", 1)), (("none", 1), ("gloo", 2))])
def test_resumed_on_other_ranks(prepared: Prepared, trained: Path, tmp_path: Path, first, then):
    run_dir = tmp_path / "run"
    for (how, ranks), steps in ((first, 6), (then, 12)):
        succeed("train", prepared.recipe, f"train.steps={steps}", "--run-dir", run_dir, how=how, ranks=ranks)
    found, expected = summary(run_dir), summary(trained)
    assert found["world_size"] == then[1]
    assert found["sample_digest"] == expected["sample_digest"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)  # as in test_launchers


# Dies of SIGKILL in the middle of saving step 9: everything is written but not yet renamed.
_DIES = """
import os, signal, sys
from hvdtrain.checkpoint import writer
from hvdtrain import __main__
publish = writer._publish
def die(partial, final):
    if final.name == "step-00000009":
        os.kill(os.getpid(), signal.SIGKILL)
    publish(partial, final)
writer._publish = die
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("asynchronous", ["false", "true"])  # ``trained`` saved in the first way
def test_killed_while_saving_and_run_again(prepared: Prepared, trained: Path, tmp_path: Path, asynchronous: str):
    run_dir = tmp_path / "run"
    settings = ("checkpoint.every=3", f"checkpoint.asynchronous={asynchronous}")
    words = ("train", prepared.recipe, *settings, "--run-dir", run_dir)
    killed = launch(*words, program=(sys.executable, "-c", _DIES))
    assert killed.exit_code == -signal.SIGKILL
    folders = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert folders == {"step-00000003", "step-00000006", ".step-00000009.partial"}
    assert not (run_dir / "summary.json").exists()
    done = succeed(*words)
    assert f"hvdtrain: resumed from {run_dir}/checkpoints/step-00000006" in done.text
    assert summary(run_dir)["sample_digest"] == summary(trained)["sample_digest"]
    assert _tensors(run_dir) == _tensors(trained)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-00000009", "step-00000012"}
    # What the killed process logged beyond step 6 is not there twice.
    assert [entry for entry in _logged(run_dir) if entry != ("train", 7)] == _logged(trained)


def test_a_finished_run_is_left_alone(prepared: Prepared, trained: Path):
    before = snapshot(trained)
    done = succeed("train", prepared.recipe, "--run-dir", trained)
    assert done.text.strip() == f"hvdtrain: {trained} is finished (12 steps); to train on, raise train.steps"
    assert snapshot(trained) == before


def test_what_may_change_on_resume(prepared: Prepared, trained: Path, tmp_path: Path):
    """Where the data lies and how it is cut into microbatches do not make another run; --resume DIR copies nothing."""
    shutil.copytree(prepared.shards, tmp_path / "moved")
    run_dir, before = tmp_path / "run", snapshot(trained)
    changed = (
        f"data.dir={tmp_path}/moved",
        "train.microbatch=4",
        "metrics.every=1",
        "checkpoint.every=0",
        "train.steps=13",
    )
    done = succeed("train", prepared.recipe, *changed, "--run-dir", run_dir, "--resume", trained)
    assert f"hvdtrain: resumed from {trained / LAST}" in done.text
    assert (summary(run_dir)["step"], summary(run_dir)["tokens"]) == (13, 13 * 12 * 16)
    assert snapshot(trained) == before
