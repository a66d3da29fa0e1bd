"""Every axis keeps the contract, over all ranks: plain MPI, shared memory, Gloo."""

import os
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from contract import AxisContract

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mpi_axis import MpiAxis
from hvdtrain.comm.shared_axis import SharedAxis
from hvdtrain.comm.torch_axis import TorchAxis, open_store


@pytest.fixture(scope="module")
def over_mpi(horovod: HorovodGroup, started_mpi: ModuleType) -> Iterator[Axis]:
    axis = MpiAxis(started_mpi, started_mpi.COMM_WORLD.Dup()) if horovod.size > 1 else LocalAxis()
    yield axis
    axis.close()


@pytest.fixture(scope="module")
def in_memory(horovod: HorovodGroup, started_mpi: ModuleType) -> Iterator[Axis]:
    """With so little memory that it grows, and that most tensors take several pieces."""
    axis = SharedAxis(started_mpi, started_mpi.COMM_WORLD.Dup(), 512, 4096) if horovod.size > 1 else LocalAxis()
    yield axis
    axis.close()


class TestShared(AxisContract):
    @pytest.fixture
    def axis(self, in_memory: Axis) -> Axis:
        return in_memory


def test_on_one_node_ranks_share_memory_if_there_is_room(horovod: HorovodGroup, monkeypatch: pytest.MonkeyPatch):
    if horovod.size == 1:
        return
    sets = [range(horovod.size)]
    assert (axis := horovod.axis(sets, torch.device("cpu"))).backend == "shared memory"
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    large = torch.ones(2**18)
    assert (axis.sum(large) == axis.size).all()  # larger than its memory, which now cannot grow
    plain = horovod.axis(sets, torch.device("cpu"))
    assert (plain.backend, plain.note) == ("mpi", "/dev/shm has no room for memory that ranks share")


class TestMpi(AxisContract):
    @pytest.fixture
    def axis(self, over_mpi: Axis) -> Axis:
        return over_mpi


@pytest.fixture(scope="module")
def over_gloo(horovod: HorovodGroup) -> Iterator[Axis]:
    if horovod.size == 1:
        yield LocalAxis()
        return
    axis = TorchAxis("gloo", open_store(horovod), horovod.rank, horovod.size, torch.device("cpu"))
    yield axis
    axis.close()


class TestGloo(AxisContract):
    @pytest.fixture
    def axis(self, over_gloo: Axis) -> Axis:
        return over_gloo
