"""A recipe at another batch, in whole runs: what it prints, how long it is, which rows it sees, what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch import Done, Prepared, launch_rows, succeed, summary

BASE = ("scaling.rule=sqrt", "scaling.base_batch=12")
EPOCHS = ("train.epochs=0.05", "schedule.warmup_epochs=0.01", "metrics.every=1")
FIVE_STEPS = 5 * 12 * 16  # tokens
RUNS = {  # doubled: 12 steps of 12 sequences, made for that, with 24
    "doubled": (*BASE, "train.global_batch=24", "metrics.every=1"),
    "own batch": BASE,
    "tokens": (f"train.tokens={FIVE_STEPS - 1}",),
    "epochs": EPOCHS,
    "linear": ("scaling.rule=linear", "scaling.base_batch=12", "train.global_batch=24"),
}
# After those: in the folder of one of them, or in a new one.
AGAIN = {
    "epochs": EPOCHS,
    "doubled": ("scaling.rule=none", *BASE[1:], "train.global_batch=24"),
}
REFUSED = {
    "scaling.rule=linear needs the batch that optim.lr was made for": ("scaling.rule=linear",),
    "are both given": (*BASE, "scaling.base_tokens=100"),
    "warm-up of 2 steps is longer than the run": (*BASE, "train.global_batch=1200", "scaling.warmup=steps"),
    "train.tokens=100 and train.epochs=1 are both given": ("train.tokens=100", "train.epochs=1"),
    "at most 10": ("optim.lr=9.0", *BASE, "train.global_batch=24"),
    "schedule.warmup_steps=13 is longer than train.steps=12": ("schedule.warmup_steps=13",),
}


def _log(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of RUNS; look, do not touch."""
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(scope="module")
def said(prepared: Prepared, runs: Path) -> dict[str, dict[str, Done]]:
    """What all of the above said, in one process: loading torch takes longer than all of them."""
    rows = {"runs": RUNS, "again": AGAIN, "refused": REFUSED}
    words = [
        ("train", prepared.recipe, *settings, "--run-dir", runs / ("none" if kind == "refused" else name))
        for kind, of_kind in rows.items()
        for name, settings in of_kind.items()
    ]
    done = iter(launch_rows(words))
    return {kind: {name: next(done) for name in of_kind} for kind, of_kind in rows.items()}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains(said: dict[str, dict[str, Done]], name: str):
    assert said["runs"][name].exit_code == 0, said["runs"][name]


def test_rate_length_and_rows(runs: Path, said: dict[str, dict[str, Done]], trained: Path):
    doubled = runs / "doubled"
    assert (
        "hvdtrain: scaling: batch 12 -> 24 sequences (2x), lr 0.001 -> 0.00141421 (sqrt: You et al. 2020), "
        "warm-up 2 -> 2 steps, run 12 -> 6 steps" in said["runs"]["doubled"].text
    )
    assert summary(doubled)["step"] == 6
    assert summary(doubled)["tokens"] == summary(trained)["tokens"]
    assert [line["lr"] for line in _log(doubled)] == pytest.approx(
        [1e-3 * math.sqrt(2) * part for part in (0.5, 1, 1, 1, 1, 1)]
    )
    assert summary(doubled)["scaling"].startswith("scaling: batch 12 -> 24 sequences (2x)")
    assert yaml.safe_load((doubled / "config.yaml").read_text())["optim"]["lr"] == 1e-3  # the recipe, not the result


def test_a_batch_that_grows_with_the_ranks(
    runs: Path, said: dict[str, dict[str, Done]], prepared: Prepared, tmp_path: Path
):
    words = ("train", prepared.recipe, "scaling.rule=sqrt", "scaling.per_rank=true", "--run-dir", tmp_path / "run")
    done = succeed(*words, how="mpirun", ranks=2)
    assert "batch 12 -> 24 sequences (2x)" in done.text
    doubled = summary(runs / "doubled")
    assert summary(tmp_path / "run")["sample_digest"] == doubled["sample_digest"]
    assert summary(tmp_path / "run")["val_loss"] == pytest.approx(doubled["val_loss"], abs=1e-4)


def test_at_its_own_batch_a_stated_base_changes_nothing(runs: Path, said: dict[str, dict[str, Done]], trained: Path):
    assert "scaling:" not in said["runs"]["own batch"].text
    for key in ("sample_digest", "val_loss", "train_loss", "step"):
        assert summary(runs / "own batch")[key] == summary(trained)[key]


def test_length_in_tokens_and_epochs(runs: Path, said: dict[str, dict[str, Done]], prepared: Prepared):
    assert summary(runs / "tokens")["step"] == 5
    found = summary(runs / "epochs")
    shards = json.loads((prepared.shards / "manifest.json").read_text())["shards"]
    share = found["tokens"] / sum(shard["tokens"] for shard in shards if shard["split"] == "train")
    assert 0.045 < share < 0.055
    rates = [line["lr"] for line in _log(runs / "epochs")]
    assert rates.index(max(rates)) + 1 == math.ceil(found["step"] / 5)
    again = said["again"]["epochs"]
    assert again.exit_code == 0 and "is finished" in again.stdout, again


@pytest.mark.parametrize("message", REFUSED)
def test_refused(said: dict[str, dict[str, Done]], message: str):
    done = said["refused"][message]
    assert done.exit_code == 2
    assert len(done.messages) == 1
    assert message in done.messages[0]


def test_a_rule_that_does_not_fit_the_optimizer_is_told(runs: Path, said: dict[str, dict[str, Done]]):
    assert "note: scaling.rule=linear is for SGD" in said["runs"]["linear"].text
    assert "Malladi et al. 2022" in "".join(summary(runs / "linear")["fallbacks"])


def test_a_run_does_not_go_on_under_another_rule(said: dict[str, dict[str, Done]]):
    done = said["again"]["doubled"]
    assert done.exit_code == 2
    assert "scaling.rule was 'sqrt' and is now 'none'" in done.messages[0]
    assert "optim.lr was 0.00141421" in done.messages[0]
