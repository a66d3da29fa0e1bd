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

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.errors import ConfigError, plural
from hvdtrain.optim.lars import Norms
from hvdtrain.optim.noise_scale import PartNorms
from hvdtrain.optim.update import Agreed, Gradient, Summed, Update
from hvdtrain.options import Options, option
from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Bucket, Buckets
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.norms import SpreadNorms
from hvdtrain.sync.served import Served
from hvdtrain.sync.server_messages import AT_ONCE, Pushes, Roles
from hvdtrain.sync.sums import Sums
from hvdtrain.sync.sync import EXACT, Told
from hvdtrain.sync.traffic import mib

_RECOVERY = "OMPI_MCA_orte_enable_recovery"  # `mpirun --enable-recovery` tells its ranks


class ParameterServerOptions(Options):
    mode: Literal["synchronous", "asynchronous"] = option(
        "synchronous",
        "synchronous: the servers wait for all workers' gradients; asynchronous: they take each as it comes, and rows "
        "are dealt to whoever asks (sync/async_server.py)",
    )
    servers: int = option(
        0,
        "ranks, the last ones, that keep the parameters and take no rows; 0: each rank keeps a part beside its work",
        ge=0,
    )
    bucket_mib: float = option(0.0, "gradients sent together (MiB); 0: 1/32 of them, 2 to 16 MiB", ge=0)
    rate: Literal["sqrt", "linear", "none"] = option(
        "sqrt",
        "asynchronous: factor on the learning rate, as each push is of 1/n of a batch, with n workers; sqrt: the root "
        "of 1/n; linear: 1/n; none: 1",
    )
    max_staleness: int = option(
        0, "asynchronous: updates by others above which a gradient is stale; 0: twice the number of workers", ge=0
    )
    stale: Literal["downweight", "refuse"] = option(
        "downweight",
        "asynchronous: what becomes of a stale gradient; downweight: it is multiplied by max_staleness / staleness; "
        "refuse: it is dropped, and another worker gets its rows",
    )
    survive: bool = option(
        False,
        "asynchronous, one server, mpirun --enable-recovery: where a worker is lost, others get its rows and the run "
        "goes on; the server saves by itself, nothing is evaluated, and the end is exit 75: the same command goes on",
    )
    lost_after_s: float = option(
        60.0,
        "survive: seconds for one ticket until its worker is taken for lost; one that comes back goes on; a server "
        "that is silent three times as long ends the run",
        gt=0,
    )

    def workers_of(self, ranks: int) -> int:
        """How many train. Errors: ConfigError where nobody would."""
        if self.servers >= ranks:
            few = f"{ranks - 1} or fewer" if ranks > 1 else "0"
            raise ConfigError(
                f"sync.parameter_server.servers={self.servers} leaves none of {plural(ranks, 'rank')} to train; "
                f"start {self.servers + 1} ranks or more, or set it to {few} (0: each rank keeps a part)"
            )
        return ranks - self.servers

    def most_stale(self, workers: int) -> int:
        """Updates above which a gradient is stale."""
        return self.max_staleness or 2 * workers

    def weight_of(self, staleness: int, workers: int) -> float:
        """Factor on a gradient; 0: it is not taken."""
        most = self.most_stale(workers)
        if staleness <= most:
            return 1.0
        return 0.0 if self.stale == "refuse" else most / staleness

    @property
    def silence_s(self) -> float:
        """Of a server, until it is taken for lost. A worker may have to wait for others' tickets, one after another."""
        return 3 * self.lost_after_s if self.survive else math.inf

    def problems(self, workers: int) -> list[str]:
        """What does not fit so many workers, or how they were started."""
        found = self._problems_of_survival() if self.survive else []
        if self.mode == "asynchronous" and self.stale == "refuse" and self.most_stale(workers) < workers - 1:
            found.append(
                f"sync.parameter_server.max_staleness={self.max_staleness} would refuse nearly all: {workers} workers "
                f"that are equally fast are {workers - 1} updates apart; set it to {workers - 1} or more"
            )
        return found

    def _problems_of_survival(self) -> list[str]:
        what, found = "sync.parameter_server.survive=true", list[str]()
        if self.mode == "synchronous":
            found.append(f"{what}: synchronous steps need every worker; set sync.parameter_server.mode=asynchronous")
        if self.servers != 1:
            found.append(
                f"{what}: with servers={self.servers}, half of a lost worker's push might be taken; "
                "set sync.parameter_server.servers=1"
            )
        if os.environ.get(_RECOVERY) != "1":
            found.append(f"{what}: this launcher ends all ranks when one dies; start with `mpirun --enable-recovery`")
        return found


