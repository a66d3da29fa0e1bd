"""slurm/train.sbatch without a Slurm: its commands and the ranks are small fakes, so every turn it can take is quick.

What the fakes believe about Slurm was seen on the real one, where test_train_job.py goes through the main turns again.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command import run, until

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm").glob("**/*.sh")])
SITES = sorted(path.stem for path in (ROOT / "slurm" / "sites").glob("*.sh"))
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "a name",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "3",
}
# The commands of Slurm and MPI, and the python of an environment. CALLS gets a line for each.
FAKES = {
    "srun": """
        echo "srun $*" >>"$CALLS"
        for word; do
            case $word in
            --mpi=list) echo "MPI plugin types are... none $OFFERED" && exit ;;
            --mpi=*) export BY=${word#--mpi=} ;;
            esac
        done
        while [[ $1 == -* ]]; do shift; done
        exec "$@" """,
    "mpirun": """
        echo "mpirun $*" >>"$CALLS"
        export BY=mpirun
        while [ "$1" != bash ]; do shift; done
        exec "$@" """,
    "scontrol": """
        echo "scontrol $*" >>"$CALLS"
        case "$*" in
        requeue*) exit "${REQUEUE_FAILS:-0}" ;;
        "show job"*) echo "JobId=7 JobName=a name
   QOS=(null) Account=physics
   JobState=RUNNING Requeue=1 Restarts=${RESTARTS:-0} TimeLimit=01:30:00
   Partition=main MinMemoryNode=0 TresPerNode=gres:gpu:2
   Command=/elsewhere/x.sh
   StdOut=$PWD/the log" ;;
        "show hostnames"*) printf 'n1\\nn2\\n' ;;
        "--oneliner show node n2") echo "NodeName=n2 NodeAddr=10.0.0.2 NodeHostName=n2" ;;
        esac""",
    "squeue": """
        case "$*" in
        *%T) echo "${STATE:-RUNNING}" ;;
        esac""",
    "sbatch": """
        printf 'sbatch' >>"$CALLS"
        printf ' <%s>' "$@" >>"$CALLS"
        echo " link=$HVDTRAIN_LINK tasks=${SLURM_NTASKS:-} conf=${SLURM_CONF:-}" >>"$CALLS"
        echo 8""",
    "python": """
        echo "python $*" >>"$CALLS"
        case "$*" in
        "-m hvdtrain.comm.probe") [[ " $WORKS " == *" $BY "* ]] || { echo "hvdtrain: alone" >&2 && exit 2; } ;;
        "-m hvdtrain.jobs.exit_codes") exec "$REAL_PYTHON" "$@" ;;
        "-m hvdtrain.comm.rendezvous serve"*) echo 10.0.0.1:99 && exec sleep 60 ;;
        "-m hvdtrain.comm.rendezvous exec"*) shift 3 && exec "$@" ;;
        "-m hvdtrain doctor --job"*) eval "$DOCTOR" ;;
        "-c import json"*) exec python3 "$@" ;;
        "-m hvdtrain train"*)
            echo "ranks=$HVDTRAIN_RANKS meet=${HVDTRAIN_RENDEZVOUS:-}" >>"$CALLS"
            eval "$TRAIN" ;;
        esac""",
}
SAVED = "mkdir -p runs/demo/checkpoints/step-0000000{}; touch runs/demo/checkpoints/step-0000000{}/manifest.json; "


@dataclass
class Job:
    """A folder to submit from. ``train``: in bash, what the ranks do."""

    folder: Path
    env: dict[str, str]
    calls: list[str] = field(default_factory=list)
    log: str = ""

    def run(self, *words: str, script: str = "train", **env: str) -> int:
        """The exit code; ``calls`` and ``log`` are then this run's."""
        (self.folder / "calls").write_text("")
        done = run(["bash", ROOT / "slurm" / f"{script}.sbatch", *words], 60, cwd=self.folder, env={**self.env, **env})
        self.calls = (self.folder / "calls").read_text().splitlines()
        self.log = done.stdout + done.stderr
        return done.returncode

    def called(self, beginning: str) -> list[str]:
        return [call for call in self.calls if call.startswith(beginning)]

    @property
    def words(self) -> str:
        """Those of `hvdtrain train`."""
        (call,) = self.called("python -m hvdtrain train")
        return call.removeprefix("python -m hvdtrain train ")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    fakes = tmp_path / "fake" / "bin"
    fakes.mkdir(parents=True)
    for name, text in FAKES.items():
        (fakes / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (fakes / name).chmod(0o755)
    keep = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    yield Job(
        tmp_path,
        {
            **keep, **JOB, "PATH": f"{fakes}:{os.environ['PATH']}", "HVDTRAIN_HOME": str(ROOT), "SLURM_CONF": "conf",
            "HVDTRAIN_VENV": str(fakes.parent), "SLURM_SUBMIT_DIR": str(tmp_path), "CALLS": str(tmp_path / "calls"),
            "OFFERED": "pmix pmi2", "WORKS": "pmix pmi2 mpirun", "TRAIN": "exit 0", "HVDTRAIN_PREFLIGHT": "0",
            "REAL_PYTHON": sys.executable,
        },
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_understands_it(script: Path):
    subprocess.run(["bash", "-n", script], check=True, timeout=30)


def test_what_is_asked_of_slurm():
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    asked = dict(line[8:].lstrip("-").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH "))
    assert {"nodes", "ntasks-per-node", "cpus-per-task", "mem", "time", "requeue"} <= set(asked)
    assert (asked["signal"], asked["open-mode"], asked["output"]) == ("B:USR2@120", "append", "%x-%j.log")
    assert not any(word in text for word in ("NCCL_", "FI_", "UCX_", "module load"))  # that is for slurm/sites


@pytest.mark.parametrize("site", SITES)
def test_every_site_starts_and_leaves_what_the_user_set(job: Job, site: str):
    assert job.run(HVDTRAIN_SITE=site, NCCL_DEBUG="mine", TRAIN='[ "$NCCL_DEBUG" = mine ]', WORKS="pmi2 pmix") == 0
    assert "hvdtrain job: finished" in job.log


@pytest.mark.parametrize(
    ("works", "env", "launcher", "words"),
    [
        ("pmix pmi2 mpirun", {}, "launcher srun --mpi=pmix", "--mpi=pmix"),
        ("pmi2 mpirun", {}, "launcher srun --mpi=pmi2", "--mpi=pmi2"),
        ("mpirun", {}, "launcher mpirun", "mpirun -np 4 --bind-to none"),
        ("", {}, "launcher srun with a rendezvous for Gloo", "--mpi=none"),
        ("pmix pmi2", {"OFFERED": "pmi2"}, "launcher srun --mpi=pmi2", "--mpi=pmi2"),
        ("pmix", {"HVDTRAIN_LAUNCHER": "mpirun"}, "launcher mpirun", "mpirun -np 4"),  # taken untried
        ("pmix mpirun", {"HVDTRAIN_LAUNCHER": "pmi2 mpirun"}, "launcher mpirun", "mpirun -np 4"),
        ("", {"SLURM_NTASKS": "1"}, "one task, no launcher", "--mpi=none"),
    ],
)
def test_the_first_launcher_that_joins_the_ranks(job: Job, works: str, env: dict[str, str], launcher: str, words: str):
    """Slurm offers what this environment's MPI may not know: each rank would then train alone."""
    assert job.run(WORKS=works, **env) == 0, job.log
    assert launcher in job.log
    start = [call for call in job.calls if call.endswith("python -m hvdtrain train demo")]
    assert words in start[0], start
    if not words.startswith("mpirun"):
        assert f"srun --nodes=2 --ntasks={env.get('SLURM_NTASKS', 4)} --kill-on-bad-exit=1 --wait=60" in start[0]
    (seen,) = job.called("ranks=")
    tasks = env.get("SLURM_NTASKS", "4")
    assert seen == f"ranks={tasks} meet={'10.0.0.1:99' * ('Gloo' in launcher)}"
    assert len(job.called("python -m hvdtrain.comm.rendezvous serve 10.0.0.2")) == ("Gloo" in launcher)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"HVDTRAIN_LAUNCHER": "pmx"}, "HVDTRAIN_LAUNCHER=pmx: expected one of pmix pmi2 mpirun gloo"),
        ({"HVDTRAIN_LAUNCHER": "pmix pmi2", "WORKS": ""}, "none of pmix pmi2 starts this environment's ranks"),
        ({"HVDTRAIN_SITE": "nowhere"}, "HVDTRAIN_SITE: cannot read"),
        ({"HVDTRAIN_VENV": "/nowhere"}, "there is no /nowhere/bin/python"),
        ({"HVDTRAIN_HOME": "/nowhere"}, "submit it from the project's folder, or set HVDTRAIN_HOME"),
    ],
)
def test_wrong_use_is_told_and_not_repeated(job: Job, env: dict[str, str], message: str):
    assert job.run(**env) == 2
    assert message in job.log
    assert not job.called("scontrol requeue") and not job.called("sbatch") and not job.called("ranks=")


