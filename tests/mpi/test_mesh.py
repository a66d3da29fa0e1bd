"""The mesh over Horovod and MPI: each direction reaches the ranks that the drawing of comm/mesh.py says."""

import pytest
import torch

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mesh import MeshOptions, make_mesh


@pytest.mark.parametrize("options", [MeshOptions(tensor=2), MeshOptions(pipeline=2), MeshOptions(tensor=2, pipeline=2)])
def test_each_direction_reaches_its_ranks(horovod: HorovodGroup, options: MeshOptions):
    if horovod.size % options.ranks:
        print(f"{horovod.size} ranks: too few for {options}")
        return
    mesh = make_mesh(horovod, options)
    place, size = horovod.rank % options.ranks, options.ranks
    first, stage, part = horovod.rank - place, *divmod(place, options.tensor)
    own = [first + other for other in range(size)]
    expected = {
        "replica": [place + number * size for number in range(horovod.size // size)],
        "own": own,
        "tensor": own[stage * options.tensor :][: options.tensor],
        "pipe": own[part :: options.tensor],
    }
    for name, ranks in expected.items():
        direction = getattr(mesh, name)
        assert direction.all_gather_object(horovod.rank) == ranks, name
        if name != "replica":
            assert direction.sum(torch.tensor([horovod.rank])).item() == sum(ranks)
    shared = mesh.holders(frozenset(range(options.pipeline)), all_parts=True)
    assert shared.all_gather_object(horovod.rank) == list(range(horovod.size))
    one = mesh.replica.all_reduce_sum(torch.tensor([float(horovod.rank)]), f"mesh.{options}")
    assert one.item() == sum(expected["replica"])
