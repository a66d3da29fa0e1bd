"""HorovodGroup keeps the contract of Group, for any number of ranks; and ranks divide the cores of their nodes."""

import os
import socket

import pytest
import torch
from contract import GroupContract

from hvdtrain.comm.group import Group
from hvdtrain.comm.horovod_group import KNOBS, HorovodGroup
from hvdtrain.machine import cores
from hvdtrain.machine.cores import Topology, take_cores


class TestHorovod(GroupContract):
    """Also under ``horovodrun --gloo``: tests/comm/test_group.py."""


class TestHalf(GroupContract):
    """Of four ranks, each half by itself: process sets, whose ranks are not numbered as in the world."""

    @pytest.fixture
    def group(self, horovod: HorovodGroup) -> Group:
        ranks = range(horovod.size)
        return horovod.split([list(ranks[0::2]), list(ranks[1::2])])


def test_sets_that_are_there_already_are_taken_again(horovod: HorovodGroup):
    """Horovod refuses a set that it has: of all ranks, and one that was made before."""
    assert horovod.split([range(horovod.size)]) is horovod
    first, second = (horovod.split([range(min(2, horovod.size))]) for _ in range(2))
    assert first is second or first.size == 1


def test_a_rank_of_no_set_is_alone(horovod: HorovodGroup):
    part = horovod.split([list(range(horovod.size - 1))])
    assert (part.size, part.rank) == ((1, 0) if horovod.rank == horovod.size - 1 else (horovod.size - 1, horovod.rank))
    total = part.all_reduce_sum(torch.tensor([1.0]), "of.some")
    assert total.item() == part.size


def test_roots_count_within_the_set(horovod: HorovodGroup):
    """Horovod's own are ranks of the world."""
    first, last = 1 if horovod.size > 2 else 0, horovod.size - 1
    part = horovod.split([sorted({first, last})])
    tensor = torch.tensor([horovod.rank])
    part.broadcast(tensor, part.size - 1, "root")
    assert tensor.item() == (last if horovod.rank in (first, last) else horovod.rank)


def test_knobs_are_in_the_environment(group: HorovodGroup):
    """What was set before wins, as conftest.py does; a command's own are in test_library_settings.py."""
    assert {name: os.environ[name] for name in KNOBS} == KNOBS | {"HOROVOD_CYCLE_TIME": "0.2"}


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
