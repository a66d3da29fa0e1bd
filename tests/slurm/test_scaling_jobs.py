"""``hvdtrain scaling`` on the two nodes of a real Slurm: a job for each size, gathered by the same command."""

import json
from pathlib import Path

from cluster import SlurmCluster
from launch import HVDTRAIN, Done, Prepared, environment

SIZES = ("--nodes", "1,2", "--kind", "strong", "--steps", "12", "--time", "0:10:00", "--out", "out")


def _scaling(slurm: SlurmCluster, folder: Path, *words: object) -> Done:
    args = [str(word) for word in (*HVDTRAIN, "scaling", *words)]
    env = {**environment(), "HVDTRAIN_LAUNCHER": "pmix", "HVDTRAIN_PREFLIGHT": "0"}
    done = slurm.run(args, timeout_s=300, cwd=folder, env=env)
    return Done("none", done.returncode, done.stdout, done.stderr)


def test_each_size_is_a_job(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """First not waited for: exit code 75, nothing submitted twice; then gathered."""
    begun = _scaling(slurm, tmp_path, prepared.recipe, *SIZES)
    assert (begun.exit_code, begun.stdout.count(": job ")) == (75, 2), begun
    assert "gathers them when they have ended" in begun.stderr
    done = _scaling(slurm, tmp_path, prepared.recipe, *SIZES, "--wait")
    assert (done.exit_code, done.stdout.count(": job ")) == (0, 0), done
    tree = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [(one["nodes"], one["ranks"], one["microbatches"]) for one in tree["measured"]] == [(1, 1, 2), (2, 2, 1)]
    page = (tmp_path / "out" / "scaling.md").read_text()
    assert "one machine" not in page and "## The whole run" in page
