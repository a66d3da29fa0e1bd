"""Replicas that step apart, from the command line down: stopped within a round, resumed, and what is refused."""

import json
import shutil
from pathlib import Path

from launch import Prepared, launch, launch_rows, snapshot, succeed, summary

LAST, SAVED = (Path(f"checkpoints/step-000000{step}") for step in ("12", "06"))
DILOCO = ("sync.name=local_sgd", "sync.local_sgd.every=4", "sync.local_sgd.outer=nesterov")


def test_two_ranks_killed_within_a_round_and_resumed(prepared: Prepared, trained: Path, tmp_path: Path):
    """A checkpoint at 6, where rounds end at 4, 8 and 12; lines at 3, 6, 9, 12. Killed after 6, it goes on there."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train = ("train", prepared.recipe, *DILOCO, "checkpoint.keep_last=0", "--run-dir")
    succeed(*train, whole, how="mpirun", ranks=2)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / LAST)
    (broken / "summary.json").unlink()
    assert f"resumed from {broken / SAVED}" in succeed(*train, broken, how="mpirun", ranks=2).text
    assert snapshot(broken / LAST) == snapshot(whole / LAST)
    found, expected = summary(broken), summary(whole)
    for key in ("sample_digest", "val_loss", "tokens", "consensus_distance"):
        assert found[key] == expected[key], key
    one = summary(trained)
    assert (expected["sample_digest"], expected["tokens"]) == (one["sample_digest"], one["tokens"])
    assert abs(expected["val_loss"] - one["val_loss"]) < 0.2
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 3, 6, 9, 12]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [6, 12]
    rows = 12 * 16
    assert [line["tokens"] for line in lines if line["kind"] == "train"] == [step * rows for step in (1, 3, 6, 9, 12)]


def test_adasum_between_two_ranks_by_open_mpis_ring(prepared: Prepared, trained: Path, tmp_path: Path):
    """Also: who sums is measured where the user asks for it, said, and recorded."""
    words = ("train", prepared.recipe, "sync.allreduce.combine=adasum", "--run-dir", tmp_path / "run")
    done = succeed(*words, how="mpirun", ranks=2, env={"HVDTRAIN_ALLREDUCE": "measure"})
    found = summary(tmp_path / "run")
    assert found["all_reduce"]["algorithm"] in ("default", "ring")
    assert found["all_reduce"]["ring_ms"] > 0
    assert f"hvdtrain: all-reduce: {found['all_reduce']['algorithm']}; 4 MiB take " in done.text
    one = summary(trained)
    assert found["sample_digest"] == one["sample_digest"]
    assert found["val_loss"] != one["val_loss"]
    assert abs(found["val_loss"] - one["val_loss"]) < 0.5
    assert one["all_reduce"] is None


def test_adasum_between_three_ranks_is_refused(prepared: Prepared, tmp_path: Path):
    words = ("train", prepared.recipe, "sync.allreduce.combine=adasum", "train.global_batch=12", "--run-dir", tmp_path)
    done = launch(*words, how="mpirun", ranks=3)
    assert done.exit_code == 2, done
    (message,) = done.messages
    assert "ConfigError: sync.allreduce.combine=adasum combines ranks two by two, and 3 are no power of two" in message
    assert message.endswith("start 2 or 4 ranks, or set sync.allreduce.combine=sum")


REFUSED = {
    "sync.local_sgd.every=13 is longer than the run, 12 steps": ("sync.name=local_sgd", "sync.local_sgd.every=13"),
    "ema.decay=0.9 does not go with sync.name=gossip: between two meetings": ("sync.name=gossip", "ema.decay=0.9"),
    "guard.policy=skip does not go with sync.name=average: each replica": ("sync.name=average", "guard.policy=skip"),
    "mesh.tensor=2 does not go with sync.name=local_sgd: replicas": ("sync.name=local_sgd", "mesh.tensor=2"),
}


def test_what_makes_no_sense_is_refused(prepared: Prepared, tmp_path: Path):
    rows = [("train", prepared.recipe, *words, "--run-dir", tmp_path / "run") for words in REFUSED.values()]
    for done, message in zip(launch_rows(rows), REFUSED, strict=True):
        assert done.exit_code == 2, done
        assert done.messages[0].startswith(f"hvdtrain: ConfigError: {message}"), done
        assert len(done.messages) == 1
    assert not (tmp_path / "run").exists()
