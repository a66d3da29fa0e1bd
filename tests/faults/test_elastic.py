"""Elastic training: workers die, leave and come in mid-run, and the run ends where an unbroken one does.

On one machine there are two "hosts", localhost and 127.0.0.1: Horovod gives up a host on which a worker has died.
"""

import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from command import until
from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
from horovod.runner.gloo_run import create_slot_env_vars
from hypothesis import given
from hypothesis import strategies as st
from launch import BIN, TRACE, Prepared, environment, succeed, summary
from safetensors.torch import load_file

from hvdtrain.comm.world import World
from hvdtrain.config import load_config
from hvdtrain.errors import ConfigError, LaunchError
from hvdtrain.jobs.elastic import Driver, supervise
from hvdtrain.jobs.elastic_rank import main, ranks_that_share, take_place, tell_stopped

LONG_S = 120  # for what takes 10 s where the machine has nothing else to do
# Ten rows are shared evenly by 1 or 2 ranks, not by 3.
SETTINGS = ("train.global_batch=10", "checkpoint.every=2", "checkpoint.keep_last=0", "eval.every=0")

# --- whole runs ----------------------------------------------------------------------------------------------------

# Each rank writes down the digest of its parameters before every step and at every save. Rank 0 holds the run in the
# steps that are named, until it is let go on or asked to stop.
_NOTING = """
import hashlib, os, sys, time
from pathlib import Path
from hvdtrain.jobs import elastic_rank
from hvdtrain import __main__
held = [int(step) for step in sys.argv.pop(1).split(",")]
def note(engine, name):
    digest = hashlib.sha256()
    for parameter in (piece.tensor for piece in engine.replica.slices):
        digest.update(parameter.detach().numpy().tobytes())
    path = Path(f"{name}-of-{engine.mesh.world.size}-rank-{engine.mesh.world.rank}")
    path.with_name(f".{path}").write_text(
        f"{os.getpid()} {os.getppid()} {digest.hexdigest()} {os.environ['HOROVOD_HOSTNAME']}"
    )
    path.with_name(f".{path}").rename(path)
if elastic_rank.in_round():
    from hvdtrain.engine import Engine
    from hvdtrain.watch.stopping import Stopping
    forward_backward, check, asked = Engine.forward_backward, Engine.check, Stopping.asked
    now = []
    def noted_forward_backward(engine, microbatches, task, step, *place):
        now.append(step)
        note(engine, f"before-{step}")
        return forward_backward(engine, microbatches, task, step, *place)
    def noted_check(engine, step, **how):
        note(engine, f"saved-{step}")
        return check(engine, step, **how)
    def held_asked(stopping):
        while stopping._is_main and now[-1] in held and not stopping._signals.flags:
            if Path(f"go-{now[-1]}").exists():
                break
            time.sleep(0.02)
        return asked(stopping)
    Engine.forward_backward, Engine.check, Stopping.asked = noted_forward_backward, noted_check, held_asked
sys.exit(__main__.main())
"""


