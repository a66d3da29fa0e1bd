"""Open MPI's all-reduce can be chosen while it runs, and the choice is the one that was measured to be faster."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from hvdtrain.comm import open_mpi
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.open_mpi import WISH, AllReduce, choose_all_reduce


@pytest.fixture
def mpi(started_mpi: ModuleType) -> Iterator[ModuleType]:
    yield started_mpi
    variable = open_mpi._Variable.find(started_mpi)
    assert variable is not None, "Open MPI does not let its algorithms be chosen"
    variable.write(0)


def is_by_ring(mpi) -> bool:
    """Of a communicator that is made now. In a ring each rank's part is added up from another rank on; by the other
    ways all numbers alike: 1e8 and -1e8 swallow the ones that they are added to.
    """
    comm = mpi.COMM_WORLD.Dup()
    numbers = np.full(1 << 16, [1e8, 1.0, -1e8, 1.0][comm.Get_rank() % 4], dtype=np.float32)
    comm.Allreduce(mpi.IN_PLACE, numbers)
    comm.Free()
    return len(np.unique(numbers)) > 1


def test_the_ring_is_taken_where_it_is_wished(group: HorovodGroup, mpi):
    assert not is_by_ring(mpi)
    assert choose_all_reduce(mpi, {WISH: "ring"}) == AllReduce("ring")
    assert is_by_ring(mpi) == (group.size == 4)


def test_on_one_host_nothing_is_measured(group: HorovodGroup, mpi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_mpi, "_measure", lambda *_: pytest.fail("it was"))
    assert choose_all_reduce(mpi, {}) is None
    assert choose_all_reduce(mpi, {WISH: "default"}) is None
    assert choose_all_reduce(mpi, {WISH: "ring", "OMPI_MCA_coll_tuned_allreduce_algorithm": "3"}) is None  # the user's
    assert not is_by_ring(mpi)


def test_on_several_hosts_both_are(group: HorovodGroup, mpi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_mpi.socket, "gethostname", lambda: f"n{group.rank}")
    found = choose_all_reduce(mpi, {})
    assert (found is None) == (group.size == 1)
    assert group.all_gather_object(found) == [found] * group.size
    if found is not None:
        assert found.ring_ms > 0 and found.default_ms > 0
        assert (found.algorithm == "ring") == (found.ring_ms < 0.9 * found.default_ms)


@pytest.mark.parametrize(("times", "algorithm"), [((0.1, 0.08), "ring"), ((0.1, 0.095), "default")])
def test_the_faster_one_is_taken(
    group: HorovodGroup, mpi, monkeypatch: pytest.MonkeyPatch, times: tuple, algorithm: str
):
    def measure(mpi, variable) -> tuple[float, float]:
        variable.write(4)  # as the true one leaves it
        return times

    monkeypatch.setattr(open_mpi, "_measure", measure)
    assert choose_all_reduce(mpi, {WISH: "measure"}) == AllReduce(algorithm, 1e3 * times[0], 1e3 * times[1])
    assert is_by_ring(mpi) == (algorithm == "ring" and group.size == 4)
