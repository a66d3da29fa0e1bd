"""A batch script of the user's own, without a line of ours: the run knows when its job ends all the same."""

import sys
from pathlib import Path

from cluster import SlurmCluster
from launch import Prepared, environment, summary

# A minute is what a run keeps free (stop.margin_s), so the first stops at once. Nothing in the environment helps: not
# the zone, which is not the controller's, nor how the user likes to see times and jobs.
SCRIPT = """#!/bin/bash
#SBATCH --nodes=1 --ntasks=1 --time=1 --output=log
export TZ=Asia/Kathmandu SLURM_TIME_FORMAT=relative SQUEUE_STATES=PENDING
unset SLURM_JOB_END_TIME
{train} --run-dir cut
echo "first: $?"
scontrol update JobId=$SLURM_JOB_ID TimeLimit=UNLIMITED
{train} --run-dir whole
echo "second: $?"
"""


def test_it_stops_before_the_limit_and_without_one_not_at_all(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    train = f"srun --mpi=none {sys.executable} -m hvdtrain train {prepared.recipe} device=cpu eval.every=0"
    (tmp_path / "own.sh").write_text(SCRIPT.format(train=train))
    job = slurm.sbatch("own.sh", cwd=tmp_path, env=environment())
    slurm.wait(job, timeout_s=120)
    log = (tmp_path / "log").read_text()
    assert "hvdtrain: stopped at step 1 (the job's time ends); the same command goes on" in log
    assert "first: 75\n" in log
    assert "second: 0\n" in log
    assert summary(tmp_path / "whole")["fallbacks"] == []
    assert "note: " not in log
