"""A launcher that is killed leaves no ranks behind: they save, end, and the same command goes on."""

import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command import until
from launch import LAUNCHERS, Prepared, environment, launch_rows, summary

from hvdtrain.comm.ancestors import PMIX_WAITS, Launcher, _Lasting
from hvdtrain.comm.world import World
from hvdtrain.watch.stopping import StopOptions, Stopping, StopSignals

LIMIT_S = 60  # for what takes 3 s where the machine has nothing else to do; Open MPI's own end comes after 300

# --- whose end counts ----------------------------------------------------------------------------------------------

TREES = {  # from the rank's parent up: name, command line; and how many of them are watched
    "horovodrun": ([("mpirun", "mpirun -np 2 python"), ("sh", "/bin/sh|-c|mpirun -np 2 python"), ("bash", "-bash")], 2),
    "horovodrun in a shell of its own": (
        [
            ("mpirun", "mpirun"),
            ("sh", "sh|-c|mpirun -x A && true 2>&1"),
            ("sh", "sh|-c|horovodrun -np 2 x"),
            ("x", "x"),
        ],
        3,
    ),
    "gloo": (
        [("sh", "/bin/sh|-c|env A=1 python"), ("python3", "python|-c|spawn"), ("horovodrun", "x"), ("bash", "bash")],
        3,
    ),
    "mpirun": ([("mpirun", "mpirun"), ("bash", "-bash"), ("sshd", "sshd: me")], 1),
    "mpirun in a script": ([("mpirun", "mpirun"), ("bash", "bash|run.sh"), ("bash", "-bash")], 1),
    "in the background": ([("mpirun", "mpirun"), ("sh", "sh|-c|mpirun -np 2 x & echo $!")], 1),
    "nohup": ([("mpirun", "mpirun"), ("bash", "bash|-c|nohup mpirun -np 2 x")], 1),
    "wrapped": ([("bash", "bash|wrap.sh"), ("orted", "orted"), ("systemd", "init")], 2),
    "ssh for gloo": ([("sh", "sh|-c|cd x; env A=1 python"), ("sshd-session", "sshd: me"), ("sshd", "sshd")], 2),
    "a user's ssh": ([("strange", "strange"), ("bash", "-bash"), ("sshd", "sshd: me")], 1),
    "srun": ([("slurmstepd", "slurmstepd: [1.0]"), ("systemd", "init")], 1),
}


@pytest.mark.parametrize("what", TREES)
def test_whose_end_counts(tmp_path: Path, what: str):
    """From a /proc of our own: a process that is watched goes, or is a zombie; one that is not goes, and nothing is."""
    tree, count = TREES[what]
    for number, (name, words) in enumerate([("python", "python"), *tree]):
        process(tmp_path, 100 + number, name, words)
    launcher = Launcher(World(1, 2, launcher="mpirun"), 100, tmp_path)
    assert [one.pid for one in launcher.watched] == [*range(101, 101 + count)]
    assert not Launcher(World(), 100, tmp_path).watched  # one process without a launcher watches nobody
    for number in range(1, len(tree) + 1):
        launcher = Launcher(World(1, 2, launcher="mpirun"), 100, tmp_path)
        assert not launcher.is_gone()
        process(tmp_path, 100 + number, "python", "python", state="Z" if number % 2 else "R", began=9)
        launcher._looked_s = -1e9
        assert launcher.is_gone() == (number <= count), number
        process(tmp_path, 100 + number, *tree[number - 1])


@pytest.mark.parametrize(("name", "words", "deaf"), [("sh", "sh|-c|mpirun -np 2", True), ("bash", "bash|x", False)])
def test_a_shell_that_is_a_containers_first_process_is_deaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, words: str, deaf: bool
):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    monkeypatch.setenv(PMIX_WAITS, "7")
    process(tmp_path, 3, "python", "python", parent=2)
    process(tmp_path, 2, "mpirun", "mpirun", parent=1)
    process(tmp_path, 1, name, words, parent=0)
    Launcher(World(0, 2, launcher="mpirun"), 3, tmp_path).outlast()
    assert ("`docker stop` will not reach it" in capsys.readouterr().err) == deaf
    assert os.environ[PMIX_WAITS] == "7"  # what the user has set


