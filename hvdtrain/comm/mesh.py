"""The grid in which the ranks of a run stand: who shares a replica, and who holds the same of it.

    mesh.pipeline=2 mesh.tensor=2, 8 ranks
                        replica 0   replica 1
    stage 0, part 0     rank 0      rank 4      <- replica: the same place in every replica; gradients add up here
             part 1     rank 1      rank 5
    stage 1, part 0     rank 2      rank 6
             part 1     rank 3      rank 7
                        own of 0..3             one replica: where a model that is cut talks to itself

    tensor   ranks 0, 1: each has its part of every layer of stage 0     neighbours, so that they share a node
    pipe     ranks 0, 2: each has its stage of part 0

A replica that is whole on its rank has one place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.comm.group import Group
from hvdtrain.errors import ConfigError
from hvdtrain.options import Options, option


class MeshOptions(Options):
    tensor: int = option(1, "ranks over which each layer of a replica is spread, by heads and columns", ge=1)
    pipeline: int = option(1, "ranks that hold a replica's layers, one stage after another", ge=1)

    @property
    def ranks(self) -> int:
        """Of one replica."""
        return self.tensor * self.pipeline

    def replicas_of(self, ranks: int) -> int:
        """How many replicas so many ranks are (local). Errors: ConfigError where they are not whole ones."""
        if ranks % self.ranks:
            below = ranks - ranks % self.ranks
            counts = f"{below} or {below + self.ranks}" if below else f"{self.ranks}"
            raise ConfigError(
                f"mesh.tensor={self.tensor} x mesh.pipeline={self.pipeline} takes {self.ranks} ranks a replica, and "
                f"{ranks} is not a multiple of it; start {counts} ranks, or change mesh.*"
            )
        return ranks // self.ranks


@dataclass(frozen=True)
class Mesh:
    """world: all ranks. replica: the same place in every replica. own: this rank's replica, whose axes are ``tensor``
    (ranks that share each layer) and ``pipe`` (ranks that follow one another); a rank of ``own`` is
    ``pipe.rank * tensor.size + tensor.rank``.

    servers: the last so many ranks keep parameters and take no rows; they stand behind the replicas in ``replica``.
    """

    world: Group
    replica: Group
    own: Axis
    tensor: Axis
    pipe: Axis
    servers: int = 0
    _holders: dict[tuple[frozenset[int], bool], Group] = field(default_factory=dict, repr=False)

    @property
    def number(self) -> int:
        """Which replica this rank is in: batches, and the random numbers of dropout, are this replica's."""
        return self.replica.rank

    @property
    def replicas(self) -> int:
        """How many share the data."""
        return self.replica.size - self.servers

    @property
    def has_rows(self) -> bool:
        """Does this rank train, rather than keep parameters alone?"""
        return self.number < self.replicas

    @property
    def speaks(self) -> bool:
        """Is this the rank that says what all ranks of its replica know alike?"""
        return self.own.rank == 0

    def holders(self, stages: frozenset[int], all_parts: bool = False) -> Group:
        """The ranks whose gradients of a tensor add up, where more than ``replica`` hold it: those of ``stages`` that
        are on this rank's part of the tensor axis, or on all parts; in every replica.

        Collective over the world where it is asked for the first time, in the same order on all ranks; of one stage,
        each rank asks for its own. What a rank gets that is not among them is of no use.
        """
        all_parts, one_stage = all_parts and self.tensor.size > 1, len(stages) == 1
        if one_stage and not all_parts:
            return self.replica
        asked = (frozenset() if one_stage else stages, all_parts)
        if asked not in self._holders:
            rows = grid(self.world.size, self.pipe.size, self.tensor.size)
            together = [[stage] for stage in range(self.pipe.size)] if one_stage else [sorted(stages)]
            parts = range(self.tensor.size)
            sets = [
                sorted(own[stage][part] for own in rows for stage in same for part in which)
                for same in together
                for which in ([parts] if all_parts else [[part] for part in parts])
            ]
            self._holders[asked] = self.world.split(sets)
        return self._holders[asked]


def whole_replicas(world: Group, servers: int = 0) -> Mesh:
    """The mesh in which every rank holds a replica of its own, the last ``servers`` without rows (local)."""
    alone = LocalAxis()
    return Mesh(world, replica=world, own=alone, tensor=alone, pipe=alone, servers=servers)


def make_mesh(
    world: Group, options: MeshOptions, device: torch.device = torch.device("cpu"), servers: int = 0  # noqa: B008
) -> Mesh:  # fmt: skip
    """The mesh that ``options`` ask for, whose axes carry tensors on ``device`` (collective). servers: see ``Mesh``; of
    replicas that are whole.

    Errors: ConfigError where it does not divide the ranks.
    """
    world.together(lambda: options.replicas_of(world.size))
    if options.ranks == 1:
        return whole_replicas(world, servers)
    assert not servers, "the table of combinations refuses it"
    rows = grid(world.size, options.pipeline, options.tensor)
    stages, parts = range(options.pipeline), range(options.tensor)
    replica = world.split([[own[stage][part] for own in rows] for stage in stages for part in parts])
    tensor = world.axis([own[stage] for own in rows for stage in stages], device)
    pipe = world.axis([[own[stage][part] for stage in stages] for own in rows for part in parts], device)
    if 1 in (options.tensor, options.pipeline):
        own = pipe if options.tensor == 1 else tensor
    else:
        own = world.axis([[rank for stage in own for rank in stage] for own in rows], device)
    return Mesh(world, replica, own, tensor, pipe)


def grid(ranks: int, stages: int, parts: int) -> list[list[list[int]]]:
    """[replica][stage][part] -> rank."""
    return [
        [list(range(first + stage * parts, first + (stage + 1) * parts)) for stage in range(stages)]
        for first in range(0, ranks, stages * parts)
    ]


def sum_over_replica(mesh: Mesh) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Sums a number over the ranks of this rank's replica, in place; None where the replica is whole (local)."""
    return None if mesh.own.size == 1 else mesh.own.sum
