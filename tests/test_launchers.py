"""The same run under every launcher, and launchers that do not fit the ranks that they start."""

import json
import re
import sys
from pathlib import Path

import pytest
from launch import DATA_PREP, HVDTRAIN, TRACE, Prepared, launch, succeed, summary

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


@pytest.mark.parametrize(
    ("launcher", "marks"),
    [
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}),
        # MPICH 4.0's, of which mpi4py would warn in three lines.
        ("mpiexec", {"PMI_SIZE": "2", "PMI_RANK": "0", "PMI_FD": "9", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}),
    ],
)
def test_a_launcher_of_another_mpi_is_refused(prepared: Prepared, tmp_path: Path, launcher: str, marks: dict[str, str]):
    """Each rank of it finds itself alone in the MPI that Horovod was built with."""
    done = launch("train", prepared.recipe, "--run-dir", tmp_path / "run", env=marks, timeout_s=60)
    assert (done.exit_code, len(done.stderr.splitlines()), done.stdout) == (2, 1, ""), done
    assert re.search(rf"{launcher} started 2 tasks, but in \w.* \d\S+ this process sees a world of 1", done.messages[0])
    assert "use the mpirun of this environment" in done.messages[0]
    assert not (tmp_path / "run").exists()


def test_an_mpi_that_cannot_be_loaded_is_said(prepared: Prepared):
    """The commonest: the module that it came with is not loaded in the job."""
    marks = {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0", "MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    done = launch("verify", prepared.shards, program=DATA_PREP, env=marks)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done
    assert "mpiexec started 2 tasks, but MPI cannot be loaded here (/nowhere/libmpi.so: cannot open" in done.messages[0]


_EACH_COMMAND = """
import json, os, subprocess, sys
for words in json.loads(sys.argv[1]):
    done = subprocess.run(words, capture_output=True, text=True)
    with open(f"{sys.argv[2]}/{os.environ['RANK']}", "a") as file:
        print(json.dumps([done.returncode, done.stderr.splitlines()]), file=file)
"""


def test_torchrun_is_refused(prepared: Prepared, trained: Path, tmp_path: Path):
    """It would train two whole runs into one folder. Every rank leaves with the code, and the first one says why."""
    (tmp_path / "each.py").write_text(_EACH_COMMAND)
    (tmp_path / "said").mkdir()
    words = [
        (*HVDTRAIN, "train", prepared.recipe, "--run-dir", tmp_path / "run"),
        (*HVDTRAIN, "evaluate", trained),
        (*HVDTRAIN, "generate", trained, "--prompt", "def"),
        (*DATA_PREP, "tokenizer", "--input", prepared.corpus, "--vocab-size", 300, "--out", tmp_path / "mine.json"),
        (*HVDTRAIN, "status", trained),  # only looks
    ]
    given = json.dumps([[str(word) for word in row] for row in words])
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    succeed(tmp_path / "each.py", given, tmp_path / "said", program=torchrun)
    first, second = (
        [json.loads(line) for line in (tmp_path / "said" / rank).read_text().splitlines()] for rank in "01"
    )
    assert [code for code, _ in first] == [code for code, _ in second] == [2, 2, 2, 2, 0]
    for _, (line,) in first[:4]:
        assert line.startswith("hvdtrain: LaunchError: torchrun started 2 ranks (RANK=0, WORLD_SIZE=2), and hvdtrain")
        assert "start with `horovodrun -np N`, mpirun or `srun --mpi=pmix`" in line
        assert "set HVDTRAIN_RANKS=1" in line
    assert [said for _, said in second] == [[]] * 5
    assert not (tmp_path / "run").exists() and not (tmp_path / "mine.json").exists()


def test_marks_that_are_left_over(prepared: Prepared, tmp_path: Path):
    """A notebook on a cluster sets them for whoever comes; the user knows better."""
    marks = {"RANK": "0", "WORLD_SIZE": "4", "HVDTRAIN_RANKS": "1"}
    succeed("train", prepared.recipe, "train.steps=2", "--run-dir", tmp_path / "run", env=marks)
    assert summary(tmp_path / "run")["world_size"] == 1


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
