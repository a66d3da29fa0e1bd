"""Workers come and go, the run goes on: Horovod's elastic mode over Gloo, with new processes for every set of workers.

    horovodrun --min-np 1 --max-np 3 --host-discovery-script S ... python -m hvdtrain train RECIPE --elastic

    worker a  |-- training, rank 0 of 2 --| 75   |-- rank 0 of 3 -----------------| lost   |-- rank 0 of 2 ----
    worker b  |-- training, rank 1 of 2 --| 75   |-- rank 1 of 3 -----------------| lost   |-- rank 1 of 2 ----
    worker c        a host is new: save          |-- rank 2 of 3 -----| the host is gone

horovodrun starts workers. A worker trains nothing: it starts ``hvdtrain train`` as a child (elastic_rank.py), one rank
of an ordinary run of as many ranks as there are now. It waits for the child's end and asks Horovod's driver for its
next place. A run is the same on any number of ranks and goes on from its newest checkpoint, so nothing else is carried
over:

a host is new, or leaves   the ranks save at the next step boundary; nothing is lost
a worker or its host dies  the others lose it and end; what came after the newest checkpoint is done again
a training process dies    likewise; its own worker starts it again, and its host stays
too many workers           those by which the batch cannot be shared evenly wait for the next change

Horovod's own way is another: workers shut it down and start it again inside the process, and ``TorchState.sync`` copies
the state of rank 0. That copy takes an optimizer step and so changes weights (horovod #2805), and NCCL and CUDA do not
always survive the restart (#3111, #3494). A new process costs seconds, and leaves nothing of the old one behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from hvdtrain.errors import (
    EXIT_CRASH,
    EXIT_OK,
    EXIT_STOPPED_EARLY,
    FINAL_EXITS,
    ConfigError,
    LaunchError,
    plural,
    say,
)
from hvdtrain.files import listed, optional, seen
from hvdtrain.jobs.elastic_rank import AGAIN, IDLE, LEAVE, MARK

_OVER = {EXIT_OK, *FINAL_EXITS}  # another try would end as this one did
_MOST_STALLED = 3  # deaths in a row without a newer checkpoint
_LOOK_S = 1.0  # between two looks at the child and the driver
_LOST_S = 15.0  # in which a training process that has lost another one ends by itself
_ANSWER_S = 10.0
_ENDS_S = 3.0  # that a driver which has told its workers to leave takes to answer them
_SILENT_S = 60.0  # after which a driver is believed dead: save and stop
_MEET_S = 120.0  # for all workers of a round to come; each has started, or has just ended a training process


def supervise(run_dir: Path, resume: str) -> int:
    """Be a worker of ``horovodrun --host-discovery-script``: run this very command as a training process, again and
    again (local). Returns the exit code: that of the run where it is finished or cannot go on.

    Errors: ConfigError where the run may not resume, LaunchError where no elastic horovodrun started this process.
    """
    if resume == "never":
        raise ConfigError("--elastic goes on from checkpoints again and again: leave out --resume never")
    driver = Driver(os.environ)
    worker = _Worker(driver, run_dir)
    driver.call_when_hosts_change(worker)
    return worker.run()


class Driver:
    """What a worker asks of horovodrun's elastic driver: a web server that numbers workers and keeps small texts.

    Errors: LaunchError where ``env`` is not that of a worker.
    """

    def __init__(self, env: Mapping[str, str]):
        try:
            if env["HOROVOD_ELASTIC"] != "1":
                raise KeyError("HOROVOD_ELASTIC")
            self._url = f"http://{env['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{env['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
            self.host, self._slot = env["HOROVOD_HOSTNAME"], env["HOROVOD_LOCAL_RANK"]
            self.rank, self.size = int(env["HOROVOD_RANK"]), int(env["HOROVOD_SIZE"])
        except (KeyError, ValueError) as error:
            raise LaunchError(
                "--elastic needs horovodrun --min-np N --max-np M --host-discovery-script SCRIPT to start it "
                f"({type(error).__name__}: {error})"
            ) from None

    def call_when_hosts_change(self, listener: "_Worker") -> None:
        """``listener.on_hosts_updated(...)``, in another thread, where the driver has more or fewer hosts for the
        workers. It tells only rank 0's worker.
        """
        from horovod.runner.elastic.worker import WorkerNotificationManager

        manager = WorkerNotificationManager()
        manager.register_listener(listener)
        manager.init()

    def next_place(self) -> bool:
        """Wait until every worker of this round has asked for its next place or died, and set the new rank and size.

        False: there is no place for this worker any more.
        """
        self.get("anything")  # a driver that has ended takes calls and never answers; this one call may take for ever
        host_and_slot = f"{self.host}:{self._slot}"
        with urllib.request.urlopen(f"{self._url}/rank_and_size/{host_and_slot}") as answer:
            self.rank, self.size = map(int, answer.read().decode().split(",")[:2])
        return self.rank >= 0

    def meet(self) -> list[str]:
        """The host of every rank of this round; empty if a worker does not come within _MEET_S. Errors: OSError."""
        self.put(f"host-{self.rank}", self.host)
        until, hosts = time.monotonic() + _MEET_S, list[str]()
        while len(hosts) < self.size:
            if (host := self.get(f"host-{len(hosts)}")) is not None:
                hosts.append(host)
            elif time.monotonic() > until:
                say(f"elastic: worker {len(hosts)} of {self.size} has not come within {_MEET_S:g} s")
                return []
            else:
                time.sleep(0.1)
        return hosts

    def put(self, key: str, text: str) -> None:
        """Keep a text until the next round begins. Errors: OSError."""
        request = urllib.request.Request(f"{self._url}/hvdtrain/{key}", data=text.encode(), method="PUT")
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()

    def get(self, key: str) -> str | None:
        """A text that a worker of this round has put there. Errors: OSError."""
        try:
            with urllib.request.urlopen(f"{self._url}/hvdtrain/{key}", timeout=_ANSWER_S) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise


class _Worker:
    """Starts training processes in turn, and waits for them."""

    def __init__(self, driver: Driver, run_dir: Path):
        self._driver, self._run_dir = driver, run_dir
        self._child: subprocess.Popen[bytes] | None = None
        self._leaving = self._changed = False
        self._stalled, self._newest = 0, newest_step(run_dir)
        self._older_summary = self._summary()

    def on_hosts_updated(self, timestamp: int, update: int) -> None:
        """Horovod calls it so."""
        self._changed = True

    def run(self) -> int:
        code, word, before = EXIT_CRASH, "", 0
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM):
            signal.signal(number, self._leave)
        try:
            while True:
                if before and self._driver.rank == 0:
                    newest = newest_step(self._run_dir) or "the start"
                    say(f"elastic: {plural(self._driver.size, 'worker')} (before: {before}), from {newest}")
                before = self._driver.size
                hosts = self._driver.meet()
                code, word = self._round(hosts) if hosts else (EXIT_CRASH, "")
                if word == LEAVE or (code in _OVER and word != IDLE):
                    return code
                if self._leaving:
                    raise _Left
                if word not in (IDLE, AGAIN) and not self._may_try_again(code):
                    return code
                self._changed = False  # from here on; the driver looks at the hosts when all have asked
                has_place = self._driver.next_place()
                if self._leaving:
                    raise _Left
                if not has_place:
                    say(f"elastic: {self._driver.host} has no place in this run any more")
                    return EXIT_OK
        except _Left:
            return self._farewell(EXIT_STOPPED_EARLY)
        except OSError as error:
            return self._farewell(code or EXIT_STOPPED_EARLY, f"elastic: no answer from horovodrun ({error})")
        finally:
            if self._child is not None and self._child.poll() is None:
                self._child.kill()
                self._child.wait()

    def _round(self, hosts: list[str]) -> tuple[int, str]:
        """Run one training process. Returns its exit code, and the word that it has told (see elastic_rank.py)."""
        reads, writes = os.pipe()
        mark = json.dumps({"worker": os.getpid(), "tell": writes, "hosts": hosts})
        env = {**os.environ, "HOROVOD_RANK": str(self._driver.rank), "HOROVOD_SIZE": str(self._driver.size)}
        env = {**env, MARK: mark}
        del env["HOROVOD_ELASTIC"]  # for Horovod this is a run like any other
        # Until it listens, USR2 would end it; ignored signals stay so in a new program.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._child = subprocess.Popen(sys.orig_argv, env=env, pass_fds=[writes])
        signal.signal(signal.SIGUSR2, self._leave)
        os.close(writes)
        if self._leaving:
            self._child.terminate()
        code = self._watch(self._child)
        self._child = None
        with os.fdopen(reads) as told:
            word = told.read()
        if code not in _OVER and word not in (IDLE, AGAIN, LEAVE):
            self._driver.put("died", str(self._driver.rank))
        return code, word

    def _watch(self, child: "subprocess.Popen[bytes]") -> int:
        heard_s, lost_s = time.monotonic(), None
        while True:
            try:
                code = child.wait(_LOOK_S)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                pass
            if self._changed:
                child.send_signal(signal.SIGUSR2)  # again and again: it may not listen yet
            try:
                died, heard_s = self._driver.get("died"), time.monotonic()
            except OSError:
                died = None
            if time.monotonic() - heard_s > _SILENT_S:
                child.terminate()
            if died is not None and lost_s is None:
                lost_s = time.monotonic()
            if lost_s is not None and time.monotonic() - lost_s > _LOST_S:
                child.kill()

    def _may_try_again(self, code: int) -> bool:
        newest = newest_step(self._run_dir)
        self._stalled = self._stalled + 1 if newest == self._newest else 1
        self._newest = newest
        if self._stalled > _MOST_STALLED:
            say(f"elastic: exit code {code}, {self._stalled} times in a row without a newer checkpoint: given up")
        return self._stalled <= _MOST_STALLED

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self._leaving = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)
        elif number == signal.SIGALRM:
            raise _Left
        else:  # a driver that cannot give its answer writes pages of complaints below the last line of the run
            signal.setitimer(signal.ITIMER_REAL, _ENDS_S)

    def _farewell(self, code: int, trouble: str = "") -> int:
        """The exit code of a worker that leaves without a training process: ``code``, or 0 if the run has finished.

        By 0 the driver knows that the run has finished; it then ends the workers that wait, and itself.
        """
        if self._summary() not in (None, self._older_summary):
            return EXIT_OK
        if trouble:
            say(trouble)
        return code

    def _summary(self) -> int | None:
        """When the run's summary, which only a finished one has, was written; None: there is none."""
        try:
            return (self._run_dir / "summary.json").stat().st_mtime_ns
        except OSError:
            return None


class _Left(Exception):
    """This worker was told to leave."""


def newest_step(run_dir: Path) -> str | None:
    """The name of the newest checkpoint's folder, checked or not; None: there is none."""
    folder = run_dir / "checkpoints"
    steps = optional(lambda: listed(folder, "step-*"), f"cannot read {folder}", [])
    return max((path.name for path in steps if seen(path / "manifest.json")), default=None)
