"""A parameter server from the command line down: the rows and scores of one process, saves that others go on from."""

from pathlib import Path

import pytest
from launch import Prepared, succeed, summary

SERVER = ("sync.name=parameter_server", "sync.parameter_server.servers=1")


def test_two_workers_and_a_server_train_as_one_process_does(prepared: Prepared, trained: Path, tmp_path: Path):
    """The second half by two ranks that serve one another. val_loss: fp32 sums in another order, over 12 steps."""
    run_dir, expected = tmp_path / "run", summary(trained)
    words = ("train", prepared.recipe, "sync.name=parameter_server", "--run-dir", run_dir)
    done = succeed(*words, SERVER[1], "train.steps=6", how="mpirun", ranks=3)
    assert "hvdtrain: training on 2 ranks, parameters on 1 server" in done.text
    half = summary(run_dir)
    assert (half["replicas"], half["world_size"], half["servers"]) == (2, 3, 1)
    assert half["sent_mib"] > 0
    succeed(*words, how="mpirun", ranks=2)
    found = summary(run_dir)
    assert (found["step"], found["tokens"]) == (expected["step"], expected["tokens"])
    assert found["sample_digest"] == expected["sample_digest"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    assert found["servers"] == 0
