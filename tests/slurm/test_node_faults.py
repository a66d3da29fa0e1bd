"""What befalls a node, as opposed to a process on it: its speed, its disks in memory, its clock. It is named.

A node that is lost, or whose cable is, is in test_job_faults.py.
"""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import SlurmCluster
from launch import TRACE, Prepared, summary
from test_preflight_job import DOCTOR, STEP, run
from test_srun import TRAIN
from test_train_job import LONG, Job

from hvdtrain.machine.hosts import Host

# A clock is the machine's, so hosts cannot have their own; programs that are told another time can be on one of them.
_CLOCK = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += 5;
    return failed;
}
"""


def test_full_memory_disks_and_a_wrong_clock(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """One preflight names n2 for all of it. Open MPI and NCCL share memory in /dev/shm, and have files in /tmp."""
    (tmp_path / "clock.c").write_text(_CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "clock.so", "clock.c"], cwd=tmp_path, check=True, timeout=60)
    node = tmp_path / "node.sh"
    node.write_text('[ "$SLURMD_NODENAME" = n1 ] || export LD_PRELOAD="${0%/*}/clock.so"\nexec "$@"\n')
    n2 = slurm.hosts["n2"]
    n2.run("mount", "-o", "remount,size=64m", "/tmp")
    n2.run("fallocate", "--length", "48MiB", "/tmp/full")  # ranks could not even start without any room
    n2.run("fallocate", "--length", "128MiB", "/dev/shm/full")
    try:
        found = tmp_path / "found.json"
        words = ("--data", prepared.shards, "--run-dir", tmp_path / "run", "--json", found)
        done = run(slurm, *STEP, "bash", node, *DOCTOR, *words)
    finally:
        n2.run("rm", "/tmp/full", "/dev/shm/full")
        n2.run("mount", "-o", "remount,size=50%", "/tmp")
    assert (done.exit_code, TRACE in done.text) == (70, False), done
    assert done.messages == ["hvdtrain: preflight: bad nodes: n2"], done
    bad = {row["check"]: row for row in json.loads(found.read_text())["findings"] if row["verdict"].startswith("BAD")}
    assert {row["node"] for row in bad.values()} == {"n2"}, done
    assert bad["/dev/shm"]["verdict"] == "BAD: 0 B free in /dev/shm, 33.6 MB are needed"
    assert re.fullmatch(r"BAD: \d+\.\d MB free in /tmp, 33\.6 MB are needed", bad["/tmp"]["verdict"])
    assert bad["clock"]["found"].startswith("+5.0")


def test_dockers_bridge_is_no_way_to_the_other_node(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """Each node has one, with the same address, which leads to itself alone."""
    nodes = [slurm.hosts[name] for name in ("n1", "n2")]
    for host in nodes:
        host.run("ip", "link", "add", "docker0", "type", "bridge")
        host.run("ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
        host.run("ip", "link", "set", "docker0", "up")
    try:
        done = run(slurm, *STEP, *TRAIN, prepared.recipe, "--run-dir", tmp_path / "run")
    finally:
        for host in nodes:
            host.run("ip", "link", "del", "docker0")
    assert done.exit_code == 0, done
    assert summary(tmp_path / "run")["world_size"] == 2


@contextmanager
def slowed(host: Host) -> Iterator[None]:
    """As if the host's cores were four times slower: what runs there stands still for three quarters of the time."""
    pids = host.processes()
    over = threading.Event()

    def send(number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def slow() -> None:
        while not over.is_set():
            send(signal.SIGSTOP)
            over.wait(0.03)
            send(signal.SIGCONT)
            over.wait(0.01)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_slow_node(slurm: SlurmCluster, prepared: Prepared, tmp_path: Path):
    """It is named after two looks in a row, with how slow it is."""
    words = (*LONG, "train.steps=100000", "watchdog.stragglers_every=20")
    job = Job(slurm, tmp_path, prepared.recipe, *words, options=("--ntasks-per-node=1",), HVDTRAIN_LAUNCHER="pmix")
    job.until_in_mid_run()
    with slowed(slurm.hosts["n2"]):
        job.until_said("hvdtrain: note: rank 1 on n2 is slow: its own part of a step takes ")
    (job.run_dir / "stop").touch()
    assert job.wait()[:2] == ("FAILED", "75:0"), job.log
