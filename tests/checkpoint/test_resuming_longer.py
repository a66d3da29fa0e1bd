"""A run that goes on with another length says what that does to its learning rate."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from launch import Prepared, launch_rows, summary

from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.start import moved_rate
from hvdtrain.files import fields_sha256
from hvdtrain.optim.schedules import ScheduleOptions

COSINE = ScheduleOptions(name="cosine", warmup_steps=0)
AT_500 = Progress(step=500, run_steps=1000)


def test_the_rate_at_the_last_step_made_under_both_lengths():
    """A cosine from 1e-3 to 0: (1 + cos(pi * 499 / 1000)) / 2 is 0.5016 after half the run, 0.8539 after a quarter."""
    assert moved_rate(AT_500, COSINE, 1e-3, 2000) == [
        "resumed at step 500 with train.steps 1000 -> 2000: the learning rate there was 0.000502 and is now 0.000854"
    ]
    assert moved_rate(replace(AT_500, run_steps=500), COSINE, 1e-3, 1000) == [
        "resumed at step 500 with train.steps 500 -> 1000: the learning rate there was 9.87e-09 and is now 0.000502"
    ]


@pytest.mark.parametrize(
    ("progress", "schedule", "steps"),
    [
        pytest.param(AT_500, COSINE, 1000, id="the same length"),
        pytest.param(Progress(), COSINE, 1000, id="a new run"),
        pytest.param(Progress(step=500), COSINE, 2000, id="saved before lengths were"),
        pytest.param(AT_500, ScheduleOptions(name="constant"), 2000, id="constant"),
        pytest.param(AT_500, ScheduleOptions(name="inverse_sqrt"), 2000, id="inverse_sqrt"),
        pytest.param(AT_500, ScheduleOptions(name="wsd"), 2000, id="before the decay of both"),
        pytest.param(Progress(step=50, run_steps=1000), ScheduleOptions(warmup_steps=100), 2000, id="in the warm-up"),
    ],
)
def test_nothing_is_said_where_nothing_moves(progress: Progress, schedule: ScheduleOptions, steps: int):
    assert moved_rate(progress, schedule, 1e-3, steps) == []


def test_a_run_says_so_once_and_keeps_it_in_its_summary(prepared: Prepared, tmp_path: Path):
    """Also where the length is given in epochs; and a checkpoint of before lengths were saved is taken as it is."""
    run_dir, older = tmp_path / "run", tmp_path / "older"
    settings = (
        "schedule.name=linear",
        "schedule.warmup_steps=0",
        "optim.lr=0.01",
        "device=cpu",
        "metrics.tensorboard=false",
    )
    words = ("train", prepared.recipe, *settings, "eval.every=0")
    (first,) = launch_rows([(*words, "train.steps=4", "--run-dir", run_dir)])
    assert first.exit_code == 0, first
    copy_as_saved_before(run_dir, older)
    longer, again, shorter, silent = launch_rows(
        [
            (*words, "train.steps=8", "--run-dir", run_dir),
            (*words, "train.steps=8", "--run-dir", run_dir),
            (*words, "train.epochs=0.1", "--run-dir", run_dir),
            (*words, "train.steps=8", "--run-dir", older),
        ]
    )
    # Step 4 of 4 had a quarter of the rate, step 4 of 8 has 5/8.
    said = "resumed at step 4 with train.steps 4 -> 8: the learning rate there was 0.0025 and is now 0.00625"
    assert longer.text.count(f"hvdtrain: note: {said}") == 1, longer
    assert again.text.strip() == f"hvdtrain: {run_dir} is finished (8 steps); to train on, raise train.steps"
    assert "resumed at step 8 with train.steps 8 -> " in shorter.text, shorter
    assert "the learning rate there was 0.00125 and is now " in shorter.text
    assert silent.exit_code == 0 and "the learning rate" not in silent.text, silent
    assert f"{summary(run_dir)['fallbacks']}".startswith("['resumed at step 8 with train.steps 8 -> ")


def copy_as_saved_before(run_dir: Path, to: Path) -> None:
    """Its checkpoint with a manifest that knows no ``run_steps``."""
    shutil.copytree(run_dir, to)
    path = to / "checkpoints/step-00000004/manifest.json"
    fields = json.loads(path.read_text())
    assert fields.pop("run_steps") == 4
    fields.pop("manifest_sha256")
    path.write_text(json.dumps({**fields, "manifest_sha256": fields_sha256(fields)}))
