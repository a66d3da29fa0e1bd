"""A parameter server (Li et al. 2014, OSDI): some ranks keep the parameters, the others train.

    servers=2, 4 ranks
    rank 0, 1    worker    backward [push 0][push 1]                     [pull]   next step
    rank 2       server             [sum  0][sum  1]  [clip, optimizer]  [send]   first half of every bucket
    rank 3       server             [sum  0][sum  1]  [clip, optimizer]  [send]   second half

    servers=0    every rank is both: the optimizer's state is shared as in ZeRO 1, over messages of pairs

All workers push before anybody steps, so it is all-reduce in another order. A server has no rows: it walks through the
same steps with no microbatch, and takes part in evaluations and saves as a replica whose share is empty.

Sent in a step, of n parameters of 4 bytes: a worker n, a server of s n/s to each worker. With few servers these are
what all wait for.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.errors import ConfigError, plural
from hvdtrain.optim.lars import Norms
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.optim.update import Agreed, Gradient, Summed, Update
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Bucket, Buckets, make_runs
from hvdtrain.sync.norms import SpreadNorms
from hvdtrain.sync.server_messages import Pulls, Pushes, Roles
from hvdtrain.sync.shards import Shares, in_one, range_of
from hvdtrain.sync.sums import Sums
from hvdtrain.sync.sync import EXACT, Told

_MIB = 1 << 20


class ParameterServerOptions(Options):
    servers: int = option(
        0,
        "ranks, the last ones, that keep the parameters and take no rows; 0: each rank keeps a part beside its work",
        ge=0,
    )
    bucket_mib: float = option(16.0, "gradients sent together (MiB)", gt=0)

    def workers_of(self, ranks: int) -> int:
        """How many train. Errors: ConfigError where nobody would."""
        if self.servers >= ranks:
            few = f"{ranks - 1} or fewer" if ranks > 1 else "0"
            raise ConfigError(
                f"sync.parameter_server.servers={self.servers} leaves none of {plural(ranks, 'rank')} to train; "
                f"start {self.servers + 1} ranks or more, or set it to {few} (0: each rank keeps a part)"
            )
        return ranks - self.servers


class ParameterServerSync:
    """See ``Sync``, and ``AllReduceSync`` for its arguments: of several ranks, whose replicas are whole."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: ParameterServerOptions,
        uses: Sequence[int] | None = None,
    ):
        trained = [number for number, piece in enumerate(slices) if piece.tensor.requires_grad]
        whole, device = [slices[number] for number in trained], slices[trained[0]].tensor.device
        if device.type != "cpu":
            raise ConfigError(
                f"sync.name=parameter_server has its parameters in the host's memory, not on device={device.type}; "
                "set device=cpu, or sync.name=zero"
            )
        self.drift, self.notes = EXACT, list[str]()
        self._mesh, self._roles = mesh, Roles(mesh.world.size, mesh.servers)
        world = range(mesh.world.size)
        axis = mesh.world.axis([world], device)
        self._runs = make_runs(whole, int(options.bucket_mib * _MIB))
        weights = [in_one(run) for run in self._runs]
        self._sums = Sums(mesh, whole)
        self._parts = PartNorms(mesh.replicas, device, mesh.speaks)
        self._buckets: Buckets | None = None
        if mesh.has_rows:
            copies, of_pass = [computing[n] for n in trained], uses and [uses[n] for n in trained]
            self._buckets = Buckets(whole, copies, self._runs, self._offer, self._after_first_pass, of_pass)
        flats = [] if self._buckets is None else [bucket.flat for bucket in self._buckets.all]
        self._numbers = {} if self._buckets is None else {one: n for n, one in enumerate(self._buckets.all)}
        self._pushes = Pushes(axis, self._roles, self._runs, flats)
        self._pulls = Pulls(axis, self._roles, weights)
        self._unused = torch.zeros(len(whole), dtype=torch.bool)
        self._shares = self._make_shares(whole, weights)
        self.moves: Sequence[Slice] = self._shares.moves
        self.norms: Norms = SpreadNorms(self.moves, mesh.world, self._over_ranks, device)
        self._is_whole = True
        self._summed: Summed | None = None

    def begin(self, passes: int) -> None:
        self._parts.begin()
        self._pushes.begin()
        if self._buckets is not None:
            self._buckets.begin(passes)

    def finish(self, told: Told) -> None:
        used, is_complete = self._unused, True
        if self._buckets is not None:
            self._buckets.send_rest()
            used, is_complete = self._buckets.used, self._buckets.is_complete
        self._pushes.finish()
        self._pulls.post(self._roles.workers)
        totals = self._sums.over_ranks(told, self._parts, used, is_complete)
        self._shares.give_gradients(used, totals.users)
        gradients = [Gradient(summed) for summed in self._pushes.sums]
        self._summed = Summed(gradients, totals.loss, totals.weight, totals.flags, totals.parts, self._over_ranks)

    def step(self, update: Update, lr: float) -> Agreed:
        assert self._summed is not None, "finish comes first"
        agreed = update.divide(self._summed)
        update.apply(lr)
        self._pulls.deliver(self._roles.workers)
        self._is_whole = self._roles.servers < 2
        return agreed

    def settle(self, update: Update) -> None:
        self._make_whole()

    def viewed(self) -> AbstractContextManager[None]:
        self._make_whole()
        return nullcontext()

    def hand_on(self) -> None:
        self._pull(range(self._mesh.world.size))

    def state(self) -> Sequence[Slice]:
        return ()

    def report(self) -> Mapping[str, float]:
        """``sent_mib``: by this rank in a step."""
        sent = self._pushes.sent_bytes + self._pulls.sent_bytes(self._roles.workers)
        return {"servers": self._roles.servers, "sent_mib": round(sent / _MIB, 3)}

    def close(self) -> None:
        if self._buckets is not None:
            self._buckets.close()

    def _make_shares(self, whole: Sequence[Slice], weights: Sequence[torch.Tensor]) -> Shares:
        """What this rank keeps, each with the place of its gradient; of a worker beside servers, nothing."""
        shares, rank = Shares(), self._mesh.world.rank
        for run, flat, summed in zip(self._runs, weights, self._pushes.sums, strict=True):
            shares.add(range_of(run, whole, flat, *self._roles.part(rank, run.length)), summed)
        return shares

    def _make_whole(self) -> None:
        """Servers get one another's parts; the workers have them."""
        if not self._is_whole:
            self._pull(self._roles.keepers)
            self._is_whole = True

    def _pull(self, takers: Sequence[int]) -> None:
        self._pulls.post(takers)
        self._pulls.deliver(takers)

    def _offer(self, bucket: Bucket) -> None:
        self._parts.as_it_leaves(bucket.flat)
        self._pushes.offer(self._numbers[bucket])

    def _after_first_pass(self, bucket: Bucket) -> None:
        self._parts.after_first_pass(bucket.flat)

    def _over_ranks(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._mesh.world.all_reduce_sum(numbers, "hvdtrain.server")
