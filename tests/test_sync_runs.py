"""Replicas that step apart, from the command line down: stopped within a round, resumed, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from launch import Prepared, snapshot, succeed, summary
from modes import MODES, Row, in_one_go

from hvdtrain.errors import EXIT_OK, EXIT_USAGE

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


_SERVER = ("sync.name=parameter_server", "sync.parameter_server.servers=1")
_ASYNC = (*_SERVER, "sync.parameter_server.mode=asynchronous")
_RAMP = ("train.ramp_start=6", "train.ramp_increment=6", "train.ramp_tokens=192")
# Beginnings of messages, and what asks for it of three ranks.
REFUSED = {
    "sync.allreduce.combine=adasum combines ranks two by two, and 3 are no power of two; start 2 or 4 ranks, or set ": (
        "sync.allreduce.combine=adasum",
    ),
    "sync.allreduce.topology=torus: Horovod has it over NCCL alone, and gradients travel over ": (
        "sync.allreduce.topology=torus",
    ),
    "sync.gossip.topology=hypercube does not fit 3 replicas; start 2 or 4, or set sync.gossip.topology=exponential": (
        "sync.name=gossip",
        "sync.gossip.topology=hypercube",
    ),
    "sync.gossip.topology=torus does not fit 3 replicas; start 4, or set": (
        "sync.name=gossip",
        "sync.gossip.topology=torus",
    ),
    "sync.gossip.every=13 is longer than the run, 12 steps": ("sync.name=gossip", "sync.gossip.every=13"),
    "sync.local_sgd.every=13 is longer than the run, 12 steps": ("sync.name=local_sgd", "sync.local_sgd.every=13"),
    "sync.local_sgd.after_steps=12 leaves no local step in a run of 12": (
        "sync.name=local_sgd",
        "sync.local_sgd.after_steps=12",
    ),
    "sync.parameter_server.servers=3 leaves none of 3 ranks to train; start 4 ranks or more, or set it to 2 or fewer": (
        *_SERVER,
        "sync.parameter_server.servers=3",
    ),
    "sync.parameter_server.servers=0 does not go with sync.parameter_server.mode=asynchronous: a rank that computes": (
        *_ASYNC,
        "sync.parameter_server.servers=0",
    ),
    "sync.parameter_server.survive=true: this launcher ends all ranks when one dies; start with `mpirun --enable-": (
        *_ASYNC,
        "sync.parameter_server.survive=true",
    ),
    "train.ramp_start=6 does not go with sync.parameter_server.mode=asynchronous: rows are dealt": (*_ASYNC, *_RAMP),
    "precision=fp16 does not go with sync.parameter_server.mode=asynchronous: each worker": (*_ASYNC, "precision=fp16"),
    "optim.name=muon does not go with sync.parameter_server.mode=asynchronous: all workers": (
        *_ASYNC,
        "optim.name=muon",
    ),
    "guard.policy=skip does not go with sync.parameter_server.mode=asynchronous: a push is": (
        *_ASYNC,
        "guard.policy=skip",
    ),
    "optim.name=lamb does not go with sync.parameter_server.servers=2: norms of whole tensors": (
        *_ASYNC,
        "sync.parameter_server.servers=2",
        "optim.name=lamb",
    ),
    "optim.name=muon does not go with sync.name=sign: it gives signs, whose directions": (
        "sync.name=sign",
        "optim.name=muon",
        "optim.clip_norm=0",
    ),
    "ema.decay=0.9 does not go with sync.name=gossip: between two meetings": ("sync.name=gossip", "ema.decay=0.9"),
    "guard.policy=skip does not go with sync.name=average: each replica": ("sync.name=average", "guard.policy=skip"),
    "balance.every=5 does not go with sync.name=sign: a rank has one vote": (
        "sync.name=sign",
        "balance.every=5",
        "optim.name=sgd",
        "optim.momentum=0",
        "optim.clip_norm=0",
    ),
    "sync.allreduce.combine=adasum does not go with sync.zero.stage=1: only": (
        "sync.name=zero",
        "sync.allreduce.combine=adasum",
    ),
    "mesh.tensor=2 does not go with sync.name=local_sgd: replicas": ("sync.name=local_sgd", "mesh.tensor=2"),
    "mesh.pipeline=2 does not go with sync.name=topk: it compresses": ("sync.name=topk", "mesh.pipeline=2"),
    "sync.name=parameter_server does not go with mesh.tensor=2: a server": (*_SERVER, "mesh.tensor=2"),
}


def test_what_makes_no_sense_is_refused_by_all_ranks_with_one_message(prepared: Prepared, tmp_path: Path):
    rows = [Row(("train", prepared.recipe, *words, "--run-dir", tmp_path / "run")) for words in REFUSED.values()]
    codes, done = in_one_go(rows, ranks=3)
    assert codes == [EXIT_USAGE] * len(REFUSED), done
    assert len(done.messages) == len(REFUSED), done
    for found, beginning in zip(done.messages, REFUSED, strict=True):
        assert found.startswith(f"hvdtrain: ConfigError: {beginning}"), found
    assert not (tmp_path / "run").exists()


def test_muon_goes_with_every_way_but_those_that_refuse_it(prepared: Prepared, tmp_path: Path):
    """val_loss after 6 steps: of ways that are exact that of all-reduce, of others within 5 %; each says so."""
    modes = ("allreduce", "powersgd", "topk", "local_sgd", "diloco", "gossip-push", "average", "server-apart")
    words = ("train", prepared.recipe, "optim.name=muon", "train.steps=6", "eval.every=0", "metrics.tensorboard=false")
    codes, done = in_one_go(Row((*words, *MODES[mode], "--run-dir", tmp_path / mode)) for mode in modes)
    assert codes == [EXIT_OK] * len(modes), done
    found = {mode: summary(tmp_path / mode) for mode in modes}
    for mode, one in found.items():
        is_exact = mode in ("allreduce", "server-apart")
        assert one["val_loss"] == pytest.approx(found["allreduce"]["val_loss"], rel=1e-3 if is_exact else 0.05), mode
        assert (one["drift"] is None) == is_exact, mode
        assert is_exact or f"hvdtrain: not what one process trains: {one['drift']}" in done.text
