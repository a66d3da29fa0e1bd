"""Where the ranks of a command that trains here run, and how one training is started, and ended whatever happens.

Ctrl-C, TERM     mpirun is told to end its ranks; then the hosts go, with all that runs on them
kill -9          of this process: the kernel tells mpirun, and every host goes by itself (machine/hosts.py)
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hvdtrain.comm.ancestors import signal_at_parents_end
from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError, LaunchError
from hvdtrain.machine.hosts import MOST_HOSTS, why_no_hosts, why_no_latency
from hvdtrain.machine.link import Link, show_bandwidth, slow_link

_END_S = 15.0  # for mpirun to end its ranks
# Open MPI's own choice takes 1.7 times as long for gradients over slow links.
RING = {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1", "OMPI_MCA_coll_tuned_allreduce_algorithm": "4"}


@dataclass(frozen=True)
class Place:
    """Where ``ranks`` run: each on a host of its own behind ``link``; None: all on this one, in memory.

    threads: of each rank. folder: for what the hosts need.
    """

    ranks: int
    link: Link | None
    threads: int
    folder: Path

    @property
    def about(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''} each"
        if self.link is None:
            return f"{self.ranks} ranks in the memory of one machine, {threads}"
        latency = f", latency {1e3 * self.link.latency_s:g} ms" if self.link.latency_s else ""
        return (
            f"{self.ranks} ranks in network namespaces of one machine, {threads}; links of "
            f"{show_bandwidth(self.link.bits_per_s)} each way{latency}"
        )

    def train(self, words: Sequence[str], log: Path) -> "Ran":
        """``hvdtrain train WORDS...`` on all ranks; what they print goes to ``log``.

        Errors: LaunchError where mpirun cannot be started. Whatever comes, nothing of it runs afterwards.
        """
        rest = ["-np", str(self.ranks), "--bind-to", "none", sys.executable, "-m", "hvdtrain", "train", *words]
        if self.link is None:
            return Ran(self._run(["mpirun", "--oversubscribe", *rest], log))
        names = [f"n{number}" for number in range(1, self.ranks + 1)]
        with slow_link(names, self.link, self.folder, shared=[Path("/tmp")]) as (network, mpirun):
            exit_code = self._run([*mpirun, *rest], log)
            return Ran(exit_code, max(map(network.sent_bytes, names)))

    def _run(self, words: list[str], log: Path) -> int:
        env = {**RING, **os.environ, "PATH": _path(), "OMP_NUM_THREADS": str(self.threads)}
        if os.geteuid() == 0:
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        with open(log, "wb") as out:
            # A session of its own: Ctrl-C is for this process, which then ends the others in order.
            process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=lambda: signal_at_parents_end(signal.SIGTERM),
            )  # fmt: skip
        try:
            return process.wait()
        finally:
            _end(process)


@dataclass(frozen=True)
class Ran:
    """sent_bytes: by the busiest rank's host, headers, start-up and evaluation among them; None: not measured."""

    exit_code: int
    sent_bytes: int | None = None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check_launcher(command: str, world: World) -> None:
    """Errors: LaunchError where ranks cannot be started at all, or a launcher has started several of the command."""
    if world.size > 1:
        raise LaunchError(f"{command} starts the ranks itself; {world.launcher} started {world.size} of it")
    if shutil.which("mpirun", path=_path()) is None:
        raise LaunchError(f"{command} starts its ranks with mpirun, which is not on the PATH (`hvdtrain doctor`)")


@contextmanager
def interrupting() -> Iterator[None]:
    """Within: TERM ends what runs as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_words(log: Path) -> str:
    """What a training that has failed said at its end."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("hvdtrain: ")] or lines or ["it printed nothing"]
    return said[-1].removeprefix("hvdtrain: ")


def _path() -> str:
    """With this Python's folder first, which may have an mpirun of its own."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def threads_of(ranks: int) -> int:
    """OMP_NUM_THREADS, or each rank's share of the cores: ranks on hosts of their own would each take all."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(given) if given.isdigit() and int(given) else max(1, len(os.sched_getaffinity(0)) // ranks)


def possible(link: Link, ranks: int) -> tuple[Link | None, list[str]]:
    """As much of the link as this machine can make, and what has to be said of the rest.

    Errors: ConfigError for more ranks than there can be hosts.
    """
    if reason := why_no_hosts():
        return None, [f"no links of {show_bandwidth(link.bits_per_s)}: {reason}; in memory instead"]
    if ranks > MOST_HOSTS:
        raise ConfigError(f"--ranks {ranks}: at most {MOST_HOSTS} have a host of their own; or --bandwidth memory")
    if link.latency_s and (reason := why_no_latency()):
        return Link(link.bits_per_s), [f"no latency of {1e3 * link.latency_s:g} ms: {reason}; went on without"]
    return link, []
