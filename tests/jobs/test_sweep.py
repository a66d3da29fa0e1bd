"""``hvdtrain sweep``: which points there are, what becomes of each, and what stops it before it begins."""

import signal
import subprocess
from pathlib import Path

import pytest
from command import until
from launch import HVDTRAIN, Done, Prepared, environment, launch, launch_rows, succeed, summary

from hvdtrain.commands.report import report
from hvdtrain.errors import ConfigError
from hvdtrain.jobs.sweep import points_of


def test_points_are_every_combination():
    points = points_of(["train.global_batch=12,24", "scaling.rule=none,sqrt"])
    names = [f"global_batch-{batch}_rule-{rule}" for batch in (12, 24) for rule in ("none", "sqrt")]
    assert [point.name for point in points] == names
    assert points[1].settings == ("train.global_batch=12", "scaling.rule=sqrt")


def test_keys_with_the_same_last_word_keep_the_whole():
    names = [point.name for point in points_of(["optim.name=lamb", "schedule.name=linear", "data.dir=a/b"])]
    assert names == ["optim.name-lamb_schedule.name-linear_dir-a-b"]


@pytest.mark.parametrize("vary", [["seed"], ["seed="], ["=1"], ["seed=1,,2"], ["seed=1", "seed=2"], ["seed=1,1"]])
def test_points_that_cannot_be(vary: list[str]):
    with pytest.raises(ConfigError, match="--vary"):
        points_of(vary)


def test_a_sweep(prepared: Prepared, tmp_path: Path):
    """Two batches on two ranks; one diverges, which is a result; then a single point again, which is finished."""
    out = tmp_path / "sweep"
    words = ("sweep", prepared.recipe, "scaling.base_batch=12", "--vary", "train.global_batch=12,24", "--out", out)
    succeed(*words, "--launcher", "mpirun -np 2 --oversubscribe --bind-to none")
    small, large = out / "global_batch-12", out / "global_batch-24"
    assert (summary(small)["step"], summary(large)["step"]) == (12, 6)
    assert summary(large)["world_size"] == 2
    done = succeed(*words, "--point", 1)
    assert "point 1 of 2: train.global_batch=24" in done.text
    assert "is finished (6 steps)" in done.text
    assert "point 0" not in done.text
    lines = report([small, large], None).splitlines()
    assert sum(" * " in line for line in lines) == 1
    assert "192" in lines[1].split()
    assert "384" in lines[2].split()
    assert (small / "loss.png").stat().st_size > 10_000


def test_a_point_that_diverges_is_a_result_and_others_are_not(prepared: Prepared, tmp_path: Path):
    words = ("sweep", prepared.recipe, "optim.name=sgd", "optim.clip_norm=0", "--out", tmp_path / "a")
    done = launch(*words, "--vary", "optim.lr=1e30,0.1")
    assert done.exit_code == 0, done
    assert f"hvdtrain: {tmp_path}/a/lr-1e30 ended with exit code 76" in done.messages
    assert summary(tmp_path / "a" / "lr-0.1")["status"] == "finished"
    (tmp_path / "b").write_text("in the way")
    done = launch(*words[:-1], tmp_path / "b", "--vary", "optim.lr=0.1")
    assert done.exit_code == 74


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_ended_leaves_no_run_behind(prepared: Prepared, tmp_path: Path, number: signal.Signals):
    """Its run saves and stops; the next point is not begun."""
    words = ("train.steps=1000000", "metrics.every=1", "eval.every=0", "--vary", "seed=1,2", "--out", tmp_path)
    with open(tmp_path / "log", "wb") as log:
        sweep = subprocess.Popen(
            [*HVDTRAIN, "sweep", prepared.recipe, *words], env=environment(), stdout=log, stderr=log
        )
    try:
        until((tmp_path / "seed-1" / "metrics.jsonl").exists, "the first point trains", 120)
        sweep.send_signal(number)
        assert sweep.wait(60) == (75 if number == signal.SIGTERM else -9), (tmp_path / "log").read_text()
        until(lambda: b"released" in (tmp_path / "seed-1/claim/00000001").read_bytes(), "the run has ended", 60)
    finally:
        sweep.kill()
    assert "stopped at step" in (tmp_path / "log").read_text()
    assert list((tmp_path / "seed-1" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "seed-2").exists()


REFUSED = {
    "unknown key 'optim.rate'": ("--vary", "optim.rate=1"),
    "--point 2: there are 2 points, 0 to 1": ("--vary", "seed=1,2", "--point", 2),
    "cannot start nowhere/mpirun": ("--vary", "seed=1", "--launcher", "nowhere/mpirun -np 2"),
}


@pytest.fixture(scope="module")
def refused(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    out = tmp_path_factory.mktemp("refused") / "out"
    done = launch_rows(("sweep", prepared.recipe, "--out", out, *words) for words in REFUSED.values())
    assert not out.exists()
    return dict(zip(REFUSED, done, strict=True))


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_it_begins(refused: dict[str, Done], message: str):
    assert refused[message].exit_code == 2
    assert message in refused[message].messages[-1]
