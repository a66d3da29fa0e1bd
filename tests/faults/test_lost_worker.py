"""An asynchronous worker is killed: the job ends at once, or, where the launcher allows it, others do its rows."""

from pathlib import Path

from breaking import program
from launch import TRACE, Prepared, launch, succeed, summary

ASYNC = (
    "sync.name=parameter_server",
    "sync.parameter_server.mode=asynchronous",
    "sync.parameter_server.servers=1",
    "metrics.every=1",
)
SURVIVE = ("sync.parameter_server.survive=true", "sync.parameter_server.lost_after_s=2")
KILLED = program("kill", "compute", rank=1)  # at its third ticket
RECOVERY = {"OMPI_MCA_orte_enable_recovery": "1"}  # as by `mpirun --enable-recovery`


def test_the_job_ends_and_the_same_command_goes_on(prepared: Prepared, trained: Path, tmp_path: Path):
    words = ("train", prepared.recipe, *ASYNC, "checkpoint.every=2", "--run-dir", "run")
    done = launch(*words, program=KILLED, how="mpirun", ranks=3, cwd=tmp_path)
    assert done.exit_code == 137 and TRACE not in done.text, done
    succeed(*words, how="mpirun", ranks=3, cwd=tmp_path)
    assert summary(tmp_path / "run")["sample_digest"] == summary(trained)["sample_digest"]


def test_others_do_its_rows_to_the_end(prepared: Prepared, trained: Path, tmp_path: Path):
    """No evaluation, whose ranks would have to meet: that is for the same command, afterwards. The launcher's own exit
    code is 0 then, whatever its ranks end with.
    """
    words = ("train", prepared.recipe, *ASYNC, "--run-dir", "run")
    done = launch(*words, *SURVIVE, program=KILLED, how="mpirun", ranks=4, cwd=tmp_path, env=RECOVERY)
    told = [line for line in done.messages if "rank 1 has not answered for 2 s: others get its rows" in line]
    assert len(told) == 1 and TRACE not in done.text, done
    end = "1 worker lost on the way; saved at step 12, and the same command goes on"
    assert [line for line in done.messages if end in line], done
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == [
        "step-00000006",
        "step-00000012",
    ]
    assert not (tmp_path / "run/summary.json").exists()
    succeed(*words, how="mpirun", ranks=3, cwd=tmp_path)
    found, expected = summary(tmp_path / "run"), summary(trained)
    assert (found["step"], found["tokens"]) == (12, expected["tokens"])
    assert found["sample_digest"] == expected["sample_digest"]
