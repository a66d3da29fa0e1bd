"""slurm/elastic.sbatch goes on, in the same job, on the nodes that are left: its turns with fakes, then a real Slurm.

The fakes are those of test_job_script.py.
"""

import sys
from pathlib import Path

import pytest
from cluster import SlurmCluster
from command import until
from launch import Prepared, environment, summary
from test_job_faults import _WAIT, LONG_S, ROOT, SETTINGS, SILENT_S
from test_job_faults import Job as Submitted
from test_job_script import FAKES, SAVED, Job
from test_job_script import job as job  # a fixture

# Of the nodes that are asked, those in DEAD do not answer; of those that do, SHARE can share the batch.
_FAKES = {
    "srun": f'for word; do [[ " $DEAD " != *" ${{word#--nodelist=}} "* ]] || exit 1; done\n{FAKES["srun"]}',
    "python": f'[ "$1 $2" != "-m hvdtrain.jobs.elastic_rank" ] || echo "${{SHARE:-$4}}"\n{FAKES["python"]}',
}


@pytest.fixture
def elastic(job: Job) -> Job:
    for name, text in _FAKES.items():
        (job.folder / "fake" / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    job.env |= {"DEAD": "", "HVDTRAIN_RANKS_PER_NODE": "2"}
    del job.env["SLURM_NTASKS"], job.env["SLURM_NTASKS_PER_NODE"]
    return job


def starts(job: Job) -> list[str]:
    """The steps of srun that trained: on which nodes, and what was said of the resumption."""
    calls = [call for call in job.called("srun ") if "-m hvdtrain train" in call]
    words = [call.replace("--resume auto", "--resume=auto").split() for call in calls]
    return [" ".join(w for w in call if w.startswith(("--ntasks", "--exclude=", "--resume="))) for call in words]


def test_all_nodes_are_there(elastic: Job):
    assert elastic.run("demo", "optim.lr=1", "--run-dir", "x", "seed=2", script="elastic") == 0, elastic.log
    assert starts(elastic) == ["--ntasks=4 --ntasks-per-node=2"]
    assert elastic.called("python -m hvdtrain.jobs.elastic_rank") == [
        "python -m hvdtrain.jobs.elastic_rank 2 2 x demo optim.lr=1 seed=2"
    ]
    assert elastic.called("ranks=")[0].startswith("ranks=4 ")


@pytest.mark.parametrize(
    ("env", "said"),
    [({"DEAD": "n2"}, "n2 does not answer"), ({"SHARE": "1"}, "of 2 nodes, 1 can share the batch evenly")],
)
def test_one_node_is_not_used(elastic: Job, env: dict[str, str], said: str):
    assert elastic.run(script="elastic", **env) == 0, elastic.log
    assert f"hvdtrain job: {said}" in elastic.log
    assert starts(elastic) == ["--ntasks=2 --ntasks-per-node=2 --exclude=n2"]
    assert elastic.called("ranks=")[0].startswith("ranks=2 ")


def test_a_rank_dies(elastic: Job):
    """The step starts again, as often as there are newer checkpoints, and three times without; then the job does."""
    again = '[ "$(wc -l <starts)" -gt 2 ] || { echo >>starts; exit 137; }; exit 75'
    (elastic.folder / "starts").touch()
    assert elastic.run(script="elastic", TRAIN=again) == 75, elastic.log
    assert starts(elastic) == ["--ntasks=4 --ntasks-per-node=2"] + ["--ntasks=4 --ntasks-per-node=2 --resume=auto"] * 3
    assert elastic.log.count("a rank has died; going on from the start") == 3
    assert len(elastic.called("scontrol requeue")) == 1

    assert elastic.run(script="elastic", TRAIN="exit 137", HVDTRAIN_MAX_STALLED="1") == 137
    assert len(starts(elastic)) == 2
    saving = "n=$(ls runs/demo/checkpoints 2>/dev/null | wc -l); ((n < 6)) || exit 0; " + SAVED.replace("{}", "$n")
    assert elastic.run(script="elastic", TRAIN=f"{saving} exit 137", HVDTRAIN_MAX_STALLED="1") == 0, elastic.log
    assert len(starts(elastic)) == 7


@pytest.mark.parametrize("code", [2, 65, 71, 74, 76, 130])
def test_what_would_only_happen_again(elastic: Job, code: int):
    assert elastic.run(script="elastic", TRAIN=f"exit {code}") == code
    assert len(starts(elastic)) == 1
    assert elastic.called("scontrol requeue") == []


def test_a_number_of_tasks_is_refused(elastic: Job):
    """Slurm would then give the fewest nodes of --nodes=1-4."""
    assert elastic.run(script="elastic", SLURM_NTASKS="1") == 2
    assert "hvdtrain job: leave out --ntasks and --ntasks-per-node" in elastic.log


def test_no_node_answers(elastic: Job):
    assert elastic.run(script="elastic", DEAD="n1 n2") == 70, elastic.log
    assert starts(elastic) == []
    assert "n1 does not answer" in elastic.log


@pytest.mark.usefixtures("slurm")  # it says where there is none
def test_lost_node(prepared: Prepared, trained: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """n2 loses its power, and the same job goes on without it.

    Its last rank waits in the fifth step of the job's first step of srun, see test_job_faults.py.
    """
    once = _WAIT.replace("if start <", "if not (place / 'waits-0').exists() and start <")
    assert once != _WAIT
    (tmp_path / "wait.py").write_text(once)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    wait = f'"-m hvdtrain train"*) shift 2 && set -- "{tmp_path}/wait.py" "$@" ;;'
    python.write_text(f'#!/bin/sh\ncase "$*" in {wait} esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    env = {"HVDTRAIN_HOME": str(ROOT), "HVDTRAIN_VENV": str(tmp_path / "venv"), "WAITS": "1"}
    env |= {**environment(), "HVDTRAIN_LAUNCHER": "pmix", "HVDTRAIN_RANKS_PER_NODE": "1"}
    options = ("--nodes=1-2", f"--output={tmp_path}/log", ROOT / "slurm" / "elastic.sbatch")
    settings = (*SETTINGS, "checkpoint.every=3", f"watchdog.network_timeout_s={SILENT_S}")
    words = (prepared.recipe, *settings, "--run-dir", "run")
    with SlurmCluster(tmp_path_factory.mktemp("own")) as own:
        job = Submitted(own, own.sbatch(*options, *words, cwd=tmp_path, env=env), tmp_path)
        job.wait_in_step()
        own.network.power_off("n2")
        own.run(["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost"], timeout_s=30)  # else in 30 to 45 s
        try:
            until(lambda: "hvdtrain job: n2 does not answer" in job.log, "it is seen that n2 is dead", LONG_S)
        except TimeoutError as error:
            error.add_note(job.log)
            raise
        found = job.finish(restarts=0)
    assert "a rank has died; going on from step-00000003 with the nodes that are left" in job.log
    assert "hvdtrain: resumed from run/checkpoints/step-00000003" in job.log
    expected = summary(trained)
    assert (found["world_size"], found["sample_digest"]) == (1, expected["sample_digest"])
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)  # as in test_launchers
