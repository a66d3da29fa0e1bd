"""Ranks over MPI alone, as data preparation uses them, beside the Horovod group of the other tests."""

from collections.abc import Iterator

import pytest

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mpi import MpiRanks
from hvdtrain.comm.world import World, detect_world
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_USAGE, DataError, LaunchError, RankError


@pytest.fixture
def ranks(group: HorovodGroup) -> Iterator[MpiRanks]:
    ranks = MpiRanks(detect_world())
    yield ranks
    ranks.close()


def test_they_are_the_ranks_of_the_group(group: HorovodGroup, ranks: MpiRanks):
    assert (ranks.rank, ranks.size) == (group.rank, group.size)
    values = ranks.all_gather_object({"rank": ranks.rank, "text": "漢字" * ranks.rank})
    assert values == [{"rank": rank, "text": "漢字" * rank} for rank in range(ranks.size)]


def test_one_that_fails_fails_all_with_its_message(ranks: MpiRanks):
    last = ranks.size - 1

    def work() -> int:
        if ranks.rank == last:
            raise DataError("bad shard")
        return ranks.rank

    with pytest.raises(RankError) as caught:
        ranks.together(work)
    assert str(caught.value) == "DataError: bad shard" + (f" (on rank {last})" if last else "")
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (EXIT_BAD_DATA, True)
    assert ranks.together(lambda: ranks.rank) == ranks.rank  # and they can go on


def test_what_rank_0_does_for_all_is_done_once_and_fails_on_all(ranks: MpiRanks):
    assert ranks.all_gather_object(ranks.on_main(lambda: ranks.rank)) == [0] + [None] * (ranks.size - 1)

    def fail() -> None:
        raise DataError(f"rank {ranks.rank} cannot write")

    with pytest.raises(RankError, match=r"^DataError: rank 0 cannot write$"):
        ranks.on_main(fail)


def test_what_differs_is_named(ranks: MpiRanks):
    ranks.agree({"a": 1}, "the plan")
    if ranks.size > 1:
        with pytest.raises(RankError, match="the plan differs between ranks") as caught:
            ranks.agree({"a": 1, "b": min(ranks.rank, 1)}, "the plan")
        assert caught.value.exit_code == EXIT_USAGE
        assert "'a'" not in str(caught.value)


def test_gloo_brings_no_mpi():
    with pytest.raises(LaunchError, match="start with mpirun or srun --mpi=pmix"):
        MpiRanks(World(0, 2, 0, 2, "horovodrun --gloo"))
