"""A run folder has one owner: the job that trains in it. Two would leave weights of one beside metrics of the other.

    RUN_DIR/claim/00000003    who owns it, and a heartbeat, which rank 0 renews every BEAT_S

    3  owns and beats |-- killed
    4                          finds 3: is it dead? .... makes 4, removes 3, and trains
    5                          finds 3: is it dead? .... 4 is there, and beats: refused

A claim is a numbered file. A start takes over from number 3 by making number 4, which a file system grants to one
process alone (O_EXCL; ``flock`` is not reliable where several machines share a file system). Numbers never go back: a
claim that is given back stays, and says so.

No two clocks are compared. An owner is alive if its heartbeat changes while another start looks at it. It is dead if
its process is gone, where this machine can tell; if Slurm says that its job has ended or was started anew; or if its
heartbeat has not changed for STALE_S. A process that was suspended for so long may come back: it finds that its claim
is not the newest, and ends before it writes.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hvdtrain.comm.ancestors import process_began
from hvdtrain.comm.ranks import Ranks
from hvdtrain.comm.world import node_name
from hvdtrain.errors import ConfigError, HvdtrainError, OutputError, describe, say, say_from
from hvdtrain.files import again
from hvdtrain.machine.asking import answer_of

BEAT_S = 5.0
STALE_S = 60.0  # twelve heartbeats; a parallel file system may take seconds for one
_LOOK_S = 0.5
_QUIET_S = 2 * BEAT_S  # after which a start that waits says so; an owner that lives has beaten by then
_ANSWER_S = 10.0  # for squeue
_LEAVE_S = 15.0  # for the loop to find that the claim is lost; then the process ends without it
_BYTES = 1024  # of a claim, padded, so that one write replaces it
_ENDED = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "BOOT_FAIL", "CANCELLED", "COMPLETED",
          "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}  # fmt: skip


class ClaimLostError(HvdtrainError):
    """Another start has taken the run folder over, and goes on with the run. So this one ends as crashed (exit 70) and
    not as stopped early, after which a job script would start it again.
    """


class Claim(contextlib.AbstractContextManager):
    """``with Claim(run_dir, group) as claim: ... claim.take() ... claim.check() ...``, on every rank.

    Rank 0 holds the claim and renews it from a thread. The end of the ``with`` gives it back, also after an error.
    """

    def __init__(self, run_dir: Path, group: Ranks, env: Mapping[str, str] | None = None):
        self._run_dir, self._folder, self._group = run_dir, run_dir / "claim", group
        self._me = describe_myself(os.environ if env is None else env)
        self._number, self._beats = 0, 0
        self._seen: tuple[int, bytes] | None = None  # another's claim, and since when it is unchanged
        self._since_s, self._is_dead, self._told = 0.0, False, False
        self._looked_s, self._lost = 0.0, False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    # --- taking it -----------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Own the run folder from here on; make it where it is not there (collective; once).

        Waits up to STALE_S where the last owner has not given it back and may be alive. Errors, on all ranks: RankError
        with the exit code of ConfigError where another start owns it, and of OutputError where it cannot be written.
        """
        # In short turns: ranks that wait for long in one collective would be taken for stalled.
        while not self._group.all_gather_object(self._group.on_main(self._try))[0]:
            pass
        if self._group.rank == 0:
            self._thread = threading.Thread(target=self._keep, name="hvdtrain-claim", daemon=True)
            self._thread.start()

    def _try(self) -> bool:
        """Look once, and take it where it is free. Errors: ConfigError where its owner lives."""
        try:
            is_taken = again(self._look_and_take, self._folder)
        except OSError as error:
            raise OutputError(f"cannot claim run folder {self._run_dir}: {error.strerror}") from None
        if not is_taken:
            time.sleep(_LOOK_S)
        return is_taken

    def _look_and_take(self) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        number, raw = newest_claim(self._folder)
        if not number or is_free(raw):
            return self._make(number + 1)
        now = time.monotonic()
        if self._seen is None or self._seen[0] != number:
            self._seen, self._since_s, self._told = (number, raw), now, False
            self._is_dead = is_known_dead(read_owner(raw), self._me)
        if raw != self._seen[1]:
            raise ConfigError(_refusal(self._run_dir, read_owner(raw)))
        if self._is_dead or now - self._since_s >= STALE_S:
            return self._make(number + 1)
        if now - self._since_s >= _QUIET_S and not self._told:
            self._told = True
            say(
                f"note: {self._run_dir} was not given back by {name_of(read_owner(raw))}; {STALE_S:g} s without a "
                "heartbeat of it, and this start takes over"
            )
        return False

    def _make(self, number: int) -> bool:
        """Make the claim of that number; False where another was faster."""
        path = self._path(number)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        try:
            with open(file, "wb") as claim:
                claim.write(self._content())
                claim.flush()
                os.fsync(claim.fileno())
            numbers = _numbers(self._folder)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        if numbers[-1] != number:  # the list that this start saw was an old one
            path.unlink(missing_ok=True)
            return False
        for older in numbers[:-1]:
            with contextlib.suppress(OSError):
                self._path(older).unlink()
        self._number, self._looked_s = number, _now_s()
        return True

    # --- keeping it ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Is the run folder still ours? To be called before something is written there (local; only rank 0 can tell).

        It looks again only if the last look is so long ago that another start may have taken over since.
        Errors: ClaimLostError, on this rank alone.
        """
        if self._number and (self._lost or _now_s() - self._looked_s > 2 * BEAT_S):
            with contextlib.suppress(OSError):  # whoever cannot read here cannot write here either
                self._look()
            if self._lost:
                raise self._loss()

    def _look(self) -> None:
        began_s = _now_s()
        number, raw = newest_claim(self._folder)
        if number != self._number or self._me["token"].encode() not in raw:  # which may be half a heartbeat
            self._lost = True
        else:
            self._looked_s = began_s

    def _keep(self) -> None:
        """The thread of rank 0."""
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that does not answer now may later
                self._look()
                if self._lost:
                    break
                self._beats += 1
                with open(self._path(self._number), "r+b", buffering=0) as file:  # by its name: it may be gone
                    file.write(self._content())
        if self._lost and not self._ended.wait(_LEAVE_S):
            say_from(self._group.rank, describe(self._loss()), past_locks=True)
            self._group.abort(ClaimLostError.exit_code)

    def _loss(self) -> ClaimLostError:
        raw = b""
        with contextlib.suppress(OSError):
            _, raw = newest_claim(self._folder)
        return ClaimLostError(
            f"{self._run_dir} was taken over by {name_of(read_owner(raw))}, because this process had not given a "
            f"sign of life for {STALE_S:g} s; nothing more is written here"
        )

    def __exit__(self, *_: object) -> None:
        """Give the claim back. Never fails: one that cannot be given back becomes stale."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(BEAT_S)
        with contextlib.suppress(OSError), open(self._path(self._number), "r+b", buffering=0) as file:
            file.write(self._content(released=_date()))

    def _content(self, **more: str) -> bytes:
        text = json.dumps({**self._me, "beat": f"{self._beats:012d}", **more})
        return text.ljust(_BYTES - 1).encode()[: _BYTES - 1] + b"\n"

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"


