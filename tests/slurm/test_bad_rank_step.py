"""One bad rank of a job step: srun ends the others, and its message is the last before srun's."""

from pathlib import Path

from breaking import program
from cluster import SlurmCluster
from launch import Done, Prepared, environment


def test_an_error_on_one_node_ends_the_other(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    srun = ("srun", "--nodes=2", "--ntasks=2", "--mpi=pmix", "--kill-on-bad-exit=1", "--chdir", tmp_path)
    train = (*program("error", "data"), "train", prepared.recipe, "--run-dir", "run")
    found = slurm.run([str(arg) for arg in (*srun, *train)], timeout_s=120, env=environment())
    done = Done("none", found.returncode, found.stdout, found.stderr)
    assert done.exit_code == 70, done
    assert done.messages == ["hvdtrain: [rank 1 on n2] RuntimeError: oh"], done
    after = done.stderr.partition(done.messages[0])[2].splitlines()[1:]
    assert [line for line in after if not line.startswith(("srun: ", "slurmstepd"))] == [], done
