"""The grid of ranks: who shares a replica, and who holds the same of it."""

from collections.abc import Callable

import pytest
import torch
from threads import ThreadGroup, on_ranks

from hvdtrain.comm.axis import LocalAxis
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import Mesh, MeshOptions, grid, make_mesh, whole_replicas
from hvdtrain.errors import ConfigError, RankError


def on_mesh(ranks: int, work: Callable[[Mesh, ThreadGroup], object], **options: int) -> list:
    return on_ranks(ranks, lambda group: work(make_mesh(group, MeshOptions(**options)), group))


def test_every_rank_is_a_replica():
    def work(group: ThreadGroup) -> tuple[int, int, list[int]]:
        mesh = whole_replicas(group)
        assert mesh.world is mesh.replica is group
        return mesh.number, mesh.replicas, [mesh.own.size, mesh.tensor.size, mesh.pipe.size]

    assert on_ranks(3, work) == [(rank, 3, [1, 1, 1]) for rank in range(3)]


def test_ranks_are_whole_replicas():
    mesh = MeshOptions(tensor=2, pipeline=2)
    assert [mesh.replicas_of(ranks) for ranks in (4, 12)] == [1, 3]
    assert MeshOptions().replicas_of(3) == 3
    for ranks, cure in ((6, "start 4 or 8 ranks, or change mesh"), (3, "start 4 ranks, or")):
        with pytest.raises(ConfigError, match=rf"takes 4 ranks a replica, and {ranks} is not a multiple .*; {cure}"):
            mesh.replicas_of(ranks)


def test_the_grid_is_the_one_of_the_drawing():
    assert grid(8, stages=2, parts=2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_each_rank_knows_its_place_and_its_neighbours():
    """The drawing of comm/mesh.py: whom a rank meets in each direction."""

    def work(mesh: Mesh, group: ThreadGroup) -> tuple:
        everyone = [mesh.replica, mesh.own, mesh.tensor, mesh.pipe]
        return (mesh.number, mesh.pipe.rank, mesh.tensor.rank), *(one.all_gather_object(group.rank) for one in everyone)

    found = on_mesh(8, work, tensor=2, pipeline=2)
    assert found[2] == ((0, 1, 0), [2, 6], [0, 1, 2, 3], [2, 3], [0, 2])
    assert found[5] == ((1, 0, 1), [1, 5], [4, 5, 6, 7], [4, 5], [5, 7])
    places = [place for place, *_ in found]
    assert places == [(number, stage, part) for number in (0, 1) for stage in (0, 1) for part in (0, 1)]


@pytest.mark.parametrize("options", [{"tensor": 4}, {"pipeline": 4}, {"tensor": 2}, {"pipeline": 2}])
def test_one_axis_alone_is_the_whole_replica(options: dict[str, int]):
    def work(mesh: Mesh, group: ThreadGroup) -> None:
        axis, other = (mesh.tensor, mesh.pipe) if "tensor" in options else (mesh.pipe, mesh.tensor)
        assert mesh.own is axis
        assert isinstance(other, LocalAxis)
        assert mesh.own.size == next(iter(options.values()))
        assert mesh.speaks == (group.rank % mesh.own.size == 0)
        assert isinstance(mesh.replica, LocalGroup) == (mesh.own.size == 4)

    on_mesh(4, work, **options)


def test_a_mesh_that_does_not_divide_the_ranks_is_refused_on_all():
    with pytest.raises(RankError, match=r"^ConfigError: mesh.tensor=3 x mesh.pipeline=1 takes 3 ranks .* start 3 or 6"):
        on_mesh(4, lambda mesh, group: None, tensor=3)


def holders(stages: set[int] | None, all_parts: bool) -> Callable[[Mesh, ThreadGroup], list[int] | None]:
    """Who shares a tensor that ``stages`` (None: this rank's own) hold, from this rank; None: it holds none of it."""

    def work(mesh: Mesh, group: ThreadGroup) -> list[int] | None:
        asked = frozenset({mesh.pipe.rank} if stages is None else stages)
        found = mesh.holders(asked, all_parts)
        assert mesh.holders(asked, all_parts) is found  # the second time nobody needs to come along
        if mesh.pipe.rank not in asked:
            return None
        ranks = found.all_gather_object(group.rank)
        summed = found.all_reduce_sum(torch.tensor(1.0), "count").item()
        assert summed == len(ranks)
        return ranks

    return work


def test_holders_of_what_one_stage_has():
    assert on_mesh(8, holders(None, False), tensor=2, pipeline=2) == [[n % 4, n % 4 + 4] for n in range(8)]
    first, second = [0, 1, 4, 5], [2, 3, 6, 7]  # a norm, where the sequence is split over the parts
    assert on_mesh(8, holders(None, True), tensor=2, pipeline=2) == [first, first, second, second] * 2


def test_holders_of_what_several_stages_have():
    """An embedding that is the head too: first and last stage, the same rows of the vocabulary."""
    none = [None, None]
    assert on_mesh(6, holders({0, 2}, False), tensor=2, pipeline=3) == [[0, 4], [1, 5], *none, [0, 4], [1, 5]]
    assert on_mesh(6, holders({0, 2}, False), pipeline=3) == [[0, 2, 3, 5], None, [0, 2, 3, 5]] * 2
    assert on_mesh(4, holders({0, 1}, True), tensor=2, pipeline=2) == [[0, 1, 2, 3]] * 4


def test_a_set_of_all_ranks_is_the_world():
    def work(mesh: Mesh, group: ThreadGroup) -> None:
        assert mesh.holders(frozenset({0, 1})) is group

    on_mesh(4, work, pipeline=2)
