"""A Slurm of two nodes on this one machine, for tests: real daemons, on hosts of their own (machine/hosts.py).

    pytest --- hub --- slurmctld, and munged, which signs every message of all
           |-- n1  --- slurmd --- slurmstepd --- a job's processes
           `-- n2  --- slurmd --- slurmstepd --- ...

It needs root and Debian's packages (.ci/install-slurm), and neither Docker nor systemd. slurm.conf tells the rest.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from command import Arg, run, until
from not_here import not_here

from hvdtrain.machine.hosts import HUB, Host, Network, why_no_hosts

TEMPLATE = Path(__file__).with_name("slurm.conf")
NODES = ("n1", "n2")
ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # Debian's daemons, which not every user's PATH has


def require_slurm() -> None:
    """Skip the test where a cluster cannot be started; fail instead where CI is set: nobody reads the skips of a CI."""
    commands = ("munged", "slurmctld", "slurmd", "srun")
    missing = [command for command in commands if shutil.which(command, path=PATH) is None]
    if missing:
        reason = f"no {', '.join(missing)} on this machine: run .ci/install-slurm"
    elif os.geteuid() != 0:
        reason = f"the daemons of a Slurm cluster need root, the tests run as uid {os.geteuid()}"
    else:
        reason = why_no_hosts()
    if reason:
        not_here(f"tests/slurm: {reason}")


def halves(cpus: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """One for each node; a single CPU is for both."""
    middle = len(cpus) // 2
    return cpus[:middle] or cpus, cpus[middle:]


class SlurmCluster:
    """`with SlurmCluster(folder) as slurm:` nodes n1 and n2 of 2 CPUs, partitions main and urgent (preempts main).

    folder: for configuration, logs and state; it stays afterwards. The nodes see the folder that it is in, and nothing
    else of /tmp. env: what a command needs to find the cluster.
    daemons: munged, slurmctld, n1, n2, so that a test can take a slurmd away: `daemons["n2"].kill()`.
    network, hosts: so that it can take more: `network.unplug("n2")`, `network.power_off("n2")`.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        if len(str(self.folder)) > 80:
            raise ValueError(f"{self.folder} has {len(str(self.folder))} characters, at most 80 let a socket be there")
        self.env = {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.network = Network(NODES, self.folder, shared=[self.folder.parent])

    @property
    def hosts(self) -> dict[str, Host]:
        return self.network.hosts

    def __enter__(self) -> Self:
        try:
            self.network.__enter__()
            self._start()
        except BaseException as error:
            self.__exit__()
            for log in sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")]):
                error.add_note("\n".join([f"--- {log}", *log.read_text().splitlines()[-10:]]))
            raise
        return self

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir()
        conf = TEMPLATE.read_text().format(hub=HUB, addresses=self.network.addresses, folder=self.folder, munge=munge)
        Path(self.env["SLURM_CONF"]).write_text(conf)
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(os.urandom(128))
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "seed", "log")]
        # --force: although only root can reach its socket.
        self._daemon("munged", HUB, "munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        until(lambda: self._all_live() and (munge / "socket").exists(), "munged has a socket", 60)
        self._daemon("slurmctld", HUB, "slurmctld", "-D")
        for node, cpus in zip(NODES, halves(sorted(os.sched_getaffinity(0))), strict=True):
            # Hosts do not share cores: ranks on both would each take all of them.
            self._daemon(node, node, "taskset", "--cpu-list", ",".join(map(str, cpus)), "slurmd", "-D")
        sinfo = ["sinfo", "--noheader", "--partition=main", "--Node", "--format=%N=%t"]
        idle = "n1=idle\nn2=idle\n"
        until(lambda: self._all_live() and self.run(sinfo, timeout_s=30).stdout == idle, "n1 and n2 are idle", 60)

    def _daemon(self, name: str, host: str, *args: str) -> None:
        # Each stays in the foreground as our own child, so its pid is known. A session of its own, so that Ctrl-C
        # reaches pytest alone, which then ends them in order.
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*self.hosts[host].enter(), *args], env=self._environ({}),
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
        """A command on the hub, where one logs in; its output is captured as text, its exit code is not checked.

        env: added to this process's environment. The rest, the timeout above all, is told at command.run.
        """
        words = self.hosts[HUB].enter(cwd or Path.cwd())
        return run([*words, *args], timeout_s, cwd=None, env=self._environ(env or {}))

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
        self.network.__exit__()

    def processes(self) -> set[int]:
        """Every pid on the cluster's hosts: daemons, steps, jobs."""
        return set().union(*(host.processes() for host in self.hosts.values()))
