"""Whole runs in this process: what they leave behind, going on with them, and whatever can have happened since."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny import random_tokens, write_data

from hvdtrain.checkpoint.retention import folder_of, steps_saved
from hvdtrain.checkpoint.valid import newest_valid
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.commands.evaluate import evaluate
from hvdtrain.commands.generate import generate
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_DIVERGED, EXIT_USAGE, HvdtrainError
from hvdtrain.train import train
from hvdtrain.watch.log_file import read_log

PART = "part-00000-of-00001.safetensors"
Train = Callable[..., dict[str, Any]]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """``go("run", "train.steps=4")``: train the tiny recipe in that folder. 6 steps, a checkpoint at 2, 4 and 6."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tokens = random_tokens(700)
    write_data(tmp_path / "data", train=[tokens[:300], tokens[300:600]], val=[tokens[600:]])
    recipe = tmp_path / "tiny.yaml"
    settings = {
        "data": {"dir": str(tmp_path / "data")},
        "model": {"layers": 1, "heads": 2, "width": 16, "context": 8, "dropout": 0.1},
        "train": {"steps": 6, "global_batch": 4},
        "eval": {"every": 3},
        "checkpoint": {"every": 2, "keep_last": 0},
        "metrics": {"every": 2, "tensorboard": False},
        "schedule": {"name": "constant", "warmup_steps": 2},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def run(name: str, *overrides: str, resume: str = "auto") -> dict[str, Any]:
        return train(str(recipe), overrides, tmp_path / name, resume, World())

    return run


def fail(go: Train, *words: str, exit_code: int, **named: str) -> str:
    with pytest.raises(HvdtrainError) as caught:
        go(*words, **named)
    assert caught.value.exit_code == exit_code
    return str(caught.value)


def weights(run_dir: Path, step: int) -> bytes:
    return (folder_of(run_dir, step) / PART).read_bytes()


def flip(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    return bytes(content)


# --- a run -------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(go: Train, tmp_path: Path):
    summary = go("run")
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert (summary["status"], summary["step"], summary["tokens"]) == ("finished", 6, 6 * 4 * 8)
    assert (summary["world_size"], summary["launcher"], summary["backend"]) == (1, "none", "none")
    assert summary["best_val_loss"] <= summary["val_loss"] < math.log(50) + 0.2
    assert len(summary["sample_digest"]) == len(summary["data_digest"]) == 16
    log = read_log(run / "metrics.jsonl")
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2, 4, 6]
    assert [line["step"] for line in log if line["kind"] == "eval"] == [3, 6]
    assert [line["lr"] for line in log if line["kind"] == "train"] == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])
    assert steps_saved(run) == [6, 4, 2]
    assert newest_valid(run, LocalGroup())[1].rows_consumed == 24
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 6
    scores = evaluate(run, [], "val", World())
    assert (scores["val_loss"], scores["target_tokens"]) == (pytest.approx(summary["val_loss"], rel=1e-6), 99)


def test_accumulation_changes_nothing_but_rounding(go: Train):
    whole, parts = go("whole", "model.dropout=0"), go("parts", "model.dropout=0", "train.microbatch=1")
    assert parts["sample_digest"] == whole["sample_digest"]
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    assert go("seed", "seed=7")["sample_digest"] != whole["sample_digest"]


@pytest.mark.parametrize("cut", [2, 3])
def test_a_run_cut_in_two_is_the_run_that_was_not(go: Train, tmp_path: Path, cut: int):
    unbroken = go("unbroken")
    go("cut", f"train.steps={cut}")
    resumed = go("cut")
    assert weights(tmp_path / "cut", 6) == weights(tmp_path / "unbroken", 6)
    for key in ("sample_digest", "val_loss", "best_val_loss", "tokens", "step"):
        assert resumed[key] == unbroken[key], key
    steps = [(line["kind"], line["step"]) for line in read_log(tmp_path / "cut" / "metrics.jsonl")]
    assert len(steps) == len(set(steps))
    assert {("train", step) for step in (1, 2, 4, 6)} < set(steps)


