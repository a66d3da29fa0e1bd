"""A recipe at another batch, in whole runs: what it prints, how long it is, which rows it sees, what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch import Prepared, launch, launch_rows, succeed, summary

BASE = ("scaling.rule=sqrt", "scaling.base_batch=12")


def _log(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def doubled(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of 12 sequences, made for that, with 24."""
    run_dir = tmp_path_factory.mktemp("doubled") / "run"
    words = ("train", prepared.recipe, *BASE, "train.global_batch=24", "metrics.every=1", "--run-dir", run_dir)
    done = succeed(*words)
    assert (
        "hvdtrain: scaling: batch 12 -> 24 sequences (2x), lr 0.001 -> 0.00141421 (sqrt: You et al. 2020), "
        "warm-up 2 -> 1 steps, run 12 -> 6 steps" in done.text
    )
    return run_dir


def test_rate_length_and_rows(doubled: Path, trained: Path):
    assert summary(doubled)["step"] == 6
    assert summary(doubled)["tokens"] == summary(trained)["tokens"]
    assert [line["lr"] for line in _log(doubled)] == pytest.approx([1e-3 * math.sqrt(2)] * 6)
    assert summary(doubled)["scaling"].startswith("scaling: batch 12 -> 24 sequences (2x)")
    assert yaml.safe_load((doubled / "config.yaml").read_text())["optim"]["lr"] == 1e-3  # the recipe, not the result


def test_a_batch_that_grows_with_the_ranks(doubled: Path, prepared: Prepared, tmp_path: Path):
    words = ("train", prepared.recipe, "scaling.rule=sqrt", "scaling.per_rank=true", "--run-dir", tmp_path / "run")
    done = succeed(*words, how="mpirun", ranks=2)
    assert "batch 12 -> 24 sequences (2x)" in done.text
    assert summary(tmp_path / "run")["sample_digest"] == summary(doubled)["sample_digest"]
    assert summary(tmp_path / "run")["val_loss"] == pytest.approx(summary(doubled)["val_loss"], abs=1e-4)


def test_at_its_own_batch_a_stated_base_changes_nothing(prepared: Prepared, trained: Path, tmp_path: Path):
    done = succeed("train", prepared.recipe, *BASE, "--run-dir", tmp_path / "run")
    assert "scaling:" not in done.text
    for key in ("sample_digest", "val_loss", "train_loss", "step"):
        assert summary(tmp_path / "run")[key] == summary(trained)[key]


def test_length_in_tokens_and_epochs(prepared: Prepared, tmp_path: Path):
    tokens = 5 * 12 * 16
    epochs = ("train.epochs=0.05", "schedule.warmup_epochs=0.01", "metrics.every=1")
    done = launch_rows(
        [
            ("train", prepared.recipe, f"train.tokens={tokens - 1}", "--run-dir", tmp_path / "tokens"),
            ("train", prepared.recipe, *epochs, "--run-dir", tmp_path / "epochs"),
            ("train", prepared.recipe, *epochs, "--run-dir", tmp_path / "epochs"),
        ],
        timeout_s=120,
    )
    assert [one.exit_code for one in done] == [0, 0, 0]
    assert summary(tmp_path / "tokens")["step"] == 5
    found = summary(tmp_path / "epochs")
    shards = json.loads((prepared.shards / "manifest.json").read_text())["shards"]
    share = found["tokens"] / sum(shard["tokens"] for shard in shards if shard["split"] == "train")
    assert 0.045 < share < 0.055
    rates = [line["lr"] for line in _log(tmp_path / "epochs")]
    assert rates.index(max(rates)) + 1 == math.ceil(found["step"] / 5)
    assert "is finished" in done[2].stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scaling.rule=linear"], "scaling.rule=linear needs the batch that optim.lr was made for"),
        ([*BASE, "scaling.base_tokens=100"], "are both given"),
        ([*BASE, "train.global_batch=1200", "scaling.warmup=steps"], "warm-up of 2 steps is longer than the run"),
        (["train.tokens=100", "train.epochs=1"], "train.tokens=100 and train.epochs=1 are both given"),
        (["optim.lr=9.0", *BASE, "train.global_batch=24"], "at most 10"),
        (["schedule.warmup_steps=13"], "schedule.warmup_steps=13 is longer than train.steps=12"),
    ],
)
def test_refused(words: list[str], message: str, prepared: Prepared, tmp_path: Path):
    done = launch("train", prepared.recipe, *words, "--run-dir", tmp_path / "run")
    assert done.exit_code == 2
    assert len(done.messages) == 1
    assert message in done.messages[0]


def test_a_rule_that_does_not_fit_the_optimizer_is_told(prepared: Prepared, tmp_path: Path):
    words = ("scaling.rule=linear", "scaling.base_batch=12", "train.global_batch=24", "--run-dir", tmp_path / "run")
    done = succeed("train", prepared.recipe, *words)
    assert "note: scaling.rule=linear is for SGD" in done.text
    assert "Malladi et al. 2022" in "".join(summary(tmp_path / "run")["fallbacks"])


def test_a_run_does_not_go_on_under_another_rule(doubled: Path, prepared: Prepared):
    words = ("train", prepared.recipe, "scaling.rule=none", *BASE[1:], "train.global_batch=24", "--run-dir", doubled)
    done = launch(*words)
    assert done.exit_code == 2
    assert "scaling.rule was 'sqrt' and is now 'none'" in done.messages[0]
    assert "optim.lr was 0.00141421" in done.messages[0]
