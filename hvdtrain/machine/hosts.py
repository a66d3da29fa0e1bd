"""Hosts of their own on this one machine (as root): each has its name, network, ``/tmp`` and ``/dev/shm``.

    hub   10.77.0.254   a switch, and where one logs in; its files are this machine's
     |--- n1   10.77.0.1    its own /tmp and /dev/shm, all else is the hub's, as on a shared file system
     `--- n2   10.77.0.2

A host is a process that holds namespaces. When its standard input ends, also because its maker was killed, it kills all
that runs in them, then goes itself, and the kernel takes cables and mounts back. Nothing of it has a name outside: two
networks at a time never meet, and nothing can be left behind.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HUB = "hub"
MOST_HOSTS = 253  # addresses that the hub leaves
SHM = "128m"  # of a host's /dev/shm: a test can fill it
_UNSHARE = ("unshare", "--mount", "--uts", "--ipc", "--net")
_TMP = Path("/tmp")


@cache
def why_no_hosts() -> str:
    """What keeps this machine from having hosts; empty: nothing."""
    if missing := [command for command in ("ip", "tc", "nsenter", "unshare") if shutil.which(command) is None]:
        return f"no {', '.join(missing)} on this machine (Debian has them in iproute2 and util-linux)"
    if os.geteuid() != 0:
        return f"hosts of their own need root, this is uid {os.geteuid()}"
    try_all = "ip link add type bridge && ip link add type veth && mount -t tmpfs tmpfs /tmp"
    done = subprocess.run([*_UNSHARE, "sh", "-c", try_all], capture_output=True, text=True, timeout=30)
    return f"no hosts of their own here: {done.stderr.strip()}" if done.returncode else ""


class Host:
    """``name``, its namespaces, and all that runs in them. ``hub``: whose files it sees; None: this machine's."""

    def __init__(self, name: str, hub: "Host | None" = None):
        self.name = name
        words = [*(hub.enter() if hub else ()), *_UNSHARE, sys.executable, "-I", "-S", __file__, name]
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C is for the tests, which then end in order.
        self._holder = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        self.pid = self._holder.pid
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._plug = self._holder.stdin
        with self._holder.stdout as said:
            if not said.readline():
                raise RuntimeError(f"host {name} did not start")

    def enter(self, folder: Path | str = "/") -> list[str]:
        """Words that have the command behind them run here, in ``folder``, in the same process."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", f"--wdns={folder}"]

    def run(self, *args: object) -> str:
        """What the command prints. Errors: RuntimeError with its words where it fails."""
        done = subprocess.run([*self.enter(), *map(str, args)], capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(map(str, args))}: {done.stderr.strip()}")
        return done.stdout

    def processes(self) -> set[int]:
        """Every pid here, without the holder's."""
        return _processes(self.pid) - {self.pid} if self._holder.poll() is None else set()

    def end(self) -> None:
        """Kill all that runs here; the host is gone with it."""
        self._plug.close()
        self._holder.wait(30)