def needs_of_parameter_server(options: ParameterServerOptions, trained: Trained) -> Needs:
    n, ranks = trained.count, trained.ranks
    roles, bucket = Roles(ranks, options.servers), trained.bucket(options.bucket_mib)
    part, keepers, workers = -(-n // len(roles.keepers)), len(roles.keepers), len(roles.workers)
    room = 4 * workers * -(-bucket // keepers) * min(AT_ONCE, max(1, -(-n // bucket)))
    if not options.servers:
        return Needs(4 * n + 4 * part, part, buffers=room, sent=8 * (n - part))
    if options.mode == "asynchronous":
        room = 4 * workers * part  # of each worker all that it pushes
    server = Needs(4 * part, part, buffers=room, sent=4 * workers * part)
    return Needs(4 * n, 0, sent=4 * n, server=server)


class ParameterServerSync(Served):
    """See ``Sync``, and ``AllReduceSync`` for its arguments: of several ranks, whose replicas are whole."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: ParameterServerOptions,
        uses: Sequence[int] | None = None,
    ):
        super().__init__(slices, mesh, options.bucket_mib)
        self.drift, self.notes = EXACT, list[str]()
        self._sums = Sums(mesh, self.whole)
        self._parts = PartNorms(mesh.replicas, self.device, mesh.speaks)
        self._buckets: Buckets | None = None
        if mesh.has_rows:
            copies, of_pass = [computing[n] for n in self.trained], uses and [uses[n] for n in self.trained]
            self._buckets = Buckets(self.whole, copies, self.runs, self._offer, self._after_first_pass, of_pass)
        flats = [] if self._buckets is None else [bucket.flat for bucket in self._buckets.all]
        self._numbers = {} if self._buckets is None else {one: n for n, one in enumerate(self._buckets.all)}
        self._pushes = Pushes(self.axis, self.roles, self.runs, flats)
        self._unused = torch.zeros(len(self.whole), dtype=torch.bool)
        self._shares = self.shares(self._pushes.sums)
        self.moves: Sequence[Slice] = self._shares.moves
        self.norms: Norms = SpreadNorms(self.moves, mesh.world, self._over_ranks, self.device)
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
        self.pulls.post(self.roles.workers)
        totals = self._sums.over_ranks(told, self._parts, used, is_complete)
        self._shares.give_gradients(used, totals.users)
        gradients = [Gradient(summed) for summed in self._pushes.sums]
        self._summed = Summed(gradients, totals.loss, totals.weight, totals.flags, totals.parts, self._over_ranks)

    def step(self, update: Update, lr: float) -> Agreed:
        assert self._summed is not None, "finish comes first"
        agreed = update.divide(self._summed)
        update.apply(lr)
        self.pulls.deliver(self.roles.workers)
        self.is_whole = self.roles.servers < 2
        return agreed

    def report(self) -> Mapping[str, float]:
        sent = self._pushes.sent_bytes + self.pulls.sent_bytes(self.roles.workers)
        return {"servers": self.roles.servers, "sent_mib": mib(sent)}

    def close(self) -> None:
        if self._buckets is not None:
            self._buckets.close()

    def _offer(self, bucket: Bucket) -> None:
        self._parts.as_it_leaves(bucket.flat)
        self._pushes.offer(self._numbers[bucket])

    def _after_first_pass(self, bucket: Bucket) -> None:
        self._parts.after_first_pass(bucket.flat)

    def _over_ranks(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.mesh.world.all_reduce_sum(numbers, "hvdtrain.server")
