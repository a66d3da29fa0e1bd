"""Machines on which Gloo would crash or wait for ever are refused before it starts."""

import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import HVDTRAIN, TRACE, Prepared, launch
from not_here import not_here

from hvdtrain.comm.gloo import check_own_address
from hvdtrain.comm.rendezvous import interface_of
from hvdtrain.comm.world import World
from hvdtrain.errors import EXIT_USAGE, LaunchError

TWO_MACHINES = {"HOROVOD_CROSS_SIZE": "2"}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """``named("n1", "10.0.0.1")``: the machine's name and the address that it has."""

    def name(host: str, address: str) -> None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    return name


def test_this_machine_will_do():
    check_own_address(World(1, 2, 1, 2, "horovodrun --gloo"), {})
    check_own_address(
        World(1, 2, 0, 1, "srun --gloo"), {"HOROVOD_GLOO_IFACE": interface_of("127.0.0.1"), **TWO_MACHINES}
    )


def test_an_address_that_is_another_machines(named):
    """192.0.2.1 is nobody's: documentation has it."""
    named("n1", "192.0.2.1")
    with pytest.raises(LaunchError, match=r"this machine's name, n1, has no address .*: write one into its /etc/hosts"):
        check_own_address(World(0, 2, 0, 1, "srun --gloo"), {})


def test_an_interface_that_is_not_there():
    with pytest.raises(LaunchError, match=r"HOROVOD_GLOO_IFACE=nonet0 has no address on .*: set it to one of .*\blo\b"):
        check_own_address(World(0, 2, 0, 2, "horovodrun --gloo"), {"HOROVOD_GLOO_IFACE": "nonet0"})


def test_a_loopback_address_among_several_machines(named, monkeypatch: pytest.MonkeyPatch):
    """Debian writes ``127.0.1.1 NAME`` into /etc/hosts: one rank aborts with "connection refused", others wait."""
    card = type("Card", (), {"family": socket.AF_INET, "address": "10.77.0.1"})
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"eth7": [card]})
    named("n1", "127.0.1.1")
    env = {"HOROVOD_GLOO_IFACE": "eth7"}
    check_own_address(World(0, 2, 0, 2, "horovodrun --gloo"), env)
    with pytest.raises(LaunchError, match=r"n1, is 127.0.1.1, at which .*: write that of eth7 into its /etc/hosts"):
        check_own_address(World(0, 2, 0, 1, "horovodrun --gloo"), env | TWO_MACHINES)


@pytest.mark.parametrize(("rank", "local_rank", "says"), [(0, 0, False), (1, 1, False), (2, 0, True), (3, 1, False)])
def test_the_first_rank_of_each_machine_speaks(named, capsys, rank: int, local_rank: int, says: bool):
    """Rank 0's own message is printed where all errors are; that of another machine must not be lost."""
    named("n1", "192.0.2.1")
    with pytest.raises(LaunchError):
        check_own_address(World(rank, 4, local_rank, 2, "horovodrun --gloo"), {})
    said = capsys.readouterr().err
    assert bool(re.fullmatch(rf"hvdtrain: \[rank {rank} on n1\] LaunchError: this machine's name, .*\n", said)) == says
    assert bool(said) == says


def test_a_machine_whose_name_has_no_address(prepared: Prepared, tmp_path: Path):
    """A segmentation fault inside hvd.init(), with a backtrace of 15 lines for each rank."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        not_here("a host name of its own takes root and unshare")
    program = ("unshare", "--uts", "sh", "-c", 'hostname nowhere-to-be-found; exec "$@"', "sh", *HVDTRAIN)
    done = launch("train", prepared.recipe, "--run-dir", tmp_path / "run", program=program, how="gloo", ranks=2)
    assert (done.rank_exit_code, len(done.messages), TRACE in done.text) == (EXIT_USAGE, 1, False), done
    assert "this machine's name, nowhere-to-be-found, has no address" in done.messages[0]
    # Of both ranks, where the launcher does not end the other one first.
    assert set(re.findall(r"exit with status code (\d+)", done.stdout)) == {"2"}
    assert not (tmp_path / "run").exists()
