"""Every axis keeps the contract, over all ranks: plain MPI, shared memory, Gloo."""

from collections.abc import Iterator

import pytest
from contract import AxisContract
from mpi4py import MPI

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mpi_axis import MpiAxis


@pytest.fixture(scope="module")
def over_mpi(horovod: HorovodGroup) -> Iterator[Axis]:
    axis = MpiAxis(MPI, MPI.COMM_WORLD.Dup()) if horovod.size > 1 else LocalAxis()
    yield axis
    axis.close()


class TestMpi(AxisContract):
    @pytest.fixture
    def axis(self, over_mpi: Axis) -> Axis:
        return over_mpi