class Elastic:
    """An elastic run in ``folder``, which it has to itself; nothing of it outlives the ``with`` block."""

    def __init__(self, folder: Path, prepared: Prepared, hosts: str, held: str):
        self.folder, self.run_dir = folder, folder / "run"
        self.offer(hosts)
        (folder / "discover").write_text(f'#!/bin/sh\ncat "{folder}/hosts"\n')
        (folder / "discover").chmod(0o755)
        words = ["horovodrun", "-np", "2", "--min-np", "1", "--max-np", "3", "--network-interfaces", "lo"]
        words += ["--host-discovery-script", f"{folder}/discover", sys.executable, "-c", _NOTING, held]
        words += ["train", str(prepared.recipe), *SETTINGS, "--elastic", "--run-dir", "run"]
        with open(folder / "log", "ab") as log:
            self._horovodrun = subprocess.Popen(
                words, cwd=folder, env={**environment(), "PATH": f"{BIN}:{os.environ['PATH']}"}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def offer(self, hosts: str) -> None:
        """What the discovery script says: ``host:slots ...``."""
        (self.folder / ".hosts").write_text(hosts.replace(" ", "\n") + "\n")
        (self.folder / ".hosts").rename(self.folder / "hosts")

    def wait_for(self, name: str) -> tuple[int, int, str]:
        """Until a rank has noted it; its process, its worker's, its host."""
        path = self.folder / name
        self._until(lambda: path.exists() or self._horovodrun.poll() is not None, name)
        assert path.exists(), self.log
        training, worker, _, host = path.read_text().split()
        return int(training), int(worker), host

    def let_go(self, step: int) -> None:
        (self.folder / f"go-{step}").touch()

    def finish(self) -> int:
        self._until(lambda: self._horovodrun.poll() is not None, "the end")
        return self._horovodrun.returncode

    def digests(self, name: str) -> set[str]:
        return {path.read_text().split()[2] for path in self.folder.glob(f"{name}-rank-*")}

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def said(self, words: str) -> list[str]:
        return [line for line in self.log.splitlines() if words in line]

    def _until(self, ready, what: str) -> None:
        try:
            until(ready, what, LONG_S)
        except TimeoutError as error:
            error.add_note(self.log)
            raise

    def kill(self) -> None:
        self._horovodrun.kill()
        self._horovodrun.wait()
        for pid in self.left_over():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left_over(self) -> set[int]:
        """Every process that works in this folder."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if path.readlink() == self.folder:
                    found.add(int(path.parent.name))
            except OSError:
                continue
        return found


@contextmanager
def elastic(folder: Path, prepared: Prepared, hosts: str, held: str) -> Iterator[Elastic]:
    run = Elastic(folder, prepared, hosts, held)
    try:
        yield run
        until(lambda: not run.left_over(), f"no process is left: {run.left_over()}", 20)
    finally:
        run.kill()


def test_workers_die_and_come(prepared: Prepared, tmp_path: Path):
    """Two ranks; a worker is killed: one; two more are offered, of which one has to wait; a training process is killed
    and started again; the end.
    """
    succeed("train", prepared.recipe, *SETTINGS, "--run-dir", tmp_path / "unbroken")
    (tmp_path / "elastic").mkdir()
    with elastic(tmp_path / "elastic", prepared, "localhost:1 127.0.0.1:1", held="5,7,9") as run:
        _, worker, _ = run.wait_for("before-5-of-2-rank-1")
        os.kill(worker, signal.SIGKILL)
        run.let_go(5)
        *_, host = run.wait_for("before-7-of-1-rank-0")
        run.offer(f"{host}:3")  # the other one is not taken again; which one that is, is left to chance
        training, *_ = run.wait_for("before-9-of-2-rank-1")
        os.kill(training, signal.SIGKILL)
        run.let_go(9)
        assert run.finish() == 0, run.log
    assert TRACE not in run.log
    goes_on = [line.partition("elastic: ")[2] for line in run.said("(before: ")]
    assert goes_on == [
        "1 worker (before: 2), from step-00000004",  # the step in which it died is lost
        "3 workers (before: 1), from step-00000007",  # nothing is lost
        "3 workers (before: 3), from step-00000008",
    ], run.log
    waits = {line.partition("elastic: ")[2] for line in run.said(" waits: ")}
    assert waits == {"rank 2 waits: of 3 ranks 2 can share the batch evenly"}, run.log

    # At the end of a round and at the start of the next, all ranks have the same parameters; nothing moves in between.
    for saved, step, ranks_before, ranks in ((4, 5, 2, 1), (7, 8, 1, 2), (8, 9, 2, 2)):
        before = run.digests(f"saved-{saved}-of-{ranks_before}")
        assert len(before) == 1
        assert run.digests(f"before-{step}-of-{ranks}") == before, step
    assert len(list(run.folder.glob("saved-12-of-2-rank-*"))) == 2
    assert len(run.digests("saved-12-of-2")) == 1

    found, expected = summary(run.run_dir), summary(tmp_path / "unbroken")
    assert (found["status"], found["world_size"], expected["world_size"]) == ("finished", 2, 1)
    assert found["sample_digest"] == expected["sample_digest"]
    assert found["tokens"] == expected["tokens"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    # Parameters and the optimizer's state, its step count too; sums of one and of two ranks differ in the last digits.
    mine, theirs = tensors(run.run_dir), tensors(tmp_path / "unbroken")
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("optimizer.exp_avg.") for name in mine)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    parts = (run_dir / "checkpoints/step-00000012").glob("*.safetensors")
    return {name: tensor for part in parts for name, tensor in load_file(part).items()}


# --- one worker, with a driver and training processes that only look so --------------------------------------------


class FakeDriver(socketserver.ThreadingTCPServer):
    """Keeps texts, and gives the places of ``places`` in turn, "rank,size"; after the last it is gone."""

    daemon_threads = True

    def __init__(self, places: list[str]):
        super().__init__(("127.0.0.1", 0), _FakeHandler)
        self.places, self.texts = places, dict[str, str]()

    @contextmanager
    def serving(self) -> Iterator[None]:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        yield
        self.shutdown()
        self.server_close()


class _FakeHandler(BaseHTTPRequestHandler):
    server: FakeDriver

    def do_GET(self) -> None:
        if self.path.startswith("/rank_and_size/"):
            if not self.server.places:
                self.connection.close()
                return
            self.server.texts.clear()
            text: str | None = f"{self.server.places.pop(0)},0,1,0,1"
        else:
            text = self.server.texts.get(self.path)
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def do_PUT(self) -> None:
        self.server.texts[self.path] = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


# A training process: does what the next line of the file says.
_SCRIPTED = """
import json, os, signal, sys
from pathlib import Path
from hvdtrain.jobs import elastic_rank
lines = Path("lines").read_text().splitlines()
Path("lines").write_text("\\n".join(lines[1:]))
exec(lines[0])
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
SAVED = "os.makedirs('run/checkpoints/step-00000002'); open('run/checkpoints/step-00000002/manifest.json', 'w')"
FINISHED = "os.mkdir('run'); open('run/summary.json', 'w')"
STOPPED = "elastic_rank.tell_stopped('SIGUSR2', False); sys.exit(75)"


@pytest.mark.parametrize(
    ("lines", "places", "exit_code", "lines_left"),
    [
        (["sys.exit(0)", "-"], ["0,1"], 0, 1),
        (["sys.exit(2)", "-"], ["0,1"], 2, 1),
        (["sys.exit(76)", "-"], ["0,1"], 76, 1),
        (["sys.exit(70)", KILLED, STOPPED, "sys.exit(0)"], ["0,1"] * 4, 0, 0),
        ([STOPPED] * 6 + ["sys.exit(0)"], ["0,1"] * 9, 0, 0),
        (["sys.exit(70)"] * 3 + [KILLED, "-"], ["0,1"] * 9, 137, 1),
        (["sys.exit(70)"] * 3 + [f"{SAVED}; sys.exit(70)", "sys.exit(0)"], ["0,1"] * 9, 0, 0),
        (["elastic_rank.tell_stopped('stop file', False); sys.exit(75)", "-"], ["0,1"], 75, 1),
        (["elastic_rank.tell_stopped('SIGTERM', True); sys.exit(75)", "-"], ["0,1"], 75, 1),
        ([STOPPED, "-"], ["-1,-1"], 0, 1),  # its host is gone
        (["elastic_rank.tell('idle')", "sys.exit(2)"], ["0,1"], 2, 0),
        ([f"elastic_rank.tell('idle'); {FINISHED}", "-"], [], 0, 1),  # the run has finished without it
        ([f"{FINISHED}; {KILLED}", "-"], [], 0, 1),
        (["elastic_rank.tell('idle')", "-"], [], 75, 1),
        ([STOPPED, "-"], [], 75, 1),
        (["sys.exit(70)", "-"], [], 70, 1),
    ],
)
def test_what_a_worker_makes_of_an_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    places: list[str],
    exit_code: int,
    lines_left: int,
):
    """lines: what one training process after the other does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("\n".join(lines))
    driver = FakeDriver(places)
    env = {
        "HOROVOD_ELASTIC": "1",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(driver.server_address[1]),
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_LOCAL_RANK": "0",
        "HOROVOD_RANK": "0",
        "HOROVOD_SIZE": "1",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", _SCRIPTED])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM)}
    try:
        with driver.serving():
            assert supervise(Path("run"), "auto") == exit_code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len([line for line in (tmp_path / "lines").read_text().splitlines() if line]) == lines_left


def test_what_cannot_be_elastic(prepared: Prepared):
    with pytest.raises(ConfigError, match="leave out --resume never"):
        supervise(Path("run"), "never")
    with pytest.raises(LaunchError, match="--elastic needs horovodrun --min-np"):
        Driver({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"})
    with pytest.raises(ConfigError, match=r"set scaling\.per_rank=false"):
        ranks_that_share(load_config(str(prepared.recipe), ["scaling.per_rank=true"]), 2)


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ([], [1, 2, 3, 4, 4, 6, 6, 6]),
        (["train.microbatch=3"], [1, 2, 2, 4, 4, 6, 6, 6]),
        (["train.global_tokens=160"], [1, 2, 2, 2, 5, 5, 5, 5]),  # ten windows
        (["train.ramp_start=4", "train.ramp_increment=4", "train.ramp_tokens=64"], [1, 2, 2, 4, 4, 4, 4, 4]),
        (["task.name=seq2seq"], [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_ranks_that_can_share_a_batch(prepared: Prepared, settings: list[str], counts: list[int]):
    config = load_config(str(prepared.recipe), settings)  # twelve rows
    assert [ranks_that_share(config, most) for most in range(1, 9)] == counts


def test_a_replica_is_whole(prepared: Prepared):
    config = load_config(str(prepared.recipe), ["mesh.tensor=2", "train.global_batch=3"])
    assert [ranks_that_share(config, most) for most in range(2, 9)] == [2, 2, 2, 2, 6, 6, 6]
    assert ranks_that_share(config, 15, unit=3) == 6
    with pytest.raises(ConfigError, match=r"1 rank left, and mesh\.\* needs 2"):
        ranks_that_share(config, 1)


def test_nodes_that_can_share_a_batch(prepared: Prepared, capsys: pytest.CaptureFixture[str]):
    """The batch script asks."""
    for words, nodes in ((["2", "5"], "3"), (["3", "3"], "2"), (["5", "3"], "1"), (["2", "3", "seed=1"], "3")):
        assert main([*words[:2], "runs/none", str(prepared.recipe), *words[2:]]) == 0
        assert capsys.readouterr().out == f"{nodes}\n"
    assert main(["2", "3", "runs/none", str(prepared.recipe), "scaling.per_rank=true"]) == 2
    assert "ConfigError: scaling.per_rank=true makes the batch" in capsys.readouterr().err


@given(slots=st.lists(st.integers(1, 4), min_size=1, max_size=4), left_out=st.integers(0, 15))
def test_places_are_those_that_horovod_gives(slots: list[int], left_out: int):
    """To as many ranks as take part, as if the others were not there."""
    count = max(1, sum(slots) - left_out)
    given_by_horovod = get_host_assignments([HostInfo(f"h{i}", n) for i, n in enumerate(slots)], 1, count)
    hosts = [f"h{i}" for i, n in enumerate(slots) for _ in range(n)][:count]
    for slot in given_by_horovod:
        env: dict[str, str] = {}
        world = take_place(hosts, slot.rank, env)
        assert env == {k: v for k, v in create_slot_env_vars(slot).items() if k != "HOROVOD_HOSTNAME"}
        assert world == World(slot.rank, count, slot.local_rank, slot.local_size, "horovodrun --gloo")


@pytest.mark.parametrize(
    ("reason", "left", "word"),
    [
        ("SIGUSR2", False, "again"),
        ("SIGTERM", False, "again"),  # it came to another rank
        ("SIGUSR2 and SIGTERM", True, "leave"),
        ("stop file", False, "leave"),
        ("the job's time ends", False, "leave"),
    ],
)
def test_why_it_stopped(monkeypatch: pytest.MonkeyPatch, reason: str, left: bool, word: str):
    reads, writes = os.pipe()
    monkeypatch.setenv("HVDTRAIN_ELASTIC_ROUND", json.dumps({"tell": writes}))
    tell_stopped(reason, left)
    os.close(writes)
    with os.fdopen(reads) as told:
        assert told.read() == word