@pytest.mark.parametrize("script", ["train", "elastic"])
def test_an_environment_without_hvdtrain_is_told_and_not_repeated(job: Job, script: str):
    """Nobody knows then which exit code means what."""
    assert job.run(script=script, REAL_PYTHON="false", SLURM_NTASKS="") == 2
    assert f"{job.folder}/fake/bin/python cannot load hvdtrain: run make env, or set HVDTRAIN_VENV" in job.log
    assert not job.called("scontrol requeue") and not job.called("ranks=")


@pytest.mark.parametrize(
    ("words", "run_dir", "passed"),
    [
        ((), "runs/demo", "demo"),
        (("gpt2-124m", "optim.lr=3e-4"), "runs/gpt2-124m", "gpt2-124m optim.lr=3e-4"),
        (("conf/my.recipe.yaml",), "runs/my.recipe", "conf/my.recipe.yaml"),
        (("--run-dir", "a b", "demo"), "a b", "--run-dir a b demo"),
        (("demo", "--timeline=t", "--run-dir=x/y", "seed=2"), "x/y", "demo --timeline=t --run-dir=x/y seed=2"),
    ],
)
def test_the_run_folder_is_hvdtrains(job: Job, words: tuple[str, ...], run_dir: str, passed: str):
    assert job.run(*words) == 0
    assert f"run folder {run_dir}\n" in job.log
    assert job.words == passed


