"""slurm/train.sbatch on the two nodes of a real Slurm: by each launcher, stopped, requeued, chained, and given up.

Submitted from a folder that is not the project's, so the script has to find its way home. What it does in every other
case is in test_job_script.py, with fakes; what happens to a job without its consent, in test_job_faults.py.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from cluster import SlurmCluster
from command import until
from launch import TRACE, Prepared, environment, succeed, summary

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
# Long enough to be interrupted twice: a few seconds at 5 ms a step.
LONG = ("train.steps=1000", "eval.every=0", "checkpoint.every=0", "metrics.every=1")


class Job:
    """One submission of the script, a task on each node; its log and run folder are in ``folder``."""

    def __init__(self, slurm: SlurmCluster, folder: Path, *words: object, options: tuple[str, ...] = (), **env: str):
        self.slurm, self.folder, self.run_dir = slurm, folder, folder / "run dir"
        options = (*options, "--time=20", f"--output={folder}/log")
        words = (*words, "--run-dir", self.run_dir)
        env = {**environment(), "HVDTRAIN_VENV": sys.prefix, "HVDTRAIN_PREFLIGHT": "0", **env}
        self.id = slurm.sbatch(*options, SCRIPT, *map(str, words), cwd=folder, env=env)

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self) -> tuple[str, str, str]:
        """How it ended: state, exit code, restarts."""
        job = self.slurm.wait(self.id, timeout_s=180)
        return job["JobState"], job["ExitCode"], job["Restarts"]

    def until_said(self, words: str) -> None:
        try:
            until(lambda: words in self.log, words, timeout_s=90)
        except TimeoutError as error:
            error.add_note(self.log)
            raise

    def until_in_mid_run(self) -> None:
        try:
            until(lambda: bool(losses(self.run_dir)), "the first steps", timeout_s=90)
        except TimeoutError as error:
            error.add_note(self.log)
            raise

    def signal(self, job_id: int | None = None) -> None:
        done = self.slurm.run(["scancel", "--batch", "--signal=USR2", str(job_id or self.id)], timeout_s=30)
        assert done.returncode == 0, done.stderr


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss; a line that is still being written is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="module")
def unbroken(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run, by two ranks in one go."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    succeed("train", prepared.recipe, *LONG, "--run-dir", run_dir, how="mpirun", ranks=2)
    return run_dir


def assert_equal_runs(run_dir: Path, expected: Path) -> None:
    """Bit by bit: the sum of two ranks has only one order."""
    assert losses(run_dir) == losses(expected)
    found, wanted = summary(run_dir), summary(expected)
    for key in ("status", "step", "tokens", "sample_digest", "data_digest", "val_loss", "world_size"):
        assert found[key] == wanted[key], key


@pytest.mark.parametrize(
    ("forced", "said", "launcher"),
    [
        ("", "launcher srun --mpi=pmix", "srun"),
        ("pmi2 mpirun", "launcher (mpirun|srun --mpi=pmi2)", "(mpirun|srun)"),  # Open MPI's wheel does not know pmi2
        ("gloo", "launcher srun with a rendezvous for Gloo", "srun --gloo"),
    ],
    ids=["first choice", "pmi2 or mpirun", "gloo"],
)
def test_a_signal_and_the_job_goes_on_to_the_end(
    slurm: SlurmCluster, prepared: Prepared, unbroken: Path, tmp_path: Path, forced: str, said: str, launcher: str
):
    env = {"HVDTRAIN_LAUNCHER": forced, "HVDTRAIN_PREFLIGHT": str(int(not forced))}
    job = Job(slurm, tmp_path, prepared.recipe, *LONG, options=("--ntasks-per-node=1",), **env)
    job.until_in_mid_run()
    assert ("hvdtrain: preflight: 2 nodes healthy" in job.log) == (not forced)
    job.signal()
    assert job.wait() == ("COMPLETED", "0:0", "1"), job.log
    assert re.search(f"^hvdtrain job: {said}", job.log, re.MULTILINE), job.log
    stopped = re.search(r"^hvdtrain: stopped at step (\d+) \(SIGUSR2\); the same command goes on$", job.log, re.M)
    assert stopped, job.log
    assert f"hvdtrain job: stopped early; newest checkpoint: step-{int(stopped[1]):08}\n" in job.log
    assert f"hvdtrain: resumed from {job.run_dir}/checkpoints/step-{int(stopped[1]):08}" in job.log
    assert_equal_runs(job.run_dir, unbroken)
    assert re.fullmatch(launcher, summary(job.run_dir)["launcher"])
    if not forced:
        again = Job(slurm, tmp_path, prepared.recipe, *LONG, options=("--ntasks-per-node=1",), HVDTRAIN_LAUNCHER="pmix")
        assert again.wait() == ("COMPLETED", "0:0", "0")
        assert f"{job.run_dir} is finished (1000 steps)" in again.log


def test_a_chain_of_three_links(slurm: SlurmCluster, prepared: Prepared, unbroken: Path, tmp_path: Path):
    """Each link is a job of its own, with the nodes, the words and the log of the first."""
    chain = {"HVDTRAIN_CHAIN": "1", "HVDTRAIN_LAUNCHER": "pmix"}
    job = Job(slurm, tmp_path, prepared.recipe, *LONG, options=("--ntasks-per-node=1", "--job-name=a chain"), **chain)
    links = [job.id]
    for number in (2, 3):
        job.until_in_mid_run() if number == 2 else job.until_said("hvdtrain: resumed from ")
        job.signal(links[-1])
        job.until_said(f"link {number} of its chain")
        links.append(int(re.findall(r"^hvdtrain job: job (\d+) goes on$", job.log, re.M)[-1]))
    ends = [slurm.wait(link, timeout_s=180) for link in links]
    assert [(end["JobState"], end["ExitCode"], end["Restarts"]) for end in ends] == [
        ("FAILED", "75:0", "0"), ("FAILED", "75:0", "0"), ("COMPLETED", "0:0", "0"),
    ], job.log  # fmt: skip
    assert len({(end["NumNodes"], end["NumTasks"], end["TimeLimit"]) for end in ends}) == 1
    assert job.log.count("hvdtrain: stopped at step ") == 2
    assert_equal_runs(job.run_dir, unbroken)


def test_a_stop_file_and_a_cancel_are_final(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """No requeue, no next link; and the stop file's run goes on where it stopped once the file is gone."""
    one = ("--ntasks-per-node=1",)
    job = Job(slurm, tmp_path, prepared.recipe, *LONG, "train.steps=3000", options=one, HVDTRAIN_LAUNCHER="pmix")
    job.until_in_mid_run()
    (job.run_dir / "stop").touch()
    assert job.wait() == ("FAILED", "75:0", "0"), job.log
    assert "(stop file); the same command goes on" in job.log
    assert f"not started again: there is {job.run_dir}/stop" in job.log
    (job.run_dir / "stop").unlink()
    step = max(losses(job.run_dir))

    job = Job(slurm, tmp_path, prepared.recipe, *LONG, "train.steps=3000", options=one, HVDTRAIN_LAUNCHER="pmix")
    job.until_said(f"hvdtrain: resumed from {job.run_dir}/checkpoints/step-{step:08}")
    until(lambda: max(losses(job.run_dir)) > step, "it goes on", timeout_s=30)
    slurm.run(["scancel", str(job.id)], timeout_s=30)
    state, _, restarts = job.wait()  # whether ranks on a busy machine save in Slurm's KillWait of 5 s is another matter
    assert (state, restarts) == ("CANCELLED", "0"), job.log
    assert "into the queue again" not in job.log, job.log
    assert not re.search(r"^hvdtrain job: job \d+ goes on$", job.log, re.M), job.log


