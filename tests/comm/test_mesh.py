"""The grid of ranks, where every rank has a replica of its own."""

from threads import ThreadGroup, on_ranks

from hvdtrain.comm.mesh import whole_replicas


def test_every_rank_is_a_replica():
    def work(group: ThreadGroup) -> tuple[int, int, list[int]]:
        mesh = whole_replicas(group)
        assert mesh.world is mesh.replica is group
        return mesh.number, mesh.replicas, [mesh.own.size, mesh.tensor.size, mesh.pipe.size]

    assert on_ranks(3, work) == [(rank, 3, [1, 1, 1]) for rank in range(3)]
