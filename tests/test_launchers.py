"""The same run under every launcher, and launchers that do not fit the ranks that they start."""

import json
import sys
from pathlib import Path

import pytest
from launch import TRACE, Prepared, launch, succeed, summary

# Seen: 2e-8. The ranks' sums are added in another order, and 12 steps of AdamW follow.
LOSS_TOLERANCE = 1e-4


def test_one_process_needs_no_launcher(trained: Path):
    names = {path.relative_to(trained).as_posix() for path in trained.rglob("*")}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        *(f"checkpoints/step-{step:08d}/manifest.json" for step in (6, 12)),
        *(f"checkpoints/step-{step:08d}/part-00000-of-00001.safetensors" for step in (6, 12)),
    }
    assert any(name.startswith("tensorboard/events.") for name in names)
    assert not [name for name in names if ".tmp" in name or ".partial" in name]
    found = summary(trained)
    assert {key: found[key] for key in ("status", "step", "tokens", "world_size", "launcher", "backend")} == {
        "status": "finished",
        "step": 12,
        "tokens": 12 * 12 * 16,
        "world_size": 1,
        "launcher": "none",
        "backend": "none",
    }
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("train", step) for step in (1, 3, 6)),
        ("eval", 6),
        *(("train", step) for step in (9, 12)),
        ("eval", 12),
    ]
    assert lines[-1]["val_loss"] == found["val_loss"] < lines[3]["val_loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("how", "ranks", "launcher", "backend"),
    [
        ("horovodrun", 2, "mpirun", "mpi"),
        ("gloo", 2, "horovodrun --gloo", "gloo"),
        ("mpirun", 4, "mpirun", "mpi"),
    ],
)
def test_every_launcher_trains_the_same(
    prepared: Prepared, trained: Path, tmp_path: Path, how: str, ranks: int, launcher: str, backend: str
):
    run_dir = tmp_path / "run"
    done = succeed("train", prepared.recipe, "--run-dir", run_dir, how=how, ranks=ranks)
    found, expected = summary(run_dir), summary(trained)
    assert (found["launcher"], found["backend"], found["world_size"]) == (launcher, backend, ranks)
    for key in ("sample_digest", "data_digest", "tokens", "step", "status"):
        assert found[key] == expected[key], key
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=LOSS_TOLERANCE)
    parts = {path.name for path in (run_dir / "checkpoints/step-00000012").glob("part-*")}
    assert parts == {f"part-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)}
    assert done.text.count(f"hvdtrain: {ranks} ranks ({launcher}, {backend})") == 1  # rank 0 alone speaks
    assert done.messages == []


def test_srun_without_pmi_is_refused(prepared: Prepared, tmp_path: Path):
    """Two tasks that know nothing of one another would both train, and write over each other."""
    marks = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    done = launch("train", prepared.recipe, "--run-dir", tmp_path / "run", env=marks)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (2, 1, False), done
    assert "srun started 2 tasks" in done.messages[0]
    assert "srun --mpi=pmix" in done.messages[0]
    assert not (tmp_path / "run").exists()


def test_a_launcher_of_another_mpi_is_refused(prepared: Prepared, tmp_path: Path):
    """Each rank of it finds itself alone in the MPI that Horovod was built with."""
    marks = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    done = launch("train", prepared.recipe, "--run-dir", tmp_path / "run", env=marks, timeout_s=60)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (2, 1, False), done
    assert "mpirun started 2 tasks, but in MPI this process sees a world of 1" in done.messages[0]
    assert "use the mpirun of this environment" in done.messages[0]
    assert not (tmp_path / "run").exists()


def test_a_failing_mpi_test_ends_all_ranks(tmp_path: Path):
    """What tests/mpi relies on: not the rank that fails alone, nor those that wait for it, outlive the failure."""
    (tmp_path / "conftest.py").write_bytes(Path(__file__).with_name("mpi").joinpath("conftest.py").read_bytes())
    (tmp_path / "test_it.py").write_text("def test_it(group):\n    assert group.rank == 0, 'oh'\n    group.barrier()\n")
    done = launch("-q", tmp_path, program=(sys.executable, "-m", "pytest"), how="mpirun", ranks=2, timeout_s=50)
    assert (done.exit_code, "failed on rank 1 of 2: " in done.stderr, "AssertionError: oh" in done.stderr) == (
        1,
        True,
        True,
    )