def test_wrong_words_end_it(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    one = ("--ntasks-per-node=1",)
    job = Job(slurm, tmp_path, prepared.recipe, "train.stepz=3", options=one, HVDTRAIN_LAUNCHER="pmix")
    assert job.wait() == ("FAILED", "2:0", "0"), job.log
    assert "unknown key 'train.stepz'; did you mean train.steps" in job.log and TRACE not in job.log
    assert "hvdtrain job: exit code 2, not started again" in job.log


def test_as_it_stands(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """`sbatch slurm/train.sbatch`, as README has it: on each of two nodes two ranks that share memory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(prepared.shards)
    env = {**environment(), "HVDTRAIN_VENV": sys.prefix, "HVDTRAIN_SLOW_FACTOR": "50"}
    words = ("demo", "train.steps=3", "schedule.warmup_steps=1", "eval.every=0")  # the demo itself is 400 steps
    job = slurm.wait(job_id := slurm.sbatch(SCRIPT, *words, cwd=tmp_path, env=env), timeout_s=180)
    log = (tmp_path / f"hvdtrain-{job_id}.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["NumNodes"], job["NumTasks"]) == ("COMPLETED", "0:0", "2", "4"), log
    for said in ("hvdtrain: preflight: 2 nodes healthy", "hvdtrain: 4 ranks (srun, mpi)", "hvdtrain job: finished"):
        assert said in log, log
    found = summary(tmp_path / "runs" / "demo")
    assert (found["step"], found["world_size"], found["status"]) == (3, 4, "finished")


def test_without_data_it_asks_for_the_demos(slurm: SlurmCluster, tmp_path: Path):
    """`sbatch slurm/train.sbatch`, and nobody has run `make demo`: four ranks, one message."""
    log = tmp_path / "log"
    env = {**environment(), "HVDTRAIN_VENV": sys.prefix}
    job = slurm.wait(slurm.sbatch(f"--output={log}", SCRIPT, cwd=tmp_path, env=env), timeout_s=180)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "65:0", "0"), log.read_text()
    said = "hvdtrain: preflight: on every node: shards data/demo: no shards in data/demo"
    assert log.read_text().count(said) == 1, log.read_text()
    assert "run folder runs/demo" in log.read_text()
