"""A model over ranks, from the command line down: without MPI, and with a checkpoint of another model."""

from pathlib import Path

import pytest
from launch import TRACE, Prepared, launch, succeed, summary

# Ranks add in another order, and 12 steps of AdamW follow, as in test_launchers.
LOSS_TOLERANCE = 1e-4


def test_parts_and_stages_without_mpi(prepared: Prepared, trained: Path, tmp_path: Path):
    """Gloo carries gradients, sums within layers and what stages hand on."""
    words = ("mesh.tensor=2", "mesh.pipeline=2", "--run-dir", tmp_path / "run")
    succeed("train", prepared.recipe, *words, how="gloo", ranks=4)
    found, expected = summary(tmp_path / "run"), summary(trained)
    assert (found["launcher"], found["backend"], found["replicas"]) == ("horovodrun --gloo", "gloo", 1)
    for key in ("sample_digest", "tokens", "step", "status", "parameters"):
        assert found[key] == expected[key], key
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=LOSS_TOLERANCE)
    assert [note for note in found["fallbacks"] if "more stages than a step has microbatches (1)" in note]


def test_a_checkpoint_of_another_model_is_refused_by_all_ranks(prepared: Prepared, trained: Path, tmp_path: Path):
    words = ("train", prepared.recipe, "mesh.pipeline=2", "model.width=64", "--resume", trained)
    done = launch(*words, "--run-dir", tmp_path / "run", how="mpirun", ranks=2, timeout_s=60)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (2, 1, False), done
    assert "model.width was 32 and is now 64" in done.messages[0]
    assert not (tmp_path / "run").exists()