def test_what_cannot_be_told_is_no_end(tmp_path: Path):
    """Such as too many open files."""
    process(tmp_path, 100, "python", "python")
    process(tmp_path, 101, "mpirun", "mpirun")
    launcher = Launcher(World(1, 2, launcher="mpirun"), 100, tmp_path)
    (tmp_path / "101" / "stat").unlink()
    (tmp_path / "101" / "stat").mkdir()
    assert not launcher.is_gone()


def process(
    proc: Path, pid: int, name: str, words: str, state: str = "S", began: int = 5, parent: int | None = None
) -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    fields = [state, str(pid + 1 if parent is None else parent), *"0" * 17, str(began), "0"]
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
    (proc / str(pid) / "cmdline").write_text(words.replace("|", "\0") + "\0")


def test_one_rank_of_a_node_tells_the_others(tmp_path: Path):
    process(tmp_path, 100, "python", "python")
    process(tmp_path, 101, "mpirun", "mpirun")
    launchers = [Launcher(World(rank, 4, rank % 2, 2, "mpirun"), 100, tmp_path) for rank in range(4)]
    (tmp_path / "101" / "stat").unlink()
    stops = [Stopping(tmp_path, StopOptions(), False, StopSignals(launcher), {}) for launcher in launchers]
    flags = [stop.asked() for stop in stops]
    assert [flag > 0 for flag in flags] == [True, False, True, False]
    for nodes in (1, 2000):  # nodes on which it is gone; every bit of the sum counts
        total = torch.tensor(float(nodes * flags[0] + 1), dtype=torch.float64)
        assert stops[0].agreed(total) == "its launcher is gone"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_what_is_printed_after_the_launchers_end_is_dropped(tmp_path: Path, number: int):
    class Left(Launcher):
        def is_gone(self) -> bool:
            return gone

    reads, writes = os.pipe()
    with os.fdopen(writes, "w") as pipe:
        stream = _Lasting(pipe, Left(World()))
        os.close(reads)
        gone = False
        stream.write("somebody else has closed it\n")
        with pytest.raises(BrokenPipeError):
            stream.flush()
        gone = True
        stream.flush()
        assert stream.write("more") == 4
        stream.flush()
        assert os.readlink(f"/proc/self/fd/{pipe.fileno()}") == "/dev/null"


# --- whole runs ----------------------------------------------------------------------------------------------------

# Rank 0 is held after step 4 until it may go on: the launcher's end comes before step 5 ends.
_HELD = """
import sys, time
from pathlib import Path
from hvdtrain.watch import metrics
from hvdtrain import __main__
go = Path(sys.argv.pop(1))
add = metrics.Metrics.add
def add_and_wait(self, step, *rest):
    add(self, step, *rest)
    while step == 4 and self._is_main and not go.exists():
        time.sleep(0.05)
metrics.Metrics.add = add_and_wait
sys.exit(__main__.main())
"""


@dataclass
class Started:
    """A run that is held after step 4, its launcher and all that it started."""

    run_dir: Path
    words: list[str]
    launcher: subprocess.Popen
    mark: str

    def let_go(self) -> None:
        time.sleep(1.2)  # the ranks look once a second
        self.run_dir.with_suffix(".go").touch()

    def left(self) -> dict[int, str]:
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if self.mark.encode() in environ.read_bytes().split(b"\0"):
                    found[int(environ.parent.name)] = (environ.parent / "cmdline").read_text().replace("\0", " ")
        return found

    @property
    def log(self) -> str:
        return self.run_dir.with_suffix(".log").read_text(encoding="utf-8", errors="replace")


