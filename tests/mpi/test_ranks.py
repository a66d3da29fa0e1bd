"""Ranks over MPI alone, as data preparation uses them, beside the Horovod group of the other tests."""

from collections.abc import Iterator

import pytest
from contract import RanksContract

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mpi import MpiRanks
from hvdtrain.comm.world import World, detect_world
from hvdtrain.errors import LaunchError


class TestMpi(RanksContract):
    @pytest.fixture
    def group(self, group: HorovodGroup) -> Iterator[MpiRanks]:
        """Beside Horovod's, whose MPI has begun before."""
        ranks = MpiRanks(detect_world())
        assert (ranks.rank, ranks.size) == (group.rank, group.size)
        yield ranks
        ranks.close()


def test_gloo_brings_no_mpi():
    with pytest.raises(LaunchError, match="start with mpirun or srun --mpi=pmix"):
        MpiRanks(World(0, 2, 0, 2, "horovodrun --gloo"))
