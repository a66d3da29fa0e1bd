"""The grid of ranks, where every rank has a replica of its own."""

import pytest
from threads import ThreadGroup, on_ranks

from hvdtrain.comm.mesh import MeshOptions, whole_replicas
from hvdtrain.errors import ConfigError


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
        with pytest.raises(ConfigError, match=rf"takes 4 ranks a replica, and {ranks} are not a multiple .*; {cure}"):
            mesh.replicas_of(ranks)
