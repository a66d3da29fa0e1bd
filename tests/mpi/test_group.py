"""HorovodGroup keeps the contract of Group, for any number of ranks; and ranks divide the cores of their nodes."""

import os
import socket

import pytest
from contract import GroupContract

from hvdtrain.comm.horovod_group import KNOBS, HorovodGroup
from hvdtrain.machine import cores
from hvdtrain.machine.cores import Topology, take_cores


class TestHorovod(GroupContract):
    """Also under ``horovodrun --gloo``: tests/comm/test_group.py."""


def test_knobs_are_in_the_environment(group: HorovodGroup):
    assert {name: os.environ[name] for name in KNOBS} == KNOBS


@pytest.fixture
def cores_of(monkeypatch: pytest.MonkeyPatch):
    """``cores_of(cpus, host)``: what this rank shall believe to run on."""

    def believe(cpus: set[int], host: str = "n0") -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
        monkeypatch.setattr(cores, "read_topology", Topology)  # each hardware thread a core
        monkeypatch.setattr(socket, "gethostname", lambda: host)

    return believe


def test_ranks_of_a_node_share_its_cores(group: HorovodGroup, cores_of):
    cores_of(set(range(16)))
    assert cores.threads_of_rank(group) == 16 // group.size
    cores_of({0})
    assert cores.threads_of_rank(group) == 1  # crowded, but never none


def test_ranks_with_cores_of_their_own_keep_them(group: HorovodGroup, cores_of):
    cores_of(set(range(8 * group.rank, 8 * group.rank + 8)))
    assert cores.threads_of_rank(group) == 8


def test_ranks_of_other_nodes_take_no_cores(group: HorovodGroup, cores_of):
    cores_of(set(range(16)), host=f"n{group.rank // 2}")
    assert cores.threads_of_rank(group) == 16 // min(2, group.size)


def test_omp_num_threads_is_obeyed(group: HorovodGroup, cores_of, monkeypatch: pytest.MonkeyPatch):
    cores_of(set(range(16)))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores.threads_of_rank(group) == 3


def test_each_rank_is_bound_to_cores_of_its_own(group: HorovodGroup, cores_of, monkeypatch: pytest.MonkeyPatch):
    """Two NUMA nodes of four cores; nobody really moves."""
    moved: list[set[int]] = []
    cores_of(set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: moved.append(set(cpus)))
    for name in ("HVDTRAIN_BIND", *cores.PLACED_BY_USER):
        monkeypatch.delenv(name, raising=False)
    found = take_cores(group, topology=Topology(node_of={cpu: cpu // 4 for cpu in range(8)}))
    if group.size == 1:
        assert (found.threads, found.bound_to, moved) == (8, None, [])
        return
    share = 8 // group.size
    own = set(range(share * group.rank, share * (group.rank + 1)))
    assert (found.threads, found.bound_to, moved) == (share, own, [own])