@contextmanager
def started(
    prepared: Prepared, run_dir: Path, how: str, before: tuple[str, ...] = (), env: str = ""
) -> Iterator[Started]:
    words = ["train", str(prepared.recipe), "metrics.every=1", "checkpoint.every=0", "--run-dir", str(run_dir)]
    go = run_dir.with_suffix(".go")
    args = [*before, *(LAUNCHERS[how] and [*LAUNCHERS[how], "2"]), sys.executable, "-c", _HELD, str(go), *words]
    mark = f"HVDTRAIN_TEST_ORPHANS={uuid.uuid4()}"
    with open(run_dir.with_suffix(".log"), "wb") as log:
        launcher = subprocess.Popen(
            args, env={**environment(), **dict([mark.split("=")])}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    run = Started(run_dir, words, launcher, mark)
    try:
        lines = run_dir / "metrics.jsonl"
        until(lambda: lines.exists() and '"step": 4,' in lines.read_text(), "step 4", 2 * LIMIT_S)
        yield run
    except Exception as error:
        error.add_note(run.log)
        raise
    finally:
        launcher.kill()
        launcher.wait()
        for pid in run.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


_ENDLESS = """
import sys, time
from {package} import __main__
name, endless = sys.argv[1], lambda *_: (print("works", flush=True), time.sleep(30))
if hasattr(__main__, "cli"):
    commands = __main__.cli._COMMANDS
    commands[name] = commands[name]._replace(define=lambda parser: parser.add_argument("run_dir") and endless)
else:
    __main__._COMMANDS[name] = endless
sys.exit(__main__.main())
"""


@pytest.mark.parametrize(
    ("package", "words"),
    [("hvdtrain", ["evaluate", "run"]), ("data_prep", ["verify", "shards"])],
    ids=["hvdtrain", "data_prep"],
)
def test_what_has_nothing_to_save_ends_with_its_launcher(tmp_path: Path, package: str, words: list[str]):
    launcher = tmp_path / "mpirun"
    launcher.write_text('#!/bin/sh\n"$@"\nexit\n')
    launcher.chmod(0o755)
    env = {**environment(), "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    env["OMPI_COMM_WORLD_LOCAL_SIZE"] = "1"
    args = [launcher, sys.executable, "-c", _ENDLESS.format(package=package), *words]
    with subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout.readline() == "works\n"
        process.kill()
        began_s = time.monotonic()
        assert process.stdout.read().endswith("its launcher is gone\n")  # to its end: the rank has left
        assert time.monotonic() - began_s < LIMIT_S


KILLED = {"horovodrun": "TERM", "gloo": "KILL", "mpirun": "KILL"}


@pytest.fixture(scope="module")
def ended(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Started]:
    """Runs whose launcher was killed: nothing of them is left."""

    def kill(how: str, number: str) -> Started:
        run_dir = folder / how / "run"
        run_dir.parent.mkdir()
        with started(prepared, run_dir, how) as run:
            os.kill(run.launcher.pid, signal.Signals[f"SIG{number}"])
            run.launcher.wait(LIMIT_S)
            run.let_go()
            until(lambda: not run.left(), f"nothing of {how} is left", LIMIT_S)
        return run

    folder = tmp_path_factory.mktemp("ended")
    with ThreadPoolExecutor() as pool:  # most of it is waiting
        runs = {how: pool.submit(kill, how, number) for how, number in KILLED.items()}
        return {how: run.result() for how, run in runs.items()}


@pytest.mark.parametrize("how", KILLED)
def test_ranks_save_and_end_when_their_launcher_is_killed(ended: dict[str, Started], how: str):
    run = ended[how]
    (saved,) = (run.run_dir / "checkpoints").iterdir()
    assert saved.name in ("step-00000005", "step-00000006"), run.log
    (record,) = (run.run_dir / "jobs").glob("*/job.json")
    assert '"exit_code": 75' in record.read_text(), run.log
    assert "its launcher is gone" in record.read_text()  # gloo's own processes send TERM too
    assert "Traceback" not in run.log.partition("horovodrun")[0]


def test_the_same_command_goes_on(ended: dict[str, Started], trained: Path):
    for run, done in zip(ended.values(), launch_rows(run.words for run in ended.values()), strict=True):
        assert done.exit_code == 0, done
        assert "resumed from" in done.stdout and not done.messages, done  # nobody's claim is in the way
        assert summary(run.run_dir)["sample_digest"] == summary(trained)["sample_digest"]


def test_a_launcher_that_goes_on_after_its_shell_is_no_orphan(prepared: Prepared, tmp_path: Path):
    """nohup horovodrun ... &, and the shell ends."""
    shell = ("sh", "-c", 'nohup "$@" & exit 0', "sh")
    with started(prepared, tmp_path / "run", "horovodrun", before=shell) as run:
        assert run.launcher.wait(LIMIT_S) == 0
        run.let_go()
        until(lambda: not run.left(), "the run ends", LIMIT_S)
    assert summary(tmp_path / "run")["status"] == "finished", run.log
