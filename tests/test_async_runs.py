"""An asynchronous parameter server from the command line down: the rows of one process, lines, saves that go on."""

from pathlib import Path

import pytest
from launch import Prepared, succeed, summary

from hvdtrain.watch.log_file import read_log

ASYNC = ("sync.name=parameter_server", "sync.parameter_server.mode=asynchronous", "sync.parameter_server.servers=1")


def test_three_workers_and_a_server_and_later_two_consume_the_rows_of_one_process(
    prepared: Prepared, trained: Path, tmp_path: Path
):
    """val_loss: of pushes of a third of a batch at a lower rate, a few updates old; within 5 % of one process's."""
    run_dir, expected = tmp_path / "run", summary(trained)
    words = ("train", prepared.recipe, *ASYNC, "--run-dir", run_dir)
    done = succeed(*words, "train.steps=6", how="mpirun", ranks=4)
    assert "hvdtrain: training on 3 ranks, parameters on 1 server" in done.text
    assert "is 1/3 of a batch, so the learning rate is multiplied by 0.577 " in done.text
    half = summary(run_dir)
    assert (half["replicas"], half["world_size"], half["servers"]) == (3, 4, 1)
    succeed(*words, how="mpirun", ranks=3)
    found = summary(run_dir)
    assert (found["step"], found["tokens"]) == (expected["step"], expected["tokens"])
    assert found["sample_digest"] == expected["sample_digest"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=0.05)
    lines = [line for line in read_log(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert {6, 12} < {line["step"] for line in lines}
    assert all(line["staleness_mean"] <= line["staleness_max"] for line in lines)
    assert lines[-1]["tokens"] == expected["tokens"]
