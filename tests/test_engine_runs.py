"""The engine's options in whole runs: stopped and resumed bit for bit, on other ranks, and what the summary says."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from launch import Prepared, launch_rows, snapshot, succeed, summary
from modes import Row, in_one_go

LAST = Path("checkpoints/step-00000012")

MODES = {
    "bf16": ["precision=bf16"],
    "bf16-weights": ["precision=bf16-weights"],
    "fp16": ["precision=fp16"],
    "lamb": ["optim.name=lamb", "optim.lr=0.01"],
    "lars": ["optim.name=lars", "optim.lr=5.0"],
    "muon": ["optim.name=muon", "optim.lr=0.005", "optim.adamw_lr=0.002", "optim.muon.share=always"],
    "sgd": ["optim.name=sgd", "optim.lr=0.03", "precision=bf16-weights"],
    "ema": ["ema.decay=0.9", "precision=bf16-weights"],
    "compiled": ["compile=blocks"],
    "recomputed": ["recompute.name=full", "model.kv_heads=1", "model.window=5"],
    "smoothed": ["task.lm.z_loss=1e-3", "task.lm.label_smoothing=0.1"],
}


def _tensors(run_dir: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in snapshot(run_dir / LAST).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def alone(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Of each mode a folder with the runs ``whole`` and ``broken``, which was stopped at 6, and scores of the first."""
    folders = {mode: tmp_path_factory.mktemp("alone") for mode in MODES}
    rows: list[tuple[object, ...]] = []
    for mode, folder in folders.items():
        train = ("train", prepared.recipe, *MODES[mode], "--run-dir")
        rows += [(*train, folder / "whole"), (*train, folder / "broken", "train.steps=6"), (*train, folder / "broken")]
        rows += [("evaluate", folder / "whole")]
    done = launch_rows(rows, timeout_s=240)
    assert [one.exit_code for one in done] == [0] * len(rows), done
    for folder, evaluated in zip(folders.values(), done[3::4], strict=True):
        (folder / "scores.json").write_text(evaluated.stdout.splitlines()[-1])
    return folders


@pytest.mark.parametrize("mode", MODES)
def test_stopped_and_resumed_is_bit_equal(mode: str, alone: Mapping[str, Path], trained: Path):
    whole, broken = alone[mode] / "whole", alone[mode] / "broken"
    found, expected = summary(broken), summary(whole)
    for key in ("sample_digest", "val_loss", "train_loss"):
        assert found[key] == expected[key], key
    assert _tensors(broken) == _tensors(whole)
    assert _tensors(whole) != _tensors(trained)  # the option does something
    assert expected["sample_digest"] == summary(trained)["sample_digest"]
    assert abs(expected["val_loss"] - summary(trained)["val_loss"]) < 0.5
    assert expected["weights"] == ("ema" if mode == "ema" else "raw")
    assert (expected["compile_s"] is not None) == (mode == "compiled")
    evaluated = json.loads((alone[mode] / "scores.json").read_text())
    assert evaluated["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


ON_TWO = ("fp16", "ema", "muon")


@pytest.fixture(scope="module")
def on_two(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of ON_TWO by two ranks."""
    folder = tmp_path_factory.mktemp("on_two")
    rows = [Row(("train", prepared.recipe, *MODES[mode], "--run-dir", folder / mode)) for mode in ON_TWO]
    codes, done = in_one_go(rows)
    assert codes == [0] * len(rows), done
    return folder


def assert_alike(two: Path, one: Path) -> None:
    found, expected = summary(two), summary(one)
    assert (found["world_size"], expected["world_size"]) == (2, 1)
    assert found["sample_digest"] == expected["sample_digest"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=5e-3)  # 16-bit numbers


@pytest.mark.parametrize("mode", ON_TWO)
def test_two_ranks(mode: str, on_two: Path, alone: Mapping[str, Path]):
    assert_alike(on_two / mode, alone[mode] / "whole")


def test_two_ranks_with_a_wire_of_two_bytes_and_a_timeline(prepared: Prepared, trained: Path, tmp_path: Path):
    words = ("sync.allreduce.wire=bf16", "--timeline", tmp_path / "timeline.json", "--run-dir", tmp_path / "run")
    done = succeed("train", prepared.recipe, *words, how="mpirun", ranks=2)
    assert f"hvdtrain: note: timeline in {tmp_path}/timeline.json" in done.text
    assert "hvdtrain.gradients.0.parts" in (tmp_path / "timeline.json").read_text()
    assert_alike(tmp_path / "run", trained)
    assert summary(tmp_path / "run")["val_loss"] != summary(trained)["val_loss"]  # rounded


def test_steps_that_the_guard_skips(prepared: Prepared, tmp_path: Path):
    """After 20 steps a norm above a thousandth of the smoothed one is too much: nothing moves any more."""
    words = ("train", prepared.recipe, "guard.policy=skip", "guard.spike_norm=1e-3", "train.steps=32", "--run-dir")
    whole, broken, stopped = tmp_path / "whole", tmp_path / "broken", tmp_path / "stopped"
    patient = "guard.stop_after=50"
    rows = [(*words, whole, patient), (*words, broken, patient, "train.steps=23"), (*words, broken, patient)]
    done = launch_rows([*rows, (*words, stopped)], timeout_s=240)
    assert [one.exit_code for one in done] == [0, 0, 0, 76], done
    assert summary(whole)["skipped_steps"] == summary(broken)["skipped_steps"] == 12
    assert summary(whole)["val_loss"] == summary(broken)["val_loss"]
    assert done[3].messages == [
        "hvdtrain: DivergedError: step 30: 10 steps in a row were skipped, because loss or gradient was not finite or "
        "out of all proportion; lower optim.lr or lengthen schedule.warmup_steps; the last checkpoint is from before"
    ]


def test_what_a_run_says_of_its_speed(prepared: Prepared, tmp_path: Path):
    words = ("metrics.every=4", "metrics.mfu=measure", "metrics.profile=3-4")
    done = succeed("train", prepared.recipe, *words, "--run-dir", tmp_path / "run")
    assert "GFLOP/s, measured (" in done.text
    assert "step 5: wrote" in done.text
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert 0 < last["mfu"] < 2
    assert last["model_tflops_per_s"] > 0
    assert last["memory_peak_mib"] > 50
    parts = sum(last[f"time_{name}_s"] for name in ("data", "compute", "sync", "optimizer", "other"))
    assert parts > 0
    assert summary(tmp_path / "run")["memory_peak_mib"] >= last["memory_peak_mib"] - 1
    assert (tmp_path / "run/profile/rank-00000.json.gz").stat().st_size > 1000


def test_an_older_run_goes_on_under_a_newer_version(prepared: Prepared, trained: Path, tmp_path: Path):
    """A checkpoint whose identity lacks settings that came later was made with their defaults."""
    from hvdtrain.files import fields_sha256

    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    shutil.rmtree(run_dir / LAST)
    (run_dir / "summary.json").unlink()
    path = run_dir / "checkpoints/step-00000006/manifest.json"
    fields = json.loads(path.read_text())
    fields.pop("manifest_sha256")
    assert fields["identity"].pop("task.lm.z_loss") == 0.0
    path.write_text(json.dumps({**fields, "manifest_sha256": fields_sha256(fields)}))
    assert "resumed from" in succeed("train", prepared.recipe, "--run-dir", run_dir).text
