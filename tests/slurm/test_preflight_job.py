"""Preflight on the two nodes of a real Slurm, and what a job's record takes from it."""

import json
import sys
from pathlib import Path

from cluster import SlurmCluster
from command import until
from launch import TRACE, Done, Prepared, environment

DOCTOR = (sys.executable, "-m", "hvdtrain", "doctor", "--job", "--slow-factor", "50")
STEP = ("srun", "--nodes=2", "--ntasks=2", "--mpi=pmix", "--kill-on-bad-exit=1")
ROOT = Path(__file__).resolve().parents[2]


def run(slurm: SlurmCluster, *args: object) -> Done:
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    found = slurm.run([str(arg) for arg in args], timeout_s=120, env=env)
    return Done("none", found.returncode, found.stdout, found.stderr)


def test_two_healthy_nodes(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    done = run(slurm, *STEP, *DOCTOR, "--data", prepared.shards, "--run-dir", tmp_path / "run")
    assert done.exit_code == 0, done
    assert {tuple(line.split()[:2]) for line in done.stdout.splitlines()} >= {
        (node, check) for node in ("n1", "n2") for check in ("environment", "shards", "clock", "all-reduce", "memory")
    }
    assert done.stdout.splitlines()[-1].startswith("hvdtrain: preflight: 2 nodes healthy (")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_node_with_another_file_system_and_another_version(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """n2 starts in a folder of its own, where relative paths lead elsewhere, and finds another hvdtrain's metadata."""
    for name in ("n1", "n2/hvdtrain-0.0.1.dist-info"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "n1" / "shards").symlink_to(prepared.shards)
    (tmp_path / "n2/hvdtrain-0.0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: hvdtrain\nVersion: 0.0.1\n"
    )
    node = tmp_path / "node.sh"
    node.write_text('cd "${0%/*}/$SLURMD_NODENAME"\nexport PYTHONPATH="$PWD:$PYTHONPATH"\nexec "$@"\n')
    found = tmp_path / "found.json"
    words = ("--data", "shards", "--run-dir", "run", "--json", found)
    done = run(slurm, *STEP, "bash", node, *DOCTOR, *words)
    assert (done.exit_code, TRACE in done.text) == (70, False), done
    assert done.messages == ["hvdtrain: preflight: bad nodes: n2"], done
    bad = [row for row in json.loads(found.read_text())["findings"] if row["verdict"].startswith("BAD")]
    assert {(row["node"], row["check"]) for row in bad} == {
        ("n2", "environment"),
        ("n2", "shards shards"),
        ("n2", "run folder"),
    }, done
    assert "BAD: hvdtrain 0.0.1, elsewhere " in done.stdout


def test_a_node_that_hangs_is_ended_by_the_scripts_timeout(slurm: SlurmCluster, tmp_path: Path):
    """What the job script puts around this step."""
    node = tmp_path / "node.sh"
    node.write_text('[ "$SLURMD_NODENAME" = n2 ] && exec sleep 600\nexec "$@"\n')
    done = run(slurm, "timeout", "--kill-after=10", "6", *STEP, "bash", node, *DOCTOR)
    assert done.exit_code == 124, done
    until(lambda: not slurm.run(["squeue", "--noheader"], timeout_s=30).stdout, "the step has ended", timeout_s=30)


def test_the_record_of_a_batch_job(slurm: SlurmCluster, tmp_path: Path):
    program = (
        "from pathlib import Path; from hvdtrain.comm.local_group import LocalGroup as G\n"
        "from hvdtrain.comm.world import World; from hvdtrain.config import RunConfig\n"
        "from hvdtrain.jobs import job_record\n"
        "job_record.LIMIT_S = job_record._ANSWER_S = 60\n"
        "print(*job_record.record_job(Path(), ['demo'], G(), World(), RunConfig(), {})[1])\n"
    )
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\nexport HF_TOKEN=hf_abc\nexec {sys.executable} -c "{program}"\n')
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    job_id = slurm.sbatch("--nodes=1", f"--output={tmp_path}/log", script, cwd=tmp_path, env=env)
    job = slurm.wait(job_id, timeout_s=120)
    log = (tmp_path / "log").read_text()
    assert (job["ExitCode"], log) == ("0:0", "\n"), log
    record = tmp_path / "jobs" / f"{job_id}-0"
    assert (record / "batch_script.sh").read_text() == script.read_text().replace("hf_abc", "***")
    assert f"JobId={job_id} " in (record / "scontrol.txt").read_text()
    known = json.loads((record / "job.json").read_text())
    assert (known["job_id"], known["nodes"]) == (str(job_id), {"n1": [0]})
    assert known["env"]["SLURM_JOB_ID"] == str(job_id)
    assert known["config"]["train"]["steps"] > 0
