"""What all parameter servers have in common: weights side by side, a part of them on each server, and how they go out.

weights    [run 0: a | b][run 1: a | b]      every rank has room for all; server a moves the parts a
workers    have all of them, as of their last pull
servers    have their own part; the others' after ``make_whole``
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.errors import ConfigError
from hvdtrain.optim.update import Update
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import make_runs
from hvdtrain.sync.server_messages import Pulls, Roles
from hvdtrain.sync.shards import Shares, in_one, range_of

MIB = 1 << 20


class Served:
    """The part of ``Sync`` that needs no gradient. slices, mesh: see ``AllReduceSync``; collective."""

    def __init__(self, slices: Sequence[Slice], mesh: Mesh, bucket_mib: float):
        self.trained = [number for number, piece in enumerate(slices) if piece.tensor.requires_grad]
        self.whole, self.device = [slices[number] for number in self.trained], slices[self.trained[0]].tensor.device
        if self.device.type != "cpu":
            raise ConfigError(
                "sync.name=parameter_server has its parameters in the host's memory, not on "
                f"device={self.device.type}; set device=cpu, or sync.name=zero"
            )
        self.mesh, self.roles = mesh, Roles(mesh.world.size, mesh.servers)
        self.axis = mesh.world.axis([range(mesh.world.size)], self.device)
        self.runs = make_runs(self.whole, int(bucket_mib * MIB))
        self.weights = [in_one(run) for run in self.runs]
        self.pulls = Pulls(self.axis, self.roles, self.weights)
        self.is_whole = True

    def settle(self, update: Update) -> None:
        self.make_whole()

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        return {}

    def viewed(self) -> AbstractContextManager[None]:
        self.make_whole()
        return nullcontext()

    def hand_on(self) -> None:
        self._pull(range(self.mesh.world.size))

    def state(self) -> Sequence[Slice]:
        return ()

    def make_whole(self) -> None:
        """Servers get one another's parts; the workers have them."""
        if not self.is_whole:
            self._pull(self.roles.keepers)
            self.is_whole = True

    def parts(self) -> list[tuple[int, int]]:
        """Where this rank's part of each run begins and ends; of a worker beside servers, nowhere."""
        return [self.roles.part(self.mesh.world.rank, run.length) for run in self.runs]

    def shares(self, sums: Sequence[torch.Tensor]) -> Shares:
        """What this rank keeps, each with the place of its gradient in ``sums``: of its part of each run."""
        shares = Shares()
        for run, flat, (begin, end), summed in zip(self.runs, self.weights, self.parts(), sums, strict=True):
            shares.add(range_of(run, self.whole, flat, begin, end), summed)
        return shares

    def _pull(self, takers: Sequence[int]) -> None:
        self.pulls.post(takers)
        self.pulls.deliver(takers)
