"""The grid in which the ranks of a run stand: who shares a replica, and who holds the same of it.

              replica 0   replica 1   replica 2
    place 0   rank 0      rank 2      rank 4      <- replica: the same place in every replica; gradients add up here
    place 1   rank 1      rank 3      rank 5
              own of 0..1                          one replica: where a model that is cut talks to itself

Each axis is a ``Group``, seen from this rank. A replica that is whole on its rank has one place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.local_group import LocalGroup


@dataclass(frozen=True)
class Mesh:
    """world: all ranks. replica: the same place in every replica. own: this rank's replica, whose axes are ``tensor``
    (ranks that share each layer) and ``pipe`` (ranks that follow one another).
    """

    world: Group
    replica: Group
    own: Group
    tensor: Group
    pipe: Group

    @property
    def number(self) -> int:
        """Which replica this rank is in: batches, and the random numbers of dropout, are this replica's."""
        return self.replica.rank

    @property
    def replicas(self) -> int:
        """How many share the data."""
        return self.replica.size


def whole_replicas(world: Group) -> Mesh:
    """The mesh in which every rank holds a replica of its own (local)."""
    alone = LocalGroup()
    return Mesh(world, replica=world, own=alone, tensor=alone, pipe=alone)


def sum_over_replica(mesh: Mesh) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Sums a number over the ranks of this rank's replica, in place; None where the replica is whole (local)."""
    if mesh.own.size == 1:
        return None
    return lambda number: mesh.own.all_reduce_sum(number, "hvdtrain.replica")