# --- who is it -------------------------------------------------------------------------------------------------------


def describe_myself(env: Mapping[str, str]) -> dict[str, Any]:
    """What a claim says of its owner. Its process number is compared only by a process of the same ``boot`` and
    ``namespace``: the name of the host would not do, because containers may share it.
    """
    return {
        "token": os.urandom(8).hex(),
        "host": socket.gethostname()[:64],
        "pid": os.getpid(),
        "process": process_began(os.getpid()),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "since": _date(),
        "cluster": env.get("SLURM_CLUSTER_NAME", "")[:64],
        "job": env.get("SLURM_JOB_ID", "")[:32],
        "restart": _number(env.get("SLURM_RESTART_COUNT", "")),
        "node": node_name()[:64],
    }


def is_known_dead(owner: Mapping[str, Any], me: Mapping[str, Any]) -> bool:
    """Is it certain that its process writes no more?"""
    is_here = owner.get("boot") and all(owner.get(key) == me[key] for key in ("boot", "namespace"))
    if is_here and isinstance(owner.get("pid"), int) and _is_gone(owner["pid"], owner.get("process")):
        return True
    if not owner.get("job") or not me["cluster"] or owner.get("cluster") != me["cluster"]:
        return False  # job numbers are each cluster's own
    if owner["job"] == me["job"]:
        return _number(owner.get("restart")) < me["restart"]
    return has_ended(str(owner["job"]))


def _is_gone(pid: int, began: str | None) -> bool:
    try:
        os.kill(pid, 0)  # /proc may hide other users' processes
        return process_began(pid) != began
    except ProcessLookupError:
        return True
    except OSError:
        return False


def has_ended(job: str) -> bool:
    """Does Slurm say that a job has ended? False also where Slurm does not answer."""
    try:
        states = answer_of(["squeue", "--noheader", "--format=%T", f"--jobs={job}"], _ANSWER_S).split()
    except OSError as error:
        return "Invalid job id" in str(error)  # one that it has forgotten
    return all(state in _ENDED for state in states)


def name_of(owner: Mapping[str, Any]) -> str:
    """For messages: ``process 815 on n1 (Slurm job 4711, restart 1, node n1), which began 2030-01-31 12:00:00 UTC``."""
    if not owner:
        return "a start that left no name"
    job = ""
    if owner.get("job"):
        restart = f", restart {owner['restart']}" if owner.get("restart") else ""
        job = f" (Slurm job {owner['job']}{restart}, node {owner.get('node')})"
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, which began {owner.get('since')}"


def _refusal(run_dir: Path, owner: Mapping[str, Any]) -> str:
    end = f"`scancel {owner['job']}`" if owner.get("job") else f"`kill {owner.get('pid')}` on {owner.get('host')}"
    return (
        f"{run_dir} belongs to {name_of(owner)}, and whose heartbeat is less than {BEAT_S + 1:g} s old; "
        f"wait for its end, end it ({end}, or touch {run_dir}/stop), or give another --run-dir"
    )


# --- files -----------------------------------------------------------------------------------------------------------


def newest_claim(folder: Path) -> tuple[int, bytes]:
    """The highest number there and what is in that file; (0, b"") where there is none. Errors: OSError."""
    while numbers := _numbers(folder):
        with contextlib.suppress(FileNotFoundError):  # a newer one was made, and this one removed
            return numbers[-1], (folder / f"{numbers[-1]:08d}").read_bytes()
    return 0, b""


def read_owner(raw: bytes) -> dict[str, Any]:
    """Empty: the claim is not written yet, or damaged."""
    with contextlib.suppress(ValueError):
        owner = json.loads(raw)
        return owner if isinstance(owner, dict) else {}
    return {}


def is_free(raw: bytes) -> bool:
    """Was it given back?"""
    return "released" in read_owner(raw)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder) if name.isdecimal() and name.isascii())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _number(text: Any) -> int:
    return int(text) if str(text).isdecimal() else 0


def _date() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _now_s() -> float:
    """A clock that goes on while the machine sleeps, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
