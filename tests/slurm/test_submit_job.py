"""``hvdtrain submit`` and ``hvdtrain status`` on the two nodes of a real Slurm."""

import json
from pathlib import Path
from typing import Any

import pytest
from cluster import SlurmCluster
from launch import HVDTRAIN, Done, Prepared, environment, summary

TRAIN = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"


def _hvdtrain(slurm: SlurmCluster, folder: Path, *words: object, **env: str) -> Done:
    args = [str(word) for word in (*HVDTRAIN, *words)]
    done = slurm.run(args, timeout_s=120, cwd=folder, env={**environment(), **env})
    return Done("none", done.returncode, done.stdout, done.stderr)


def _status(slurm: SlurmCluster, folder: Path, run: str) -> dict[str, Any]:
    done = _hvdtrain(slurm, folder, "status", run, "--json")
    assert done.exit_code == 0, done
    return json.loads(done.stdout)[0]


def _rows(done: Done) -> dict[str, str]:
    assert done.exit_code == 0, done
    return dict(line.split(None, 1) for line in done.stdout.splitlines())


def test_a_submitted_job_trains_to_its_end(
    slurm: SlurmCluster, prepared: Prepared, trained: Path, tmp_path: Path, tmp_path_factory
):
    """In a folder whose name needs quotes everywhere; its script, given to sbatch from elsewhere, finds it again."""
    run = "my rüns/50% 'a'"
    words = (prepared.recipe, "--nodes", 2, "--ranks-per-node", 1, "--time", "0:10:00", "--run-dir", run)
    rows = _rows(_hvdtrain(slurm, tmp_path, "submit", *words, HVDTRAIN_LAUNCHER="pmix", HVDTRAIN_PREFLIGHT="0"))
    job_id = int(rows["job"].split()[0])
    job, log = slurm.wait(job_id, timeout_s=180), Path(rows["log"])
    assert (job["JobState"], job["ExitCode"], job["NumNodes"]) == ("COMPLETED", "0:0", "2"), log.read_text()
    assert log == tmp_path / run / "jobs" / f"{job_id}.log"
    result = summary(tmp_path / run)
    assert (result["world_size"], result["sample_digest"]) == (2, summary(trained)["sample_digest"])
    found = _status(slurm, tmp_path, run)
    assert (found["state"], found["step"], found["checkpoint_step"], found["job_id"]) == (
        "finished",
        12,
        12,
        str(job_id),
    )

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    again = slurm.wait(slurm.sbatch(rows["script"], cwd=elsewhere, env=environment()), timeout_s=120)
    (log,) = {*log.parent.glob("*.log")} - {log}
    assert (again["JobState"], again["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    assert f"{run} is finished (12 steps)" in log.read_text()
    assert list(elsewhere.iterdir()) == []


def test_a_layer_is_spread_over_the_ranks_of_a_node(
    slurm: SlurmCluster, prepared: Prepared, trained: Path, tmp_path: Path
):
    words = (prepared.recipe, "mesh.tensor=2", "--nodes", 1, "--ranks-per-node", 2, "--run-dir", "run")
    done = _hvdtrain(slurm, tmp_path, "submit", *words, HVDTRAIN_LAUNCHER="pmix", HVDTRAIN_PREFLIGHT="0")
    rows = _rows(done)
    assert (rows["job"].partition(" ")[2], done.messages) == ("(2 ranks on 1 node)", []), done
    job, log = slurm.wait(int(rows["job"].split()[0]), timeout_s=180), Path(rows["log"])
    assert (job["JobState"], job["NumNodes"], job["NumTasks"]) == ("COMPLETED", "1", "2"), log.read_text()
    result, expected = summary(tmp_path / "run"), summary(trained)
    assert result["mesh"]["hosts"] == [f"replica 0  stage 0  {job['NodeList']}: 0-1"]
    assert result["sample_digest"] == expected["sample_digest"]
    assert result["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)  # as in test_launchers
    assert not [note for note in result["fallbacks"] if "several nodes" in note]


def test_jobs_that_are_submitted_in_a_step_of_another_one(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """Slurm hands on what it finds: a memory a CPU beside --mem=0, which srun may refuse, and ranks of a PMI that
    is gone. Once by submit, and once by an sbatch that was typed there.
    """
    words = f"{prepared.recipe} train.steps=2 --run-dir"
    lines = (
        "set -e; env >around",
        f"{' '.join(HVDTRAIN)} submit {words} one --nodes 1 --ranks-per-node 1 >said",
        f"sbatch --parsable --nodes=1 --ntasks-per-node=1 --output=log {TRAIN} {words} other",
    )
    step = ("salloc", "--quiet", "--ntasks=1", "--mem-per-cpu=1", "srun", "--mpi=pmi2", "sh", "-c", "\n".join(lines))
    env = {**environment(), "HVDTRAIN_PREFLIGHT": "0"}
    done = slurm.run(step, timeout_s=120, cwd=tmp_path, env=env)
    assert done.returncode == 0, done
    around = [line.partition("=")[0] for line in (tmp_path / "around").read_text().splitlines()]
    assert {"SLURM_STEP_ID", "SLURM_MEM_PER_CPU", "PMI_SIZE"} <= set(around), sorted(around)
    said = _rows(Done("none", 0, (tmp_path / "said").read_text(), ""))
    for job_id, log in ((said["job"].split()[0], Path(said["log"])), (done.stdout.strip(), tmp_path / "log")):
        job = slurm.wait(job_id, timeout_s=120)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    for run in ("one", "other"):
        assert summary(tmp_path / run)["launcher"] == "srun"
        (record,) = (tmp_path / run / "jobs").glob("*-0/job.json")
        seen = json.loads(record.read_text())["env"]
        assert "SLURM_STEP_ID" in seen
        assert not {"SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "PMI_SIZE"} & seen.keys()


def test_a_job_that_waits(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    words = ("submit", prepared.recipe, "--nodes", 1, "--run-dir", "run")
    rows = _rows(_hvdtrain(slurm, tmp_path, *words, "--slurm", "begin=now+1hour", "--time", "0-1"))
    job_id = rows["job"].split()[0]
    try:
        # The partition's own limit: of a job above it, Slurm may give that as the reason instead.
        assert slurm.show(int(job_id))["TimeLimit"] == "01:00:00"
        found = _status(slurm, tmp_path, "run")
        assert (found["state"], found["why"], found["job_id"]) == ("waiting", "pending: BeginTime", job_id)
        done = _hvdtrain(slurm, tmp_path, *words)
        assert (done.exit_code, len(done.messages)) == (2, 1), done
        assert f"job {job_id} of run is in the queue already (PENDING)" in done.messages[0]
    finally:
        slurm.run(["scancel", job_id], timeout_s=30)
    slurm.wait(job_id, timeout_s=30)
    found = _status(slurm, tmp_path, "run")
    assert (found["state"], found["why"]) == ("stopped", f"job {job_id} is not in the queue and has left no record")


def test_what_sbatch_refuses(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    words = ("submit", prepared.recipe, "--nodes", 1, "--partition", "nowhere", "--run-dir", "run")
    done = _hvdtrain(slurm, tmp_path, *words)
    assert (done.exit_code, len(done.messages), done.stdout) == (2, 1, ""), done
    assert "ConfigError: sbatch refused the job: " in done.messages[0]
    assert "invalid partition specified: nowhere" in done.messages[0]
    assert list((tmp_path / "run" / "jobs").iterdir()) == []
