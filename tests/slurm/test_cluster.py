"""The two-node Slurm itself: what the other Slurm tests rely on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import SlurmCluster, require_slurm
from command import until


def test_two_ranks_land_on_two_nodes(slurm: SlurmCluster):
    done = slurm.run(["srun", "--nodes=2", "--ntasks=2", "hostname"], timeout_s=30)
    # What srun says meanwhile is no fault: a job before this one may still be leaving its nodes.
    others = [line for line in done.stderr.splitlines() if not line.startswith("srun: ")]
    assert (sorted(done.stdout.split()), others, done.returncode) == (["n1", "n2"], [], 0), done.stderr


def test_the_exit_code_of_a_batch_job_is_readable(slurm: SlurmCluster, tmp_path: Path):
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/bash\necho "$GREETING from $SLURMD_NODENAME"\nexit 7\n')
    job_id = slurm.sbatch("--nodes=1", "--output=%x-%j.log", script, cwd=tmp_path, env={"GREETING": "hello"})
    job = slurm.wait(job_id, timeout_s=30)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "7:0")
    assert (tmp_path / f"job.sh-{job_id}.log").read_text() == "hello from n1\n"


def test_mpi_spans_the_nodes(slurm: SlurmCluster):
    """Not by `srun --mpi=list`, which shows pmix also where libpmix.so is missing and every such job fails."""
    program = "from mpi4py import MPI; print(MPI.COMM_WORLD.size, MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank + 1))"
    srun = ["srun", "--mpi=pmix", "--nodes=2", "--ntasks=2", sys.executable, "-W", "error", "-c", program]
    done = slurm.run(srun, timeout_s=60)
    assert (done.stdout.splitlines(), done.returncode) == (["2 3", "2 3"], 0), done.stderr


def test_a_preempted_job_starts_again(slurm: SlurmCluster, tmp_path: Path):
    """Within seconds: with Slurm's own cred_expire it would wait for two minutes."""
    twice = tmp_path / "twice.sh"
    twice.write_text("#!/bin/bash\necho start $SLURM_RESTART_COUNT\n((SLURM_RESTART_COUNT)) || sleep 600\n")
    whole = ("--nodes=2", "--exclusive", "--open-mode=append", f"--output={tmp_path}/log")
    job_id = slurm.sbatch(*whole, twice)
    until((tmp_path / "log").exists, "the first start", timeout_s=30)
    urgent = slurm.sbatch(*whole, "--partition=urgent", "--wrap=echo urgent")
    assert slurm.wait(urgent, timeout_s=30)["JobState"] == "COMPLETED"
    assert slurm.wait(job_id, timeout_s=60)["Restarts"] == "1"
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("slurmstepd")]
    assert [line.rstrip() for line in lines] == ["start", "urgent", "start 1"]


def test_at_the_timeout_the_step_goes_too(slurm: SlurmCluster):
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        slurm.run(["srun", "--nodes=2", "sh", "-c", "echo begun; exec sleep 600"], timeout_s=2)
    assert caught.value.stdout == "begun\n" * 2
    until(lambda: not slurm.run(["squeue", "--noheader"], timeout_s=10).stdout, "the step has ended", timeout_s=10)


def test_nothing_outlives_the_cluster(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory):
    """Not even the step of a node whose slurmd is dead, which Slurm cannot cancel; and the other cluster lives on."""
    with SlurmCluster(tmp_path_factory.mktemp("own")) as own:
        log = own.folder / "job"
        own.sbatch("--nodes=2", f"--output={log}", "--wrap=srun sh -c 'echo begun; exec sleep 600'")
        until(lambda: log.exists() and log.read_text() == "begun\n" * 2, "two steps run", timeout_s=30)
        own.daemons["n2"].kill()
        pids = own.processes()
        assert pids > {daemon.pid for name, daemon in own.daemons.items() if name != "n2"}
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
        assert (names.count("sleep"), names.count("slurmstepd")) == (2, 3), names  # two steps and the batch shell's
    # "exe": what is dead and only waits for its parent, pid 1, to notice has none any more.
    assert {pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")} == set()
    assert all(daemon.poll() is None for daemon in slurm.daemons.values())


def test_a_killed_pytest_leaves_no_cluster(tmp_path_factory: pytest.TempPathFactory):
    """Although it cannot cancel its jobs any more. Cables and mounts go with the processes, see test_hosts.py."""
    require_slurm()
    make = (
        "import sys, time\nfrom pathlib import Path\nfrom cluster import SlurmCluster\nfrom command import until\n"
        "with SlurmCluster(Path(sys.argv[1])) as own:\n"
        "    log = own.folder / 'job'\n"
        "    own.sbatch('--nodes=2', f'--output={log}', '--wrap=srun sh -c \"echo begun; exec sleep 600\"')\n"
        "    until(lambda: log.exists() and log.read_text() == 'begun\\n' * 2, 'two steps run', 60)\n"
        "    print(*own.processes(), *(host.pid for host in own.hosts.values()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", make, tmp_path_factory.mktemp("own")]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE) as maker:
        pids = [int(word) for word in maker.stdout.readline().split()]
        maker.kill()
    assert len(pids) > 10
    until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids), "all of it has ended", timeout_s=10)


def test_a_daemon_that_cannot_start_is_told_with_its_log(tmp_path_factory, monkeypatch: pytest.MonkeyPatch):
    require_slurm()
    cluster = SlurmCluster(tmp_path_factory.mktemp("own"))
    (cluster.folder / "template").write_text("ClusterName=hvdtrain-test\nNonsense=1\n")
    monkeypatch.setattr("cluster.TEMPLATE", cluster.folder / "template")
    with pytest.raises(RuntimeError, match=r"(?s)^(slurmctld|n1|n2)\b.* ended.*Nonsense"), cluster:
        pass
    assert all(daemon.poll() is not None for daemon in cluster.daemons.values())
    assert not any(os.path.exists(f"/proc/{host.pid}") for host in cluster.hosts.values())


def test_a_folder_too_deep_for_a_socket_is_refused():
    with pytest.raises(ValueError, match="has 81 characters, at most 80"):
        SlurmCluster(Path("/" + "x" * 80))


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_slurm_a_ci_fails_and_a_workstation_skips(ci: str, outcome: type[Exception], monkeypatch):
    monkeypatch.setattr("shutil.which", lambda command, path: None)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"no munged, slurmctld.* run \.ci/install-slurm"):
        require_slurm()


def test_without_namespaces_either(monkeypatch: pytest.MonkeyPatch):
    require_slurm()
    monkeypatch.setattr("cluster.why_no_hosts", lambda: "no hosts of their own here: unshare failed")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="tests/slurm: no hosts of their own here"):
        require_slurm()
