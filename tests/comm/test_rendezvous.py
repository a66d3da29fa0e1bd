"""Gloo without PMI: a rank's variables from Slurm's, and the server at which ranks meet."""

import http.client
import signal
import subprocess
import sys

import psutil
import pytest
from launch import environment

from hvdtrain.comm.rendezvous import address_towards, interface_of, rank_environment
from hvdtrain.errors import EXIT_USAGE, LaunchError

MODULE = (sys.executable, "-m", "hvdtrain.comm.rendezvous")


def _step(rank: int, nodes: str, node: int, local_rank: int, size: int) -> dict[str, str]:
    return {
        "HVDTRAIN_RENDEZVOUS": "127.0.0.1:99", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": nodes,
        "SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank), "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local_rank), "SLURMD_NODENAME": f"n{node + 1}",
    }  # fmt: skip


def test_a_ranks_place_among_all():
    """``2(x2),1``: the only task of the third node is the third of those with local rank 0."""
    found = rank_environment(_step(4, "2(x2),1", 2, 0, 5), "eth7")
    assert found == {
        "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_IFACE": "eth7",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "99", "HOROVOD_HOSTNAME": "n3",
        "HOROVOD_RANK": "4", "HOROVOD_SIZE": "5", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1",
        "HOROVOD_CROSS_RANK": "2", "HOROVOD_CROSS_SIZE": "3",
    }  # fmt: skip
    second = rank_environment(_step(3, "2(x2),1", 1, 1, 5), "eth7")
    assert (second["HOROVOD_CROSS_RANK"], second["HOROVOD_CROSS_SIZE"], second["HOROVOD_LOCAL_SIZE"]) == ("1", "2", "2")


def test_the_interface_is_that_on_the_way_to_the_server():
    env = _step(0, "1(x2)", 0, 0, 2)
    loopback = interface_of("127.0.0.1")
    assert loopback in psutil.net_if_addrs()
    assert rank_environment(env)["HOROVOD_GLOO_IFACE"] == loopback
    assert rank_environment(env | {"HOROVOD_GLOO_IFACE": "ib0"})["HOROVOD_GLOO_IFACE"] == "ib0"
    assert address_towards("127.0.0.1") == address_towards("anywhere", loopback) == "127.0.0.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"HVDTRAIN_RENDEZVOUS": "n1"}, "HVDTRAIN_RENDEZVOUS='n1', expected HOST:PORT"),
        ({"SLURM_PROCID": ""}, "this is no task of a Slurm step"),
        ({"SLURM_NODEID": "2"}, "this is no task of a Slurm step"),
        ({"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE='many'"),
    ],
)
def test_what_is_no_step_is_refused(change: dict[str, str], message: str):
    with pytest.raises(LaunchError) as caught:
        rank_environment(_step(0, "1(x2)", 0, 0, 2) | change)
    assert message in str(caught.value)


def test_an_interface_or_a_way_that_is_not_there():
    with pytest.raises(LaunchError, match=r"HOROVOD_GLOO_IFACE=nonet0 has no IPv4 address here; there are .*"):
        address_towards("127.0.0.1", "nonet0")
    with pytest.raises(LaunchError, match=r"no network interface of .* has 192.0.2.1; name one in HOROVOD_GLOO_IFACE"):
        interface_of("192.0.2.1")


def test_the_server_keeps_what_it_was_told():
    """Also for a rank that comes when the others have met and said goodbye. That ranks do meet: tests/slurm."""
    server = subprocess.Popen([*MODULE, "serve"], stdout=subprocess.PIPE, text=True, env=environment())
    try:
        meet = server.stdout.readline().strip()
        assert meet.startswith("127.0.0.1:")
        connection = http.client.HTTPConnection(meet, timeout=30)
        answers = []
        for method, body in (("GET", None), ("PUT", b"here"), ("DELETE", None), ("GET", None)):
            connection.request(method, "/global/0", body)
            answer = connection.getresponse()
            answers.append((answer.status, answer.read()))
        connection.close()
        assert answers == [(404, b""), (200, b""), (200, b""), (200, b"here")]
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_wrong_words():
    done = subprocess.run([*MODULE, "swerve"], capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stderr.partition(" ")[2][:31]) == (EXIT_USAGE, "usage: python -m hvdtrain.comm.")
    done = subprocess.run([*MODULE, "exec", "true"], capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == EXIT_USAGE and "HVDTRAIN_RENDEZVOUS=''" in done.stderr