@pytest.mark.parametrize("script", ["train", "elastic"])
@pytest.mark.parametrize(
    ("words", "env", "refused"),
    [
        (("demo",), {}, True),
        (("demo", "--run-dir", "runs/x"), {}, True),
        (("demo", "--run-dir", "runs/x-12"), {}, True),
        (("demo", "--run-dir", "runs/x-2"), {}, False),
        (("demo",), {"SLURM_ARRAY_TASK_COUNT": "1"}, False),
        (("demo",), {"SLURM_ARRAY_TASK_ID": ""}, False),
    ],
)
def test_tasks_of_an_array_do_not_share_a_run_folder(
    job: Job, script: str, words: tuple[str, ...], env: dict[str, str], refused: bool
):
    task = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    code = job.run(*words, script=script, **{**task, **env})
    assert ("task 2 of array 6: all its tasks would train in " in job.log) == refused, job.log
    assert ("slurm/array.sbatch gives each a folder of its own" in job.log) == refused
    if refused:
        assert code == 2
        assert job.calls == []  # nothing has begun, nor begins again


def test_a_job_that_goes_on_finds_what_it_began(job: Job):
    """With --resume never its second start would refuse its own run folder."""
    job.run("demo", "--resume", "never")
    assert job.words == "demo --resume never"
    job.run("demo", "--resume", "never", SLURM_RESTART_COUNT="1")
    assert job.words == "demo --resume never --resume auto"
    job.run("demo", "--resume", "runs/other", SLURM_RESTART_COUNT="1")
    assert job.words == "demo --resume runs/other"


