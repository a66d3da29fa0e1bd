"""Training on the two nodes of a real Slurm: by srun, by mpirun in the job, by an srun that tells the ranks nothing."""

import re
import sys
from pathlib import Path

import pytest
from cluster import SlurmCluster
from launch import TRACE, Done, Prepared, environment, summary

TRAIN = (sys.executable, "-m", "hvdtrain", "train")
SRUN = ("srun", "--nodes=2", "--ntasks=2")


def _run(slurm: SlurmCluster, *args: object) -> Done:
    found = slurm.run([str(arg) for arg in args], timeout_s=120, env=environment())
    return Done("none", found.returncode, found.stdout, found.stderr)


@pytest.mark.parametrize(
    ("start", "launcher"),
    [
        ((*SRUN, "--mpi=pmix", "--kill-on-bad-exit=1"), "srun"),
        (("salloc", "--nodes=2", "--ntasks=2", "--quiet", "mpirun", "--bind-to", "none"), "mpirun"),
    ],
    ids=["srun", "mpirun"],
)
def test_two_nodes_train_what_one_process_trains(
    slurm: SlurmCluster, prepared: Prepared, trained: Path, tmp_path: Path, start: tuple[str, ...], launcher: str
):
    done = _run(slurm, *start, *TRAIN, prepared.recipe, "--run-dir", tmp_path / "run")
    assert done.exit_code == 0, done
    found, expected = summary(tmp_path / "run"), summary(trained)
    assert (found["launcher"], found["backend"], found["world_size"]) == (launcher, "mpi", 2)
    for key in ("sample_digest", "data_digest", "tokens", "step", "status"):
        assert found[key] == expected[key], key
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)  # as in test_launchers
    assert done.stdout.count(f"hvdtrain: 2 ranks ({launcher}, mpi)") == 1


def test_a_layer_that_is_spread_over_two_nodes_is_warned_of(
    slurm: SlurmCluster, prepared: Prepared, trained: Path, tmp_path: Path
):
    """With what it costs, measured; by submit before there is anything to measure."""
    words = (prepared.recipe, "mesh.tensor=2", "--run-dir", tmp_path / "run")
    done = _run(slurm, *SRUN, "--mpi=pmix", "--kill-on-bad-exit=1", *TRAIN, *words)
    assert done.exit_code == 0, done
    note = r"note: parts of a layer are on several nodes \(n1: 0, n2: 1\), .* \(64 KB summed in [\d.]+ ms\)"
    assert len(re.findall(note, done.stdout)) == 1, done
    assert "parts over mpi" in done.stdout
    assert summary(tmp_path / "run")["val_loss"] == pytest.approx(summary(trained)["val_loss"], abs=1e-4)
    done = _run(slurm, *TRAIN[:-1], "submit", *words, "--nodes", 2, "--ranks-per-node", 1, "--dry-run")
    assert "mesh.tensor=2 does not divide the 1 rank of a node" in done.messages[0], done


def test_sruns_exit_code_is_that_of_the_ranks(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """Although it ends the second as soon as the first has left, and then tells the higher code: 143 of a SIGTERM."""
    train = (*TRAIN, prepared.recipe, "data.dir=/nowhere", "--run-dir", tmp_path / "run")
    done = _run(slurm, *SRUN, "--mpi=pmix", "--kill-on-bad-exit=1", *train)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (65, 1, False), done
    assert "no shards in /nowhere" in done.messages[0]


def test_ranks_that_know_nothing_of_one_another_are_refused(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """MpiDefault is none here, as on many clusters: without --mpi=pmix each would train alone, in the same folder.

    Without --kill-on-bad-exit, which would end the second task before it has read its own environment.
    """
    done = _run(slurm, *SRUN, *TRAIN, prepared.recipe, "--run-dir", tmp_path / "run")
    assert (done.exit_code, TRACE in done.text) == (2, False), done
    assert "srun started 2 tasks, but each of them sees a world of 1" in done.messages[0]
    assert "start with `srun --mpi=pmix`" in done.messages[0]
    assert len(done.messages) == 1, done
    assert not (tmp_path / "run").exists()
