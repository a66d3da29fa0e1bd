"""The record of a job: what is in it, what must never be, and that it can neither fail nor delay a run."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.jobs import job_record
from hvdtrain.jobs.job_record import close_job, job_name, record_job, telling, without_secrets
from hvdtrain.machine.asking import answer_of


class _Config(BaseModel):
    seed: int = 3


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no batch system were there, whatever started the tests."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "HVDTRAIN")):
            monkeypatch.delenv(name)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's command as a shell script that each test writes, found first on the PATH; job 4711."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    path = folder / "scontrol"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


def _begin(run_dir: Path, step: int = 0) -> tuple[Path, list[str]]:
    run_dir.mkdir(exist_ok=True)
    words = ["demo", "seed=3"]
    return record_job(run_dir, words, LocalGroup(), World(), _Config(), {"data_digest": "d1"}, step)


def _job(folder: Path) -> dict:
    return json.loads((folder / "job.json").read_text(encoding="utf-8"))


def test_what_a_record_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOADEDMODULES", "gcc/13:openmpi/5")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("NCCL_DEBUG", "caf\udce9")  # a byte that is no UTF-8
    folder, notes = _begin(tmp_path / "run", step=12)
    assert (folder.parent, notes) == (tmp_path / "run" / "jobs", [])
    job = _job(folder)
    expected = {"restart": 0, "step_began": 12, "world_size": 1, "launcher": "none", "nodes": {"n7": [0]}}
    expected |= {"recipe": ["demo", "seed=3"], "config": {"seed": 3}, "data": {"data_digest": "d1"}, "job_id": None}
    expected |= {"modules": ["gcc/13", "openmpi/5"]}
    assert {key: job[key] for key in expected} == expected
    assert job["env"]["NCCL_DEBUG"] == "caf\udce9"
    assert job["packages"].keys() >= {"torch", "horovod", "numpy", "hvdtrain"}
    assert job["started"].endswith("+00:00")
    assert "ended" not in job
    assert not (folder / "scontrol.txt").exists()

    assert close_job(folder, 75, "USR2", 40) == []
    ended = _job(folder)
    assert {key: ended[key] for key in ("exit_code", "reason", "step_ended")} == {
        "exit_code": 75,
        "reason": "USR2",
        "step_ended": 40,
    }
    assert ended["ended"] >= job["started"]
    assert {key: ended[key] for key in job} == job  # and nothing was lost
    assert [path.name for path in folder.iterdir()] == ["job.json"]


def test_names_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: Path):
    assert job_name({"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}) == "4711-2"
    assert job_name({}).endswith(f"-{os.getpid()}")
    # One job that trains twice in one run folder has two records.
    assert [_begin(tmp_path / "run")[0].name for _ in range(3)] == ["4711-0", "4711-0.2", "4711-0.3"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder, _ = _begin(tmp_path / "run")
    assert (folder.name, _job(folder)["restart"]) == ("4711-1", 1)


def test_what_slurm_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: Path):
    scontrol.write_text('#!/bin/sh\necho "asked: $*"\necho "export HF_TOKEN=hf_abc SEED=3"\n')
    folder, notes = _begin(tmp_path / "run")
    assert notes == []
    secret = "export HF_TOKEN=*** SEED=3\n"
    assert (folder / "batch_script.sh").read_text() == f"asked: write batch_script 4711 -\n{secret}"
    assert (folder / "scontrol.txt").read_text() == f"asked: show job 4711\n{secret}"
    # No batch job, or no word from Slurm: the file that the job script names.
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mine.sh").write_text("echo mine\n")
    monkeypatch.setenv("HVDTRAIN_BATCH_SCRIPT", str(tmp_path / "mine.sh"))
    folder, notes = _begin(tmp_path / "run")
    assert notes == []
    assert (folder / "batch_script.sh").read_text() == "echo mine\n"
    assert not (folder / "scontrol.txt").exists()


def test_no_secret_is_recorded():
    secrets = {"HVDTRAIN_TOKEN": "a", "SLURM_JWT": "b", "NCCL_Api_Key": "c", "UCX_PASSWORD": "d", "FI_SECRET_X": "e"}
    secrets |= {"HVDTRAIN_DATA": "https://me:word@host/x", "OMPI_MCA_orte_precondition_transports": "f"}
    told = {"SLURM_NNODES": "2", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "4", "FI_PROVIDER": "cxi"}
    told |= {"GOMP_SPINCOUNT": "0", "PMIX_RANK": "3"}
    assert telling({**secrets, **told, "HOME": "/root", "AWS_REGION": "x"}) == dict(sorted(told.items()))
    script = "export WANDB_API_KEY='a b' N=1\nX_PASSWORD=p; srun x\ngit clone https://me:word@host/x\nKEYS=1\n"
    clean = without_secrets(script)
    assert clean == "export WANDB_API_KEY=*** N=1\nX_PASSWORD=***; srun x\ngit clone https://***@host/x\nKEYS=***\n"


def test_a_hung_slurm_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: Path):
    scontrol.write_text("#!/bin/sh\nsleep 100 &\nwait\n")
    monkeypatch.setattr(job_record, "LIMIT_S", 0.3)
    monkeypatch.setattr(job_record, "_ANSWER_S", 2.0)
    began = time.monotonic()
    folder, notes = _begin(tmp_path / "run")
    assert time.monotonic() - began < 2.0  # less than one answer
    assert notes == [f"the record of this job in {folder} takes long; it may not be whole"]
    assert _job(folder)["job_id"] == "4711"  # what was known at once is there
    monkeypatch.setattr(job_record, "LIMIT_S", 30.0)
    assert close_job(folder, 0, "finished", 5) == []  # after the beginning, not in its midst
    job = _job(folder)
    assert (job["exit_code"], "packages" in job) == (0, True)
    assert not [thread for thread in threading.enumerate() if thread.name == "job record"]


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "jobs").write_text("a file")
    folder, notes = _begin(run_dir)
    assert notes == [f"no record of this job: cannot make {folder}: File exists"]
    assert close_job(folder, 0, "finished", 5) == []


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    folder, (note,) = _begin(tmp_path / "run")
    assert note == f"the record of this job is not whole: cannot write {folder}/job.json: No space left on device"
    (note,) = close_job(folder, 0, "finished", 5)
    assert "No space left on device" in note


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo why >&2; exit 3", r"sh failed \(exit 3\): why"), ("sleep 100", "sh has not answered within 0.2 s")],
)
def test_a_command_that_fails(script: str, reason: str):
    with pytest.raises(OSError, match=reason):
        answer_of(["sh", "-c", script], 0.2)
    with pytest.raises(OSError, match="no-such-command"):
        answer_of(["no-such-command"], 0.2)