def test_staging_is_a_setting(job: Job):
    job.run(HVDTRAIN_STAGE="/local disk")
    assert job.words == "demo data.stage=/local disk"


@pytest.mark.parametrize("code", [0, 2, 65, 71, 74, 76, 130])
def test_what_would_only_happen_again_is_not_repeated(job: Job, code: int):
    assert job.run(TRAIN=f"{SAVED.format(5, 5)} exit {code}") == code
    assert not job.called("scontrol requeue") and not job.called("sbatch")


@pytest.mark.parametrize("code", [75, 70, 1, 137, 143])
def test_what_may_go_on_is_requeued(job: Job, code: int):
    assert job.run(TRAIN=f"{SAVED.format(5, 5)} exit {code}") == code
    assert job.called("scontrol requeue") == ["scontrol requeue 7"]
    assert "newest checkpoint: step-00000005" in job.log
    assert not job.called("sbatch")


def test_a_job_that_saves_nothing_new_is_given_up(job: Job):
    """Three times it may go on; a checkpoint in between, and it may three times more. By hand it counts anew."""
    job.run(TRAIN=f"{SAVED.format(1, 1)} exit 75")
    goes_on = []
    for restart in range(1, 5):
        job.run(TRAIN="exit 70", SLURM_RESTART_COUNT=str(restart))
        goes_on.append(bool(job.called("scontrol requeue")))
    assert goes_on == [True, True, True, False]
    assert "4 times in a row without a newer checkpoint (HVDTRAIN_MAX_STALLED=3)" in job.log
    job.run(TRAIN=f"{SAVED.format(2, 2)} exit 70", SLURM_RESTART_COUNT="5")
    assert job.called("scontrol requeue")
    for _ in range(2):
        job.run(TRAIN="exit 70", SLURM_RESTART_COUNT="6", HVDTRAIN_MAX_STALLED="1")
    assert not job.called("scontrol requeue")
    job.run(TRAIN="exit 70", HVDTRAIN_MAX_STALLED="1")
    assert job.called("scontrol requeue")


def test_a_stop_file_ends_it(job: Job):
    assert job.run(TRAIN=f"{SAVED.format(1, 1)} touch runs/demo/stop; exit 75") == 75
    assert "not started again: there is runs/demo/stop" in job.log
    assert not job.called("scontrol requeue") and not job.called("sbatch")


@pytest.mark.parametrize(
    ("ended", "restarts", "message", "goes_on"),
    [
        ("", "0", "not started again: the job was cancelled (COMPLETING)", False),
        (" DUE TO TIME LIMIT ***", "0", "DUE TO TIME LIMIT", True),
        (" DUE TO PREEMPTION ***", "0", "DUE TO PREEMPTION", True),  # where preemption cancels, PreemptMode=CANCEL
        (" DUE TO PREEMPTION ***", "1", "Slurm has requeued it", False),
    ],
    ids=["scancel", "time limit", "preempted and cancelled", "preempted and requeued"],
)
def test_who_ended_the_job(job: Job, ended: str, restarts: str, message: str, goes_on: bool):
    line = f"slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-02T03:04:05{ended}"
    job.run(TRAIN=f"echo '{line}' >'the log'; {SAVED.format(1, 1)} exit 75", STATE="COMPLETING", RESTARTS=restarts)
    assert message in job.log
    assert bool(job.called("scontrol requeue")) == goes_on


