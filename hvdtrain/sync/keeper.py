"""A server that does not wait: it takes each worker's gradient as it comes, and gives the weights back at once.

    worker 0    compute [push]......[pull][order]  compute ...
    worker 1       compute   [push]..........[pull][order]  compute
    first       [deal][deal] [take 0: clip, optimizer][take 1: clip, optimizer]      by its book of tickets
    others                   [take 0                 ][take 1                 ]      in the first server's order

A step is over when as many tickets are finished as it has, whosever and of whatever step they are. Where an evaluation
or a save is due, or somebody asks to stop, no ticket of the next step is dealt, and all meet.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence

import torch

from hvdtrain.comm.ranks import Pending
from hvdtrain.comm.waiting import nap, wait_for
from hvdtrain.errors import RankLostError, say
from hvdtrain.optim.update import Gradient, Summed, Update
from hvdtrain.sync.async_messages import LEAVE, MEETING, Kind, Order, Outbox, Report, Word, message
from hvdtrain.sync.book import Book, Totals
from hvdtrain.sync.parameter_server import ParameterServerOptions
from hvdtrain.sync.served import Served
from hvdtrain.sync.shards import Shares
from hvdtrain.sync.sync import Told


class Desk:
    """What a server has of a worker. room: for this server's part of each run of its gradients; afterwards the weights
    that it gets lie there, so that they stay as they are while others push.
    """

    def __init__(self, worker: int, lengths: Sequence[int], parameters: int):
        self.worker = worker
        self.room = [torch.zeros(length) for length in lengths]
        self.report = message(Report(*[0.0] * len(Report._fields)), torch.zeros(parameters))
        self.arriving: list[Pending] = []
        self.leaving: list[Pending] = []
        self.since_s = 0.0  # since when either is under way (time.monotonic)

    @property
    def has_pushed(self) -> bool:
        return bool(self.arriving) and all(pending.done() for pending in self.arriving)

    @property
    def is_free(self) -> bool:
        """Has the worker no ticket, and all of the weights?"""
        if not self.arriving and all(pending.done() for pending in self.leaving):
            self.settle()
        return not self.arriving and not self.leaving

    def settle(self) -> None:
        """Wait until what is under way has come or gone."""
        for pending in (*self.arriving, *self.leaving):
            wait_for(pending)
        self.arriving, self.leaving = [], []


class Keeper:
    """One of the servers. ``serve``: one step; what is known of the run where all meet afterwards, else None."""

    def __init__(self, served: Served):
        self._served, self._axis = served, served.axis
        parts = served.parts()
        self._mine = [flat[begin:end] for flat, (begin, end) in zip(served.weights, parts, strict=True)]
        self._sums = [torch.zeros_like(part) for part in self._mine]
        self.shares: Shares = served.shares(self._sums)
        lengths = [len(part) for part in self._mine]
        self._desks = {worker: Desk(worker, lengths, len(served.whole)) for worker in served.roles.workers}
        self._outbox = Outbox(served.axis)

    @abstractmethod
    def serve(self, update: Update, lr: float, step: int, told: Told) -> Totals | None: ...

    def _expect(self, desk: Desk) -> None:
        """The worker has a ticket: be ready for its gradients."""
        desk.settle()
        desk.since_s = time.monotonic()
        desk.arriving = [self._axis.receive(room, desk.worker) for room in desk.room if len(room)]

    @torch.no_grad()
    def _take(self, desk: Desk, push: Word, used: torch.Tensor, update: Update, lr: float) -> float:
        """Move the weights by what a worker has pushed, and give it those that come of it. Returns its gradient's norm.

        used: which parameters had a gradient.
        """
        desk.settle()
        norm = 0.0
        if push.factor and push.weight:
            torch._foreach_copy_(self._sums, desk.room)
            self.shares.give_gradients(used, used.double())
            whole = torch.tensor([push.square, push.square], dtype=torch.float64)
            loss, weight, flags = torch.tensor([push.loss, push.weight, 0.0], dtype=torch.float64)
            of_parts = torch.zeros(3, dtype=torch.float64)
            gradients = [Gradient(summed) for summed in self._sums]
            agreed = update.divide(Summed(gradients, loss, weight, flags, of_parts, lambda _: whole))
            torch._foreach_mul_(self._sums, push.factor)
            update.apply(lr)
            norm = float(agreed.grad_norm)
        torch._foreach_copy_(desk.room, self._mine)
        desk.since_s = time.monotonic()
        desk.leaving = [self._axis.send(room, desk.worker) for room in desk.room if len(room)]
        return norm


class FirstKeeper(Keeper):
    """Deals the tickets, and says in which order pushes are taken. steps: that the run has behind it."""

    def __init__(self, served: Served, options: ParameterServerOptions, steps: int):
        super().__init__(served)
        self._options = options
        self.book, self._totals = Book(self._desks, steps), Totals()
        self.fingerprint = 0
        self._flags = dict.fromkeys([*self._desks, self._axis.rank], 0.0)
        self._others = [keeper for keeper in served.roles.keepers if keeper != self._axis.rank]
        self._asks = {other: message([0.0]) for other in self._others}
        self._no_parameter = torch.zeros(len(served.whole))
        self.lost = set[int]()

    def serve(self, update: Update, lr: float, step: int, told: Told) -> Totals | None:
        self._flags[self._axis.rank] = told.flags
        is_due, end = told.is_scored or told.is_saved, step * self.book.parts
        asking = [self._axis.receive(room, other) for other, room in self._asks.items()]
        while self.book.finished < end:
            last = step if is_due or self._is_asked(end) else step + 1
            if not sum([self._look_at(desk, last, update, lr) for desk in self._desks.values()]):
                self._look_for_lost()
                nap()
        for pending in asking:
            wait_for(pending)
        self._flags |= {other: float(room) for other, room in self._asks.items()}
        meets = is_due or self._is_asked(end)
        totals = self._known
        if self.lost:
            return totals if told.is_saved or self._is_asked(end) else None
        self._tell(Word(Kind.OVER, meets), totals=totals)
        if not meets:
            return None
        for desk in self._desks.values():
            assert not desk.arriving, "all tickets of the step are finished"
            desk.settle()
            self._order(desk, Order(step, MEETING))
            self.book.note_pull(desk.worker)
        self._outbox.empty()
        return totals

    @property
    def _known(self) -> Totals:
        return self._totals._replace(flags=sum(self._flags.values()), lost=len(self.lost))

    def dismiss(self, step: int) -> None:
        """Let those who are left leave."""
        for desk in self._desks.values():
            if desk.worker not in self.lost:
                desk.settle()
                self._order(desk, Order(step, LEAVE))
        self._outbox.empty()

    def _is_asked(self, end: int) -> bool:
        """Does somebody ask to stop, and can all meet after the step whose last ticket is ``end``?"""
        return any(self._flags.values()) and self.book.dealt <= end

    def _look_at(self, desk: Desk, last_step: int, update: Update, lr: float) -> bool:
        """Take what it has pushed, and deal it a ticket, where that can be done now. Was there anything?"""
        if desk.has_pushed:
            self._take_push(desk, update, lr)
            return True
        if desk.is_free and (number := self.book.deal(desk.worker, last_step)) is not None:
            self._expect(desk)
            desk.arriving.append(self._axis.receive(desk.report, desk.worker))
            self._order(desk, Order(number // self.book.parts + 1, number % self.book.parts))
            self._tell(Word(Kind.DEALT, desk.worker))
            return True
        return False

    def _take_push(self, desk: Desk, update: Update, lr: float) -> None:
        desk.settle()
        worker, head = desk.worker, len(Report._fields)
        if worker in self.lost:
            self.lost.discard(worker)
            say(f"note: rank {worker} is back")
        report, used = Report(*desk.report[:head].tolist()), desk.report[head:].bool()
        self._flags[worker] = report.flags
        staleness = self.book.staleness(worker)
        factor = self._options.weight_of(staleness, self.book.parts) if self.book.holds(worker) else 0.0
        push = Word(Kind.PUSHED, worker, factor, report.loss, report.weight, report.square)
        self._tell(push, used)
        if factor:
            self.book.finish(worker, is_update=report.weight > 0)
            self.fingerprint = (self.fingerprint + report.fingerprint) % (1 << 64)
        else:
            self.book.take_back(worker)
        norm = self._take(desk, push, used, update, lr)
        self.book.note_pull(worker)
        self._add(report, factor, staleness, norm)

    def _add(self, report: Report, factor: float, staleness: int, norm: float) -> None:
        had = self._totals
        self._totals = Totals(
            had.loss + report.loss * bool(factor),
            had.weight + report.weight * bool(factor),
            had.norms + norm,
            had.pushes + 1,
            had.staleness + staleness,
            max(had.most, staleness),
            had.late + (factor < 1),
            had.refused + (not factor),
        )

    def _look_for_lost(self) -> None:
        """Whoever has had a ticket, or weights on their way, for too long. Errors: RankLostError for rank 0."""
        now_s, limit_s = time.monotonic(), self._options.lost_after_s
        for desk in self._desks.values() if self._options.survive else ():
            is_silent = (desk.arriving or desk.leaving) and now_s - desk.since_s > limit_s
            if not is_silent or desk.worker in self.lost:
                continue
            if not desk.worker:
                raise RankLostError(f"rank 0, which keeps the run folder, has not answered for {limit_s:g} s")
            self.lost.add(desk.worker)
            self.book.take_back(desk.worker)
            say(
                f"note: rank {desk.worker} has not answered for {limit_s:g} s: others get its rows, and "
                "nothing is evaluated as long as it is away"
            )

    def _tell(self, word: Word, used: torch.Tensor | None = None, totals: Totals | None = None) -> None:
        """All other servers."""
        used = self._no_parameter if used is None else used
        for other in self._others:
            self._outbox.send(message(word, used, totals or Totals()), other)

    def _order(self, desk: Desk, order: Order) -> None:
        self._outbox.send(message(order, self._known), desk.worker)


class OtherKeeper(Keeper):
    """Does what the first server says."""

    def __init__(self, served: Served):
        super().__init__(served)
        self._word = message(Word(0, 0), torch.zeros(len(served.whole)), Totals())

    def serve(self, update: Update, lr: float, step: int, told: Told) -> Totals | None:
        self._outbox.send(message([told.flags]), self._served.roles.keepers.start)
        while True:
            # Received one by one: after the last of a step the first server may send weights.
            wait_for(self._axis.receive(self._word, self._served.roles.keepers.start))
            head, used, totals = self._word.split([len(Word._fields), len(self._served.whole), len(Totals._fields)])
            word = Word(*head.tolist())
            if word.kind == Kind.OVER:
                break
            desk = self._desks[int(word.worker)]
            if word.kind == Kind.DEALT:
                self._expect(desk)
            else:
                self._take(desk, word, used.bool(), update, lr)
        self._outbox.empty()
        if not word.worker:
            return None
        for desk in self._desks.values():
            desk.settle()
        return Totals(*totals.tolist())
