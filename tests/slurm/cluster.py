"""A Slurm of two nodes on this one machine, for tests: real daemons, one folder, free loopback ports.

    pytest --- munged       as user munge; signs every message of the others
           |-- slurmctld    127.0.0.1:a
           |-- slurmd n1    127.0.0.1:b  --- slurmstepd --- a job's processes
           `-- slurmd n2    127.0.0.1:c  --- slurmstepd --- ...

It needs root and Debian's packages (.ci/install-slurm), and neither Docker nor systemd. slurm.conf tells the rest.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from command import Arg, run, until
from machine import not_here

TEMPLATE = Path(__file__).with_name("slurm.conf")
ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # Debian's daemons, which not every user's PATH has


def require_slurm() -> None:
    """Skip the test where a cluster cannot be started; fail instead where CI is set: nobody reads the skips of a CI."""
    commands = ("munged", "slurmctld", "slurmd", "srun", "setpriv")
    missing = [command for command in commands if shutil.which(command, path=PATH) is None]
    if missing:
        reason = f"no {', '.join(missing)} on this machine: run .ci/install-slurm"
    elif os.geteuid() != 0:
        reason = f"the daemons of a Slurm cluster need root, the tests run as uid {os.geteuid()}"
    else:
        return
    not_here(f"tests/slurm: {reason}")


def free_ports(count: int) -> list[int]:
    """Below 32768: from there on the kernel may give a port that was free to any outgoing connection."""
    ports: list[int] = []
    while len(ports) < count:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 32000)))
            ports.append(probe.getsockname()[1])
    return ports


class SlurmCluster:
    """`with SlurmCluster(folder) as slurm:` nodes n1 and n2 of 2 CPUs, partitions main and urgent (preempts main).

    Two MPI ranks on each node need OMPI_MCA_btl=self,tcp: both nodes are this machine, and Open MPI's shared memory of
    their first ranks has the same name.

    folder: for configuration, logs and state; it stays afterwards. env: what a command needs to find the cluster.
    daemons: munged, slurmctld, n1, n2, so that a test can take a node away: `daemons["n2"].kill()`.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        # PMIx steps have sockets like n1/spool/stepd.slurm.pmix.1.0 in it, and the path of a socket ends at 107 bytes.
        if len(str(self.folder)) > 70:
            raise ValueError(f"{self.folder} has {len(str(self.folder))} characters, at most 70 leave room for sockets")
        self.env = {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        # Not below self.folder: pytest's folders are closed to user munge, and munged refuses one that all may write.
        self.munge = Path(tempfile.mkdtemp(prefix="munge-", dir="/tmp"))
        try:
            self._start()
        except BaseException as error:
            self.__exit__()
            for log in sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")]):
                error.add_note("\n".join([f"--- {log}", *log.read_text().splitlines()[-10:]]))
            raise
        return self

    def _start(self) -> None:
        for part in ("n1/spool", "n1/tmp", "n2/spool", "n2/tmp"):
            (self.folder / part).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        conf = TEMPLATE.read_text().format(host=host, ports=free_ports(3), folder=self.folder, munge=self.munge)
        Path(self.env["SLURM_CONF"]).write_text(conf)
        key = self.munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        shutil.chown(key, "munge", "munge")
        shutil.chown(self.munge, "munge", "munge")
        self.munge.chmod(0o755)  # munged wants every user to reach its socket
        files = [f"--{name}-file={self.munge}/{name}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", "munged", "--foreground", f"--socket={self.munge}/socket", *files, user="munge")
        until(lambda: self._all_live() and (self.munge / "socket").exists(), "munged has a socket", 60)
        self._daemon("slurmctld", "slurmctld", "-D")
        self._daemon("n1", "slurmd", "-D", "-N", "n1")
        self._daemon("n2", "slurmd", "-D", "-N", "n2")
        sinfo = ["sinfo", "--noheader", "--partition=main", "--Node", "--format=%N=%t"]
        idle = "n1=idle\nn2=idle\n"
        until(lambda: self._all_live() and self.run(sinfo, timeout_s=30).stdout == idle, "n1 and n2 are idle", 60)

    def _daemon(self, name: str, *args: str, user: str | None = None) -> None:
        # Each stays in the foreground as our own child, so its pid is known. --pdeathsig: a killed pytest leaves jobs,
        # but no daemon. A session of its own, so that Ctrl-C reaches pytest alone, which then ends them in order.
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *args], env=self._environ({}), user=user, group=user,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def _all_live(self) -> bool:
        if dead := [name for name, daemon in self.daemons.items() if daemon.poll() is not None]:
            raise RuntimeError(f"{', '.join(dead)} ended")
        return True

    def _environ(self, extra: Mapping[str, str]) -> dict[str, str]:
        # Without what an outer Slurm or mpirun left, in case the tests themselves run inside a job.
        outer = ("SLURM", "SRUN", "SBATCH", "PMI", "OMPI_COMM")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        return {**clean, "PATH": PATH, **self.env, **extra}

    def run(
        self, args: Sequence[Arg], timeout_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node, so to say; its output is captured as text, its exit code is not checked.

        env: added to this process's environment. The rest, the timeout above all, is told at command.run.
        """
        return run(args, timeout_s, cwd=cwd, env=self._environ(env or {}))

    def _answer(self, *args: Arg, **where: Any) -> str:
        done = self.run(args, timeout_s=30, **where)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, args))}: {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, *args: Arg, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
        """Submit `sbatch *args`; the job's id."""
        return int(self._answer("sbatch", "--parsable", *args, cwd=cwd, env=env).partition(";")[0])

    def show(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`. A value with spaces in it, such as Command, is cut at the first."""
        fields = self._answer("scontrol", "--oneliner", "show", "job", str(job_id)).split()
        return dict(field.partition("=")[::2] for field in fields if "=" in field)

    def wait(self, job_id: int | str, timeout_s: float) -> dict[str, str]:
        """The fields of a job once it has ended, not merely been requeued. ExitCode reads "code:signal"."""
        deadline = time.monotonic() + timeout_s
        while ENDED.fullmatch((job := self.show(job_id))["JobState"]) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} has not ended within {timeout_s} s: {job}")
            time.sleep(0.2)
        return job

    def __exit__(self, *_: object) -> None:
        """Cancel every job, end the daemons, then what they left: the steps of a lost node outlive its slurmd."""
        with suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            if len(self.daemons) == 4 and self._all_live():
                self._answer("scancel", "--user=root")
                until(lambda: self._all_live() and not self._answer("squeue", "--noheader"), "no job is left", 10)
        for daemon in reversed(self.daemons.values()):  # munged last: the others sign their goodbyes
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()  # nothing, if it has ended
            daemon.wait()
        shutil.rmtree(self.munge, ignore_errors=True)
        until(self._none_left, f"no process has {self.env}", 10)

    def _none_left(self) -> bool:
        rest = self.processes()
        for pid in rest:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not rest

    def processes(self) -> set[int]:
        """Every pid with this cluster's SLURM_CONF in its environment: daemons, steps, jobs, but not ourselves."""
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        found = set()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it may have ended meanwhile
                if mark in environ.read_bytes().split(b"\0"):
                    found.add(int(environ.parent.name))
        return found - {os.getpid()}