class Network(AbstractContextManager):
    """``with Network(["n1", "n2"], folder) as network:`` a hub and hosts that reach one another, by name too.

    Of ``/tmp`` they share ``folder``, ``shared``, this package's folder and this Python's environment; with ``/tmp``
    itself in ``shared``, all of it. Errors: RuntimeError.
    """

    def __init__(self, names: Sequence[str], folder: Path, shared: Sequence[Path] = ()):
        self.addresses = {HUB: "10.77.0.254"} | {name: f"10.77.0.{n}" for n, name in enumerate(names, start=1)}
        self._names, self.folder = list(names), folder.resolve()
        shared = [path.resolve() for path in (folder, *shared, ROOT, Path(sys.prefix))]
        self._has_own_tmp = _TMP not in shared
        self._shared = [path for path in shared if _TMP in path.parents]
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> "Network":
        try:
            self._start_hub()
            for name in self._names:
                self._start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def hub(self) -> Host:
        return self.hosts[HUB]

    def _start_hub(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        known.write_text("\n".join(lines) + "\n")
        hub = self.hosts[HUB] = Host(HUB)
        hub.run("mount", "--bind", known, "/etc/hosts")
        hub.run("ip", "link", "add", "switch", "type", "bridge")
        self._connect(hub, "switch")

    def _start(self, name: str) -> None:
        host = self.hosts[name] = Host(name, self.hub)
        self.hub.run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host.pid)
        self.hub.run("ip", "link", "set", name, "master", "switch", "up")
        self._connect(host, "eth0")
        host.run("mount", "-t", "tmpfs", "-o", f"size={SHM}", "tmpfs", "/dev/shm")
        if self._has_own_tmp:
            self._give_tmp(host)

    def _give_tmp(self, host: Host) -> None:
        # A new /tmp, with what is shared of the old one in it; made elsewhere, as it will cover the old one.
        host.run("mount", "-t", "tmpfs", "tmpfs", "/mnt")
        for path in self._shared:
            place = "/mnt" / path.relative_to(_TMP)
            host.run("mkdir", "-p", place)
            host.run("mount", "--bind", path, place)
        host.run("mount", "--move", "/mnt", _TMP)

    def _connect(self, host: Host, device: str) -> None:
        host.run("ip", "addr", "add", f"{self.addresses[host.name]}/24", "dev", device)
        for name in ("lo", device):
            host.run("ip", "link", "set", name, "up")

    def unplug(self, name: str) -> None:
        """Pull the cable out of the switch. The host still has its address; nothing leaves it, nothing comes."""
        self.hub.run("ip", "link", "set", name, "down")

    def plug(self, name: str) -> None:
        self.hub.run("ip", "link", "set", name, "up")

    def power_off(self, name: str) -> None:
        """The host is gone in silence; where processes are merely killed, a kernel still closes their connections."""
        self.unplug(name)
        self.hosts[name].end()

    def limit(self, name: str, bits_per_s: float, latency_s: float = 0.0) -> None:
        """Both ways of its cable; latency_s: of what the host sends, see ``why_no_latency``."""
        bytes_per_s = bits_per_s / 8
        burst = min(max(2e-3 * bytes_per_s, 16 << 10), 4 << 20)  # of 2 ms: Linux may come late by so much
        queue = max(50e-3 * bytes_per_s, 256 << 10)
        shape = ("tbf", "rate", f"{bits_per_s:.0f}bit", "burst", f"{burst:.0f}", "limit", f"{queue + burst:.0f}")
        place: tuple[str, ...] = ("root",)
        if latency_s:
            delay = ("netem", "delay", f"{latency_s * 1e6:.0f}us", "limit", "100000")
            self.hosts[name].run("tc", "qdisc", "replace", "dev", "eth0", "root", "handle", "1:", *delay)
            place = ("parent", "1:1")
        self.hosts[name].run("tc", "qdisc", "replace", "dev", "eth0", *place, *shape)
        self.hub.run("tc", "qdisc", "replace", "dev", name, "root", *shape)

    def sent_bytes(self, name: str) -> int:
        """By the host since it began, headers and all."""
        (found,) = json.loads(self.hosts[name].run("ip", "-json", "-stats", "link", "show", "dev", "eth0"))
        return int(found["stats64"]["tx"]["bytes"])

    def __exit__(self, *_: object) -> None:
        for host in reversed(self.hosts.values()):
            host.end()


@cache
def why_no_latency() -> str:
    """What keeps a cable from being slow to answer, where there are hosts; empty: nothing."""
    try_it = "ip link add v0 type veth && tc qdisc add dev v0 root netem delay 1ms"
    done = subprocess.run(["unshare", "--net", "sh", "-c", try_it], capture_output=True, text=True, timeout=30)
    said = done.stderr.strip().removeprefix("Error: ").rstrip(".")
    return f"this kernel has no netem (sch_netem): {said}" if done.returncode else ""


def _processes(pid: int | str) -> set[int]:
    """Every pid that has the network of ``pid``."""
    network, found = os.stat(f"/proc/{pid}/ns/net").st_ino, set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may have ended meanwhile
            if (path / "ns" / "net").stat().st_ino == network:
                found.add(int(path.name))
    return found


def _hold(name: str) -> None:
    """What the process of a host does."""
    socket.sethostname(name)
    print("here", flush=True)
    sys.stdin.read()
    while others := _processes("self") - {os.getpid()}:
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    _hold(sys.argv[1])