def test_what_the_job_tells_srun_and_mpirun(job: Job):
    """srun inherits neither --cpus-per-task nor, after sbatch --export=NONE, anything; mpirun kills after 1 s."""
    wanted = {"SRUN_CPUS_PER_TASK": "3", "SLURM_EXPORT_ENV": "ALL", "OMPI_MCA_odls_base_sigkill_timeout": "3"}
    for given in ({}, {"OMPI_MCA_odls_base_sigkill_timeout": "30"}):
        job.run("demo", SLURM_EXPORT_ENV="NONE", TRAIN='env >"$PWD/trains"', **given)
        seen = dict(line.split("=", 1) for line in (job.folder / "trains").read_text().splitlines() if "=" in line)
        assert seen.items() >= {**wanted, **given}.items()


@pytest.mark.parametrize("script", ["train", "prep", "array", "elastic"])
def test_what_a_job_around_the_sbatch_has_left(job: Job, script: str):
    """It was typed in a step of another job, whose variables came along. The site's own come after, and stay."""
    outer = dict.fromkeys(
        (
            "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_CPU_BIND", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_LIST",
            "SLURM_CPU_BIND_VERBOSE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK",
            "PMIX_NAMESPACE", "OMPI_COMM_WORLD_SIZE",
        ),
        "1",
    )  # fmt: skip
    (job.folder / "mine.sh").write_text('env >>"$PWD/seen"; export SLURM_CPU_BIND=cores')
    job.run("demo", script=script, **outer, HVDTRAIN_SITE="./mine.sh", SLURM_STEPMGR="n1", TRAIN='env >"$PWD/trains"')
    seen = {line.partition("=")[0] for line in (job.folder / "seen").read_text().splitlines()}
    assert outer.keys() & seen <= {"SLURM_CPU_BIND"}  # the site's file is read again in every task
    assert {*JOB, "SLURM_STEPMGR"} - {"SLURM_NTASKS"} <= seen
    if script == "train":
        assert "SLURM_CPU_BIND=cores\n" in (job.folder / "trains").read_text()


@pytest.mark.parametrize("env", [{"HVDTRAIN_CHAIN": "1"}, {"REQUEUE_FAILS": "1"}], ids=["wanted", "requeue forbidden"])
def test_the_next_link_asks_for_what_this_job_got(job: Job, env: dict[str, str]):
    assert job.run("demo", "data.dir=a b", TRAIN=f"{SAVED.format(1, 1)} exit 75", HVDTRAIN_LINK="1", **env) == 75
    assert bool(job.called("scontrol requeue")) == ("REQUEUE_FAILS" in env)
    assert "link 2 of its chain" in job.log and "job 8 goes on" in job.log
    (call,) = job.called("sbatch")
    for word in (
        "--dependency=afterany:7", "--job-name=a name", f"--chdir={job.folder}", f"--output={job.folder}/the log",
        "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3", "--time=01:30:00", "--partition=main",
        "--account=physics", "--mem=0", "--gres=gpu:2", "demo", "data.dir=a b",
    ):  # fmt: skip
        assert f"<{word}>" in call
    assert "qos" not in call  # it has none
    assert call.endswith(" link=2 tasks= conf=conf")  # nor does it take this job's tasks for its own


