"""How replicas agree. A sync is one file and one line in this table."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.adasum import AdasumSync
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync, needs_of_allreduce
from hvdtrain.sync.apart import ApartOptions, ApartSync, Course
from hvdtrain.sync.async_server import AsyncServerSync
from hvdtrain.sync.average import AverageOptions, AverageSync, needs_of_average
from hvdtrain.sync.gossip import GossipOptions, GossipSync, needs_of_gossip
from hvdtrain.sync.local_sgd import LocalSgdOptions, LocalSgdSync, needs_of_local_sgd
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.parameter_server import ParameterServerOptions, ParameterServerSync, needs_of_parameter_server
from hvdtrain.sync.powersgd import PowerSgdOptions, PowerSgdSync, needs_of_powersgd
from hvdtrain.sync.sign import SignOptions, SignSync, needs_of_sign
from hvdtrain.sync.sync import Sync
from hvdtrain.sync.topk import TopkOptions, TopkSync, needs_of_topk
from hvdtrain.sync.zero import ZeroOptions, ZeroSync, needs_of_zero

SYNCS: dict[str, Any] = {
    "allreduce": AllReduceSync,
    "powersgd": PowerSgdSync,
    "sign": SignSync,
    "topk": TopkSync,
    "zero": ZeroSync,
    "local_sgd": LocalSgdSync,
    "gossip": GossipSync,
    "average": AverageSync,
    "parameter_server": ParameterServerSync,
}

# What each will need, from its options and what a rank trains.
NEEDS: dict[str, Callable[[Any, Trained], Needs]] = {
    "allreduce": needs_of_allreduce,
    "powersgd": needs_of_powersgd,
    "sign": needs_of_sign,
    "topk": needs_of_topk,
    "zero": needs_of_zero,
    "local_sgd": needs_of_local_sgd,
    "gossip": needs_of_gossip,
    "average": needs_of_average,
    "parameter_server": needs_of_parameter_server,
}


class SyncOptions(Options):
    name: Literal[
        "allreduce", "powersgd", "sign", "topk", "zero", "local_sgd", "gossip", "average", "parameter_server"
    ] = option(
        "allreduce",
        "how replicas agree; allreduce: sum gradients every step; powersgd: their factors of a low rank; sign: a "
        "vote on their signs; topk: their largest numbers; zero: as allreduce, and share the optimizer's state; "
        "local_sgd: average weights every H steps; gossip: mix weights with neighbours; average: train apart, and make "
        "one model of all where it is saved; parameter_server: send gradients to ranks that keep the parameters",
    )
    allreduce: AllReduceOptions = AllReduceOptions()
    powersgd: PowerSgdOptions = PowerSgdOptions()
    sign: SignOptions = SignOptions()
    topk: TopkOptions = TopkOptions()
    zero: ZeroOptions = ZeroOptions()
    local_sgd: LocalSgdOptions = LocalSgdOptions()
    gossip: GossipOptions = GossipOptions()
    average: AverageOptions = AverageOptions()
    parameter_server: ParameterServerOptions = ParameterServerOptions()

    @property
    def servers(self) -> int:
        """Ranks that take no rows."""
        return self.parameter_server.servers if self.name == "parameter_server" else 0

    @property
    def deals_rows(self) -> bool:
        """Do ranks get rows as they ask for them, rather than a share of every step?"""
        return self.name == "parameter_server" and self.parameter_server.mode == "asynchronous"

    def workers_of(self, ranks: int) -> int:
        """How many of so many ranks train. Errors: ConfigError where none is left to."""
        return self.parameter_server.workers_of(ranks) if self.servers else ranks


def check_sync(options: SyncOptions, replicas: int, steps: int | None, backend: str | None = None) -> None:
    """Errors: ConfigError where the sync does not fit so many replicas, or a run of so many steps, or what carries the
    gradients (see ``Group.backend``) (local). None: nobody knows yet.
    """
    chosen, found = getattr(options, options.name), options.allreduce.problems(replicas, backend)
    if isinstance(chosen, ApartOptions):
        found += chosen.problems(replicas, steps or sys.maxsize)
    elif isinstance(chosen, ParameterServerOptions):
        found += chosen.problems(replicas)
    if found:
        raise ConfigError("; ".join(found))


def needs_of(options: SyncOptions, trained: Trained) -> Needs:
    """What the sync will need of a rank (local; nothing is made)."""
    if options.name == "zero" and trained.ranks == 1:
        return needs_of_allreduce(_like_zero(options.zero), trained)
    return NEEDS[options.name](getattr(options, options.name), trained)


def notes_on_topology(options: SyncOptions, world: World) -> list[str]:
    """What a user should know of it on these nodes (local)."""
    topology = options.allreduce.topology
    if topology == "flat" or world.local_size < world.size:
        return []
    return [f"sync.allreduce.topology={topology}: all ranks are on one node, where Horovod goes round in one ring"]


def make_sync(
    options: SyncOptions,
    slices: Sequence[Slice],
    computing: Sequence[torch.Tensor],
    mesh: Mesh,
    uses: Sequence[int] | None = None,
    course: Course | None = None,
) -> Sync:
    """The sync of a replica's slices. computing, uses: for each slice what backward gives a gradient, and how many in a
    microbatch (None: one), see ``Replica``. course: of the run (None: it begins). Collective.

    Errors: ConfigError where the options do not fit the mesh.
    """
    if options.name == "zero" and mesh.replicas == 1:
        alone = AllReduceSync(slices, computing, mesh, _like_zero(options.zero), uses)
        alone.notes.append("sync.name=zero: there is one replica, which shares its optimizer's state with nobody")
        return alone
    kind = AsyncServerSync if options.deals_rows else SYNCS[options.name]
    if kind is AllReduceSync and options.allreduce.combine == "adasum":
        kind = AdasumSync
    more = (course or Course(),) if issubclass(kind, (ApartSync, AsyncServerSync)) else ()
    made: Sync = kind(slices, computing, mesh, getattr(options, options.name), uses, *more)
    return made


def _like_zero(options: ZeroOptions) -> AllReduceOptions:
    return AllReduceOptions(bucket_mib=options.bucket_mib, wire=options.wire)
