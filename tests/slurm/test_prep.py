"""slurm/prep.sbatch on the two nodes of a real Slurm: the shards that one process makes, checked, and gone on with."""

import os
import sys
from pathlib import Path

from cluster import SlurmCluster
from launch import DATA_PREP, Prepared, environment, snapshot, succeed

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "prep.sbatch"
SMALL = ("--shard-tokens", "2000")  # many units


def _submit(slurm: SlurmCluster, folder: Path, *words: object) -> tuple[dict[str, str], str]:
    """The job's end and its log."""
    env = {**environment(), "HVDTRAIN_VENV": sys.prefix, "HVDTRAIN_LAUNCHER": "pmix"}
    job_id = slurm.sbatch(
        "--time=5", "--ntasks-per-node=1", f"--output={folder}/log", SCRIPT, *words, cwd=folder, env=env
    )
    return slurm.wait(job_id, timeout_s=120), (folder / "log").read_text(encoding="utf-8")


def _text(prepared: Prepared, out: Path) -> list[str]:
    return [
        str(w) for w in ("text", "--input", prepared.corpus, "--tokenizer", prepared.tokenizer, *SMALL, "--out", out)
    ]


def test_two_nodes_make_what_one_process_makes(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    succeed(*_text(prepared, tmp_path / "alone"), program=DATA_PREP)
    job, log = _submit(slurm, tmp_path, *_text(prepared, tmp_path / "nodes"))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert snapshot(tmp_path / "nodes") == snapshot(tmp_path / "alone")
    assert "whole; data digest" in log  # it was verified
    job, log = _submit(slurm, tmp_path, *_text(prepared, tmp_path / "nodes"))
    assert job["JobState"] == "COMPLETED", log
    assert "already prepared from this input, kept" in log


def test_bad_input_is_the_jobs_exit_code(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "good.txt").write_text("good\n" * 5000, encoding="utf-8")
    (corpus / "latin.txt").write_bytes(b"caf\xe9\n" * 5000)
    words = ["text", "--input", str(corpus), *_text(prepared, tmp_path / "out")[3:]]
    job, log = _submit(slurm, tmp_path, *words)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "65:0"), log
    assert "latin.txt is not UTF-8 text: byte 3 is 0xe9" in log
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_words_is_wrong_use(slurm: SlurmCluster, tmp_path: Path):
    job, log = _submit(slurm, tmp_path)
    assert job["ExitCode"] == "2:0"
    assert log.startswith("usage: sbatch slurm/prep.sbatch"), os.linesep + log
