"""The hosts that other tests run on: apart where hosts are apart, and gone when nobody wants them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import until
from not_here import require_hosts

from hvdtrain.machine.hosts import HUB, Network

NAMES = ("n1", "n2")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    require_hosts()
    with Network(NAMES, tmp_path_factory.mktemp("network")) as network:
        yield network


def runs(pid: int) -> bool:
    """Not of what is dead and only waits for its parent to notice."""
    return os.path.exists(f"/proc/{pid}/exe")


def test_each_has_a_name_an_address_and_files_of_its_own(network: Network):
    for name in NAMES:
        host = network.hosts[name]
        assert host.run("hostname") == f"{name}\n"
        assert network.addresses[name] in host.run("ip", "-brief", "-4", "address", "show", "eth0")
        for folder in ("/tmp", "/dev/shm"):
            host.run("cp", "/etc/hostname", f"{folder}/own-{name}")
            assert host.run("sh", "-c", f"ls {folder}/own-*") == f"{folder}/own-{name}\n"
            assert not os.path.exists(f"{folder}/own-{name}")
        host.run("touch", network.folder / name)
    assert {path.name for path in network.folder.iterdir()} == {*NAMES, "hosts"}


def test_they_reach_one_another_until_a_cable_is_pulled(network: Network):
    """By name, over TCP; and two networks at a time do not see one another, although their addresses are the same."""
    ask = (sys.executable, "-c", "import socket; socket.create_connection(('n2', 999), timeout=1)")
    n1, n2 = (network.hosts[name] for name in NAMES)
    listen = "import socket, time; s = socket.create_server(('', 999)); print(flush=True); time.sleep(60)"
    with subprocess.Popen([*n2.enter(), sys.executable, "-c", listen], stdout=subprocess.PIPE) as listening:
        try:
            assert listening.stdout.readline() == b"\n"
            n1.run(*ask)
            network.unplug("n2")
            with pytest.raises(RuntimeError, match=r"timed out|No route to host"):
                n1.run(*ask)
            network.plug("n2")
            n1.run(*ask)
        finally:
            listening.kill()


def test_all_that_runs_on_a_host_goes_with_it(tmp_path: Path, network: Network):
    with Network(NAMES, tmp_path) as own:
        n2 = own.hosts["n2"]
        # Its parent leaves at once, its session is its own, and it does not listen.
        n2.run("sh", "-c", "trap '' TERM HUP INT; setsid sleep 600 >/dev/null 2>&1 &")
        (pid,) = n2.processes()
        own.power_off("n2")
        assert not runs(pid)
        assert not runs(n2.pid)
        assert "n2" not in own.hub.run("ip", "link")
        assert all(runs(own.hosts[name].pid) for name in (HUB, "n1"))
    assert runs(network.hosts["n2"].pid)


def test_a_killed_test_leaves_nothing(tmp_path: Path, network: Network):
    """No process, and so no namespace, cable or mount: none of them has a name on this machine."""
    names = ["sh", "-c", f"ip -brief link; ip netns; mount | grep {tmp_path}"]
    before = subprocess.run(names, capture_output=True).stdout
    make = (
        "import sys, time\nfrom pathlib import Path\nfrom hvdtrain.machine.hosts import Network\n"
        "with Network(['n1', 'n2'], Path(sys.argv[1])) as own:\n"
        "    own.hosts['n1'].run('sh', '-c', 'setsid sleep 600 >/dev/null 2>&1 &')\n"
        "    found = [host.pid for host in own.hosts.values()] + [*own.hosts['n1'].processes()]\n"
        "    print(*found, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", make, tmp_path], stdout=subprocess.PIPE) as maker:
        pids = [int(word) for word in maker.stdout.readline().split()]
        maker.kill()
    assert len(pids) == 4
    until(lambda: not any(map(runs, pids)), "all that ran there has ended", timeout_s=10)
    assert subprocess.run(names, capture_output=True).stdout == before


def test_where_the_kernel_refuses_that_is_said(network: Network):
    """As in most containers, whose root may not make namespaces."""
    ask = (sys.executable, "-c", "from hvdtrain.machine.hosts import why_no_hosts; print(why_no_hosts())")
    said = subprocess.check_output(["setpriv", "--bounding-set=-all", "--inh-caps=-all", *ask], text=True)
    assert said == "no hosts of their own here: unshare: unshare failed: Operation not permitted\n"
