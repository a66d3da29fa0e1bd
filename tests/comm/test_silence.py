"""Hosts that stop answering are told from those that are stopped, on real cables."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from not_here import require_hosts
from threads import Scripted

from hvdtrain.comm.silence import Silence, other_hosts, own_addresses
from hvdtrain.machine.hosts import Host, Network

ROOT = Path(__file__).resolve().parents[2]
_READ = """
import socket
server = socket.create_server(("", 999))
print(flush=True)
connection, _ = server.accept()
while connection.recv(100):
    pass
"""
_SEND = """
import json, socket, time
from hvdtrain.comm.silence import Silence
connection, silence = socket.create_connection(("n2", 999)), Silence({"10.77.0.2": "n2"})
while True:
    connection.send(b"more")
    print(json.dumps(silence.look(time.monotonic())), flush=True)
    time.sleep(0.1)
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    require_hosts()
    with Network(["n1", "n2"], tmp_path) as network:
        yield network


@contextmanager
def running(host: Host, program: str) -> Iterator[subprocess.Popen]:
    with subprocess.Popen([*host.enter(ROOT), sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_cut_cable_is_silence_and_a_stopped_process_is_not(network: Network):
    with running(network.hosts["n2"], _READ) as reader:
        assert reader.stdout.readline() == b"\n"
        with running(network.hosts["n1"], _SEND) as sender:
            looks: Iterator[dict[str, float]] = map(json.loads, islice(sender.stdout, 300))
            reader.send_signal(signal.SIGSTOP)
            assert [next(looks) for _ in range(30)] == [{}] * 30  # in 3 s; what is not acknowledged is told after 1.4
            network.unplug("n2")
            first = next(look for look in looks if look)
            assert first == {"n2 (10.77.0.2)": 0.0}
            assert next(look for look in looks if look["n2 (10.77.0.2)"] > 1)
            network.plug("n2")
            assert next(look for look in looks if not look) == {}


def hosts(*others: tuple[str, list[str]]) -> Scripted:
    """The last of some ranks; the others are on hosts with these addresses."""
    return Scripted(len(others), 1 + len(others), lambda value: [*others, value])


def test_what_every_host_has_names_none(monkeypatch: pytest.MonkeyPatch):
    """Two ranks on n2; Docker's bridge has one address everywhere."""
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    monkeypatch.setattr("hvdtrain.comm.silence.own_addresses", lambda: ["10.0.0.1", "172.17.0.1"])
    n2, n3 = ("n2", ["10.0.0.2", "172.17.0.1", "fe80::2"]), ("n3", ["10.0.0.3", "172.17.0.1"])
    assert other_hosts(hosts(n2, n2, n3)) == {"10.0.0.2": "n2", "fe80::2": "n2", "10.0.0.3": "n3"}
    assert other_hosts(hosts()) == {}


def test_loopback_is_no_address():
    assert not any(address.startswith("127.") or address == "::1" for address in own_addresses())


def test_nothing_is_wrong_with_files_that_are_no_connections(tmp_path: Path):
    with open(tmp_path / "file", "w"), open(os.devnull):
        assert Silence({"10.0.0.2": "n2"}).look(0.0) == {}