def test_a_finished_run_is_left_as_it_is(go: Train, tmp_path: Path):
    summary = go("run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert go("run") == summary
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_lost_summary_is_made_again(go: Train, tmp_path: Path):
    """Killed between the last checkpoint and the summary."""
    summary = go("run")
    (tmp_path / "run" / "summary.json").unlink()
    again = go("run")
    for key in ("val_loss", "best_val_loss", "sample_digest", "tokens", "step"):
        assert again[key] == pytest.approx(summary[key]) if key == "val_loss" else again[key] == summary[key], key


def test_resume(go: Train, tmp_path: Path):
    message = fail(go, "run", resume=str(tmp_path / "nowhere"), exit_code=EXIT_BAD_DATA)
    assert "there is no checkpoint" in message
    first = go("run", "train.steps=4")
    assert "already holds a run" in fail(go, "run", resume="never", exit_code=EXIT_USAGE)
    branch = go("branch", resume=str(tmp_path / "run"))
    assert weights(tmp_path / "branch", 6) == (go("straight"), weights(tmp_path / "straight", 6))[1]
    assert branch["tokens"] == 192
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == first


def test_another_recipe_or_other_data_is_refused(go: Train, tmp_path: Path):
    go("run", "train.steps=2")
    message = fail(go, "run", "optim.lr=5e-4", "model.width=32", exit_code=EXIT_USAGE)
    assert "model.width was 16 and is now 32; optim.lr was 0.001 and is now 0.0005" in message
    write_data(tmp_path / "other", train=[random_tokens(600, seed=9)], val=[random_tokens(100)])
    assert "data_digest was" in fail(go, "run", f"data.dir={tmp_path / 'other'}", exit_code=EXIT_USAGE)
    (tmp_path / "data").rename(tmp_path / "moved")
    go("run", f"data.dir={tmp_path / 'moved'}", "train.steps=4", "eval.every=1")  # it may move, and be evaluated more


# --- damage since ------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_said_and_written_again(go: Train, tmp_path: Path):
    """A bit flips in step 6: the run goes on from 4 and must leave a whole step 6; the damaged one is not deleted."""
    unbroken = go("run")
    damaged = flip(folder_of(tmp_path / "run", 6) / PART)
    summary = go("run")
    assert any("does not match its digest" in note and "step-00000006" in note for note in summary["fallbacks"])
    folder, progress, problems = newest_valid(tmp_path / "run", LocalGroup())
    assert (folder, progress.step, problems) == (folder_of(tmp_path / "run", 6), 6, [])
    assert (summary["sample_digest"], summary["val_loss"]) == (unbroken["sample_digest"], unbroken["val_loss"])
    assert damaged in [path.read_bytes() for path in (tmp_path / "run").rglob(PART)]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_checkpoints_do_not_push_out_whole_ones(go: Train, tmp_path: Path, keep_last: int):
    """Steps 4 and 6 are damaged, the run is back at 2, saves 3 and is killed: what is kept must hold a whole one."""
    go("run")
    damaged = [flip(folder_of(tmp_path / "run", step) / PART) for step in (4, 6)]
    go("run", "train.steps=3", f"checkpoint.keep_last={keep_last}")
    assert newest_valid(tmp_path / "run", LocalGroup())[1].step == 3
    go("run", "checkpoint.every=1", f"checkpoint.keep_last={keep_last}")
    assert newest_valid(tmp_path / "run", LocalGroup())[1].step == 6
    kept = [path.read_bytes() for path in (tmp_path / "run").rglob(PART)]
    assert all(content in kept for content in damaged)  # never deleted silently


def test_nothing_whole_is_no_fresh_start(go: Train, tmp_path: Path):
    go("run", "train.steps=2")
    flip(folder_of(tmp_path / "run", 2) / PART)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "has 1 checkpoints and none is whole" in fail(go, "run", exit_code=EXIT_BAD_DATA)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_branch_does_not_keep_what_was_in_its_folder(go: Train, tmp_path: Path):
    """`--resume A --run-dir B` where B holds another recipe's run: no mixture of the two."""
    go("a", "train.steps=2")
    go("b", "optim.lr=5e-4")
    assert "optim.lr was 0.0005" in fail(go, "b", resume=str(tmp_path / "a"), exit_code=EXIT_USAGE)


# --- what cannot be trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"val": [range(9)]}, "has no train shards"),
        ({"train": [range(40)]}, "has no val shards"),
        ({"train": [range(40)], "val": [range(8)]}, "val split of .* has 8 tokens.*model.context=8 needs 9"),
        ({"train": [range(8)], "val": [range(9)]}, "has 8 tokens.*model.context=8 needs 9"),
    ],
)
def test_data_that_is_too_little(go: Train, tmp_path: Path, splits: dict, message: str):
    write_data(tmp_path / "little", **splits)
    with pytest.raises(HvdtrainError, match=message) as caught:
        go("run", f"data.dir={tmp_path / 'little'}")
    assert caught.value.exit_code == EXIT_BAD_DATA
    assert not (tmp_path / "run").exists()


