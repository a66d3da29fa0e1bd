"""An asynchronous parameter server (Dean et al. 2012, NIPS): nobody waits for anybody; gradients are of old weights.

    rank 0, 1, 2   worker    its ticket's rows: forward, backward [push] -> [pull] -> next ticket
    rank 3         server    deals tickets, takes each push at once: clip, optimizer (see keeper.py)

A ticket is a part of a step's rows, one for each worker; a push is one update, of 1/n of a batch. Its gradient's norm,
over its own targets, is what is clipped. All meet only where the model is evaluated or saved, or the run stops: then
there is one model, on all ranks. What rank 0 writes down in between is of the pushes that the first server has told it
of.

Servers have no other work: who computes cannot answer others meanwhile.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.comm.ranks import Pending
from hvdtrain.comm.waiting import nap
from hvdtrain.data.tickets import Ticket, Turn
from hvdtrain.errors import RankLostError, WithoutOthersError, plural
from hvdtrain.optim.lars import Norms, whole_norms
from hvdtrain.optim.update import Agreed, Update, each_norm
from hvdtrain.slices import Slice
from hvdtrain.sync.apart import Course
from hvdtrain.sync.async_messages import LEAVE, MEETING, Order, Outbox, Report, halves, message
from hvdtrain.sync.book import Totals
from hvdtrain.sync.buckets import Bucket, Buckets
from hvdtrain.sync.keeper import FirstKeeper, Keeper, OtherKeeper
from hvdtrain.sync.parameter_server import ParameterServerOptions
from hvdtrain.sync.served import MIB, Served
from hvdtrain.sync.server_messages import Pushes
from hvdtrain.sync.sync import Drift, Told


class AsyncServerSync(Served):
    """See ``Sync`` and, for rows, ``Tickets`` in data/tickets.py. Of several ranks, some of which are servers."""

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: ParameterServerOptions,
        uses: Sequence[int] | None,
        course: Course,
    ):
        super().__init__(slices, mesh, options.bucket_mib)
        self.norms: Norms = whole_norms
        workers = mesh.replicas
        self._rate = {"sqrt": math.sqrt(1 / workers), "linear": 1 / workers, "none": 1.0}[options.rate]
        self.drift = Drift(False, f"a gradient is {workers - 1} updates old where {workers} workers are equally fast")
        self.notes = [_note(self._rate, workers, options.rate)] if workers > 1 else []
        self._keeper: Keeper | None = None
        self._worker: Worker | None = None
        self.moves: Sequence[Slice] = ()
        if mesh.has_rows:
            copies, of_pass = [computing[n] for n in self.trained], uses and [uses[n] for n in self.trained]
            self._worker = Worker(self, copies, of_pass, course, options.silence_s)
        else:
            is_first = mesh.world.rank == self.roles.keepers.start
            self._keeper = FirstKeeper(self, options, course.done) if is_first else OtherKeeper(self)
            self.moves = self._keeper.shares.moves
        self._course, self._step = course, course.done
        self._told = Told(torch.zeros(()), ())
        self._totals, self._shown = Totals(), Totals()  # as of the last word, and when it was last told
        self._means = math.nan, math.nan  # loss and norm, when they were last told
        # Saves the run after a step, with so many more targets than this rank was told of, from this rank alone.
        self.save_alone: Callable[[int, float], None] | None = None

    # --- rows ----------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> int:
        return self._keeper.fingerprint if isinstance(self._keeper, FirstKeeper) else 0

    def next_turn(self) -> Turn | None:
        if self._worker is not None:
            return self._worker.next_turn()
        if self._step == self._course.steps:
            return None
        self._step += 1
        return Turn(self._step)

    def took(self, fingerprint: int) -> None:
        assert self._worker is not None, "a server takes no rows"
        self._worker.fingerprint = fingerprint

    # --- steps ---------------------------------------------------------------------------------------------------

    def begin(self, passes: int) -> None:
        if self._worker is not None:
            self._worker.begin(passes)

    def finish(self, told: Told) -> None:
        self._told = told
        if self._worker is not None:
            self._worker.finish(told)

    def step(self, update: Update, lr: float) -> Agreed | None:
        if self._keeper is not None:
            totals = self._keeper.serve(update, lr * self._rate, self._step, self._told)
            if totals is None:
                return None
            self._totals, self.is_whole = totals, self.roles.servers < 2
            if totals.lost:
                self._save_alone()
                return None
            self.pulls.deliver(self.roles.workers)
            return self._agreed(is_met=True)
        assert self._worker is not None
        self._worker.step()
        self._totals = self._worker.totals
        if self._worker.meets:
            return self._agreed(is_met=True)
        is_shown = self._told.is_shown and self.mesh.world.rank == 0
        is_new = self._totals.weight > self._shown.weight
        return self._agreed(is_met=False) if is_shown and is_new and self._worker.has_left_step else None

    def report(self) -> Mapping[str, float]:
        """``sent_mib``: by this rank in a push, or, of a server, in a step. Pushes: all that this job has taken."""
        totals, sent = self._totals, self.pulls.sent_bytes(self.roles.workers)
        if self._worker is not None:
            sent = self._worker.sent_bytes
        return {
            "servers": self.roles.servers,
            "sent_mib": round(sent / MIB, 3),
            "staleness_mean": round(totals.staleness / max(1, totals.pushes), 3),
            "staleness_max": int(totals.most),
            "stale_pushes": int(totals.late),
            "refused_pushes": int(totals.refused),
            "lost_workers": int(totals.lost),
            "rate_factor": round(self._rate, 4),
        }

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def _save_alone(self) -> None:
        """A worker is lost, and no others can be met any more: what all of them would have saved is here."""
        assert isinstance(self._keeper, FirstKeeper) and self.save_alone is not None
        self.save_alone(self._step, float(self._agreed(is_met=False).weight))
        if self._step == self._course.steps or self._totals.flags:
            self._keeper.dismiss(self._step)
            raise WithoutOthersError(_farewell(self._totals, self._step))

    def _agreed(self, is_met: bool) -> Agreed:
        """Of the pushes since this was last asked."""
        since = Totals(*(now - then for now, then in zip(self._totals, self._shown, strict=True)))
        self._shown = self._totals
        taken = since.pushes - since.refused
        if since.weight:
            self._means = since.loss / since.weight, since.norms / taken
        flags = self._totals.flags if is_met else 0.0
        loss, norm, weight, told, unknown = torch.tensor(
            [*self._means, since.weight, flags, math.nan], dtype=torch.float64
        )
        return Agreed(loss, weight, norm, unknown, unknown, unknown, told, is_met=is_met)


class Worker:
    """Its tickets, its pushes and pulls. reached: the step that it has come to; meets: is this turn a meeting?

    silence_s: of the first server, until it is taken for lost.
    """

    def __init__(
        self,
        served: Served,
        copies: Sequence[torch.Tensor],
        uses: Sequence[int] | None,
        course: Course,
        silence_s: float,
    ):
        self._silence_s = silence_s + served.axis.rank  # one speaks first
        self._served, self._axis, self._roles = served, served.axis, served.roles
        self._buckets = Buckets(served.whole, copies, served.runs, self._offer, lambda _: None, uses)
        self._numbers = {bucket: number for number, bucket in enumerate(self._buckets.all)}
        flats = [bucket.flat for bucket in self._buckets.all]
        self._pushes = Pushes(served.axis, served.roles, served.runs, flats)
        self._outbox = Outbox(served.axis)
        self._first_server, self._course = served.roles.keepers.start, course
        self._order = message(Order(0, 0), Totals())
        self._ordered: Pending | None = None
        self._next: Order | None = None
        self._ticket: Ticket | None = None
        self.reached, self.meets, self.totals, self.fingerprint = course.done, False, Totals(), 0

    @property
    def sent_bytes(self) -> int:
        return self._pushes.sent_bytes

    @property
    def has_left_step(self) -> bool:
        """Is what comes next of a later step? Then nobody meets after this one any more."""
        return self._next is not None and self._next.step > self.reached

    def next_turn(self) -> Turn | None:
        if self.reached == self._course.steps and (self.meets or self.reached == self._course.done):
            return None
        if self._next is None:
            self._expect_order()
            self._await_order()
        assert self._next is not None
        self._ticket, self.meets = None, False
        if self._next.step > self.reached + 1:  # none of the rows between was this rank's
            self.reached += 1
            return Turn(self.reached)
        order, self._next = self._next, None
        self.reached = max(self.reached, int(order.step))
        if order.part == LEAVE:
            raise WithoutOthersError(_farewell(self.totals, self.reached))
        if order.part == MEETING:
            self.meets = True
        else:
            self._ticket = Ticket(int(order.step), int(order.part))
        return Turn(self.reached, self._ticket)

    def begin(self, passes: int) -> None:
        if self._ticket is not None:
            self._pushes.begin()
            self._buckets.begin(passes)

    def finish(self, told: Told) -> None:
        """Push, and be ready for what comes back before anybody can send it."""
        if self._ticket is None:
            if self.meets:
                self._served.pulls.post(self._roles.workers)
            return
        self._buckets.send_rest()
        used, flats = self._buckets.used, [bucket.flat for bucket in self._buckets.all]
        square = float(each_norm(flats).square().sum())
        self._served.pulls.post(self._roles.workers)
        self._expect_order()
        report = Report(float(told.loss), sum(told.weights), square, told.flags, *halves(self.fingerprint))
        self._outbox.send(message(report, used), self._first_server)

    def step(self) -> None:
        """Wait for the weights, and for what to do next."""
        self._served.pulls.wait(self._hear)
        if self._ticket is not None:
            self._pushes.finish()
            self._outbox.empty()
            self._await_order()

    def close(self) -> None:
        self._buckets.close()

    def _offer(self, bucket: Bucket) -> None:
        self._pushes.offer(self._numbers[bucket])

    def _expect_order(self) -> None:
        self._ordered = self._axis.receive(self._order, self._first_server)

    def _await_order(self) -> None:
        assert self._ordered is not None
        self._hear(self._ordered)
        self._ordered = None
        head, totals = self._order.split([len(Order._fields), len(Totals._fields)])
        self._next, self.totals = Order(*head.tolist()), Totals(*totals.tolist())

    def _hear(self, pending: Pending) -> None:
        """Wait for a message of a server. Errors: RankLostError."""
        until_s = time.monotonic() + self._silence_s
        while not pending.done():
            if time.monotonic() > until_s:
                raise RankLostError(
                    f"rank {self._first_server}, which keeps the parameters, has not answered for {self._silence_s:g} s"
                )
            nap()
        pending.wait()


def _farewell(totals: Totals, step: int) -> str:
    return f"{plural(int(totals.lost), 'worker')} lost on the way; saved at step {step}, and the same command goes on"


def _note(factor: float, workers: int, rule: str) -> str:
    return (
        f"asynchronous server: a push of one of {workers} workers is 1/{workers} of a batch, so the learning rate is "
        f"multiplied by {factor:.3g} (sync.parameter_server.rate={rule})"
    )
