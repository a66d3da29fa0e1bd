"""slurm/array.sbatch on a real Slurm: each task of the array trains its own point."""

import sys
from pathlib import Path

from cluster import SlurmCluster
from launch import Prepared, environment, summary

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "array.sbatch"


def test_each_task_is_a_point(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    env = {**environment(), "HVDTRAIN_VENV": sys.prefix, "HVDTRAIN_LAUNCHER": "pmix"}
    words = (prepared.recipe, "scaling.base_batch=12", "--vary", "train.global_batch=12,24", "--out", tmp_path / "runs")
    log = f"--output={tmp_path}/log-%a"
    task = slurm.sbatch("--time=5", "--array=0-1", "--ntasks-per-node=1", log, SCRIPT, *words, cwd=tmp_path, env=env)
    for number in (0, 1):
        job = slurm.wait(f"{task}_{number}", timeout_s=180)
        text = (tmp_path / f"log-{number}").read_text(encoding="utf-8")
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), text
        assert f"point {number} of 2" in text
    assert [summary(tmp_path / "runs" / f"global_batch-{n}")["step"] for n in (12, 24)] == [12, 6]


def test_an_array_in_one_run_folder_is_refused(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """Slurm itself says to a job that it is one of several tasks."""
    train, env = SCRIPT.with_name("train.sbatch"), {**environment(), "HVDTRAIN_VENV": sys.prefix}
    words = (prepared.recipe, "--run-dir", tmp_path / "one")
    wants = ("--time=5", "--array=3-4", "--nodes=1", "--ntasks-per-node=1", f"--output={tmp_path}/log-%a")
    task = slurm.sbatch(*wants, train, *words, cwd=tmp_path, env=env)
    for number in (3, 4):
        assert slurm.wait(f"{task}_{number}", timeout_s=120)["ExitCode"] == "2:0"
        assert (
            f"task {number} of array {task}: all its tasks would train in" in (tmp_path / f"log-{number}").read_text()
        )
    assert not (tmp_path / "one").exists()


def test_a_point_that_is_not_there(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    env = {**environment(), "HVDTRAIN_VENV": sys.prefix, "HVDTRAIN_LAUNCHER": "pmix"}
    words = (prepared.recipe, "--vary", "seed=1,2", "--out", tmp_path / "runs")
    log = f"--output={tmp_path}/log"
    task = slurm.sbatch("--time=5", "--array=7-7", "--ntasks-per-node=1", log, SCRIPT, *words, cwd=tmp_path, env=env)
    assert slurm.wait(f"{task}_7", timeout_s=120)["ExitCode"] == "2:0"
    assert "--point 7: there are 2 points, 0 to 1" in (tmp_path / "log").read_text()