def test_one_window_is_enough(go: Train, tmp_path: Path):
    write_data(tmp_path / "little", train=[range(9)], val=[range(9)])
    assert go("run", f"data.dir={tmp_path / 'little'}")["step"] == 6


@pytest.mark.parametrize(
    ("lr", "evaluations"),
    [("1e38", "eval.every=1"), ("1e38", "eval.every=0"), ("1e39", "eval.every=0")],  # 1e39 is infinite in fp32
)
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(go: Train, tmp_path: Path, lr: str, evaluations: str):
    """It blows up between two logged steps, and checkpoints come more often than log lines."""
    often = ("metrics.every=100", "checkpoint.every=1", evaluations, "train.steps=40")
    message = fail(go, "run", f"optim.lr={lr}", "optim.clip_norm=0", *often, exit_code=EXIT_DIVERGED)
    assert "optim.lr" in message
    for step in steps_saved(tmp_path / "run"):
        tensors = load_file(folder_of(tmp_path / "run", step) / PART)
        assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("model.")), step
    for path in (tmp_path / "run").rglob("*.json*"):
        assert "NaN" not in path.read_text(), path
        assert "Infinity" not in path.read_text(), path


# --- a run that is opened again ----------------------------------------------------------------------------------


def test_evaluation_of_every_split_and_of_other_data(go: Train, tmp_path: Path):
    go("run")
    assert evaluate(tmp_path / "run", [], "train", World())["target_tokens"] == 599
    write_data(tmp_path / "more", test=[random_tokens(34, seed=5)])
    scores = evaluate(tmp_path / "run", [tmp_path / "more"], "test", World())
    assert (scores["target_tokens"], scores["split"], scores["step"]) == (33, "test", 6)
    write_data(tmp_path / "words", 51, val=[range(20)])
    with pytest.raises(HvdtrainError, match="made with another tokenizer") as caught:
        evaluate(tmp_path / "run", [tmp_path / "words"], "val", World())
    assert caught.value.exit_code == EXIT_BAD_DATA


@pytest.mark.parametrize("opened", ["evaluate", "generate"])
def test_a_folder_that_is_no_run(go: Train, tmp_path: Path, opened: str):
    def look() -> None:
        if opened == "evaluate":
            evaluate(tmp_path / "run", [], "val", World())
        else:
            generate(tmp_path / "run", "t1", {}, World())

    with pytest.raises(HvdtrainError, match=r"is not a run folder: it has no config\.yaml") as caught:
        look()
    assert caught.value.exit_code == EXIT_BAD_DATA
    go("run")
    for step in (2, 4, 6):
        flip(folder_of(tmp_path / "run", step) / PART)
    with pytest.raises(HvdtrainError, match="has no whole checkpoint"):
        look()
    (tmp_path / "run" / "config.yaml").write_text("model: {layers: none}")
    with pytest.raises(HvdtrainError, match=r"configuration is damaged.*model\.layers"):
        look()