@pytest.mark.parametrize(
    ("number", "loads_s"), [(signal.SIGUSR2, 1), (signal.SIGTERM, 0)], ids=["USR2 while they load", "TERM"]
)
def test_a_signal_reaches_the_ranks_and_the_job_goes_on(job: Job, number: signal.Signals, loads_s: int):
    """As USR2. A rank that is still loading ignores it, so it comes again 5 s later."""
    listen = f"trap '{SAVED.format(3, 3)} exit 75' USR2; touch ready; while :; do sleep 0.05; done"
    train = f'touch loading; sleep {loads_s}; exec env --default-signal=USR2 bash -c "$LISTEN"'
    wait_for = "loading" if loads_s else "ready"
    (job.folder / "calls").write_text("")
    with open(job.folder / "log", "wb") as log:
        script = subprocess.Popen(
            ["bash", ROOT / "slurm" / "train.sbatch"], cwd=job.folder, stdout=log, stderr=log,
            env={**job.env, "TRAIN": train, "LISTEN": listen}, start_new_session=True,
        )  # fmt: skip
    try:
        until((job.folder / wait_for).exists, "the ranks run", 60)
        script.send_signal(number)
        assert script.wait(60) == 75, (job.folder / "log").read_text()
    finally:
        os.killpg(script.pid, signal.SIGKILL) if script.poll() is None else None
    text = (job.folder / "log").read_text()
    assert "signal: the ranks shall save and stop" in text and "newest checkpoint: step-00000003" in text
    assert "scontrol requeue 7" in (job.folder / "calls").read_text()


def test_the_other_scripts_share_the_launcher(job: Job):
    assert job.run("text", "--input", "x", "--out", "o", script="prep", WORKS="mpirun") == 0, job.log
    starts = [call for call in job.called("mpirun -np 4") if "data_prep" in call]
    assert [start.rpartition("data_prep ")[2] for start in starts] == ["text --input x --out o", "verify o"]
    assert job.run("text", script="prep", WORKS="") == 2  # Gloo would not do
    assert job.run("demo", "--vary", "seed=1,2", script="array", WORKS="pmi2", SLURM_ARRAY_TASK_ID="1") == 0
    (call,) = job.called("python -m hvdtrain sweep demo --vary seed=1,2 --point 1 --launcher env HVDTRAIN_RANKS=4")
    assert "'--mpi=pmi2'" in call


# --- preflight ---------------------------------------------------------------------------------------------------

BAD = """echo '{"bad_nodes": ["n2", "n7"]}' >runs/demo/jobs/preflight-7.json; exit 70"""


def test_fit_nodes_train(job: Job):
    words = ("demo", "optim.lr=1", "--run-dir", "runs/demo", "--resume=never")
    assert job.run(*words, HVDTRAIN_PREFLIGHT="1", DOCTOR="exit 0", WORKS="pmix") == 0
    (look,) = job.called("python -m hvdtrain doctor")
    assert look.endswith(" --run-dir runs/demo --json runs/demo/jobs/preflight-7.json demo optim.lr=1")
    assert job.calls.index(look) < job.calls.index(*job.called("python -m hvdtrain train"))


def test_bad_nodes_are_named_or_left_out(job: Job):
    assert job.run("demo", HVDTRAIN_PREFLIGHT="1", DOCTOR=BAD) == 70
    assert "without them: sbatch --exclude=n2,n7 ...; HVDTRAIN_EXCLUDE_BAD=1 does so by itself" in job.log
    assert not job.called("sbatch") + job.called("python -m hvdtrain train")
    assert job.run("demo", "a=b c", HVDTRAIN_PREFLIGHT="1", DOCTOR=BAD, HVDTRAIN_EXCLUDE_BAD="1") == 70
    (call,) = job.called("sbatch")
    assert "<--exclude=n2,n7>" in call
    assert "<demo> <a=b c>" in call
    assert not job.called("python -m hvdtrain train")


@pytest.mark.parametrize(("doctor", "code"), [("sleep 30", 70), ("exit 2", 2), ("exit 65", 65), ("exit 70", 70)])
def test_what_else_ends_a_job_before_it_trains(job: Job, doctor: str, code: int):
    assert job.run("demo", HVDTRAIN_PREFLIGHT="1", DOCTOR=doctor, HVDTRAIN_PREFLIGHT_S="1") == code
    assert "not started: " in job.log
    assert not job.called("sbatch") + job.called("python -m hvdtrain train") + job.called("scontrol requeue")
