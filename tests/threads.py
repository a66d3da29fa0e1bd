"""Ranks without a launcher: threads of this process that keep the whole contract of ``Group`` and ``Axis``; and one
rank alone.

on_ranks(3, work)              ``work(group)`` on three ranks at once; what each returned
in_process(2, patience_s=0)    the groups of two ranks, driven by one thread: who would have to wait fails at once
LateGroup()                    a group of one whose sums come late, as on a network
Scripted(rank=1, size=4)       rank 1 of four of which no other exists
"""

import inspect
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce, wraps
from typing import Any, TypeVar

import torch

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.comm.group import Group, Sets, set_of
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.ranks import Pending
from hvdtrain.errors import RankLostError

torch.set_num_threads(1)  # a rank is a thread already

T = TypeVar("T")
PATIENCE_S = 60.0  # of a rank that waits for the others


def on_ranks(size: int, work: Callable[["ThreadGroup"], T]) -> list[T]:
    """``work(group)`` on each of ``size`` ranks at once: what they returned, in rank order.

    Where a rank fails or returns, those that still wait for it get a RankLostError. The first error is raised here,
    with its rank as a note. A tensor that a rank has sent and not waited for is an AssertionError.
    """
    groups = in_process(size)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def live(group: ThreadGroup) -> None:
        why = "has returned"
        torch.set_num_threads(1)  # another test may have set the process's; and MKL has its own for each thread
        try:
            results[group.rank] = work(group)
            left = group.left()
            assert not left, f"never waited for {', '.join(left)}"
        except BaseException as error:
            error.add_note(f"on rank {group.rank} of {size}")
            failures.append(error)
            why = f"has failed ({type(error).__name__}: {error})"
        group.leave(why)

    threads = [threading.Thread(target=live, args=(group,), name=f"rank-{group.rank}") for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whether torch compiles is a switch of the process. Ranks turn it off for a while (cut/compiling.py), one after the
    # other, and turn it on again in the same order; but what the second one found was off.
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("default")
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(size)]


def in_process(size: int, patience_s: float = PATIENCE_S) -> list["ThreadGroup"]:
    """The groups of ``size`` ranks, seen from each of them, for whoever drives them."""
    meeting = _Meeting(size, patience_s)
    return [ThreadGroup(meeting, rank) for rank in range(size)]


def on_every_rank(contract: type) -> type:
    """Each test of a class of tests/contract.py runs on several threads at once: its fixture ``group`` or ``axis`` says
    on how many; ``part_of``, where the class has it, makes of the group of all what is tested, or None on a rank that
    has nothing to do.
    """
    part_of = getattr(contract, "part_of", lambda group: group)

    def several(test: Callable) -> Callable:
        name = next(name for name in ("group", "axis") if name in inspect.signature(test).parameters)

        @wraps(test)
        def run(self: Any, **given: Any) -> None:
            def live(group: ThreadGroup) -> None:
                if (part := part_of(group)) is not None:
                    test(self, **{name: part}, **given)

            on_ranks(given.pop(name), live)

        return run

    for name in dir(contract):
        if name.startswith("test_"):
            setattr(contract, name, several(getattr(contract, name)))
    return contract


class JobEnded(BaseException):
    """What ``abort`` raises on all ranks, in place of the end of their processes."""

    def __init__(self, rank: int, exit_code: int):
        super().__init__(f"rank {rank} has ended the job with exit code {exit_code}")
        self.rank, self.exit_code = rank, exit_code


class ThreadGroup(Group):
    """One of several ranks in this process.

    It is stricter than a network: from the start to ``wait`` a tensor that will hold a result is spoilt (NaN, or the
    least integer), what was sent must not change, and no name is started twice.

    sent: the names of tensors that were started, in the order in which they left; copied: those of ``broadcast``.
    under_way: what was sent and not waited for yet. meetings: how often objects were exchanged.
    """

    backend = "threads"

    def __init__(self, meeting: "_Meeting", rank: int):
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.sent: list[str] = []
        self.copied: list[str] = []
        self.under_way: dict[str, torch.Tensor] = {}
        self.meetings = 0
        self._parts: list[ThreadGroup | ThreadAxis] = []
        self._turns: Counter[str] = Counter()

    def all_gather_object(self, value: Any) -> list[Any]:
        self.meetings += 1
        # Pickled, as between processes: nobody gets an object that another rank goes on to change.
        turn = self._post("objects", "exchange of objects", pickle.dumps(value))
        return [pickle.loads(one) for one in self._meeting.collect(turn, self.rank)]

    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        kind = f"sum of {_shape(tensor)}"
        self.sent.append(name)
        return self._start(name, kind, tensor, tensor, lambda sent: reduce(torch.add, sent))

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        assert tensor.dtype == torch.float32 and self.size & (self.size - 1) == 0
        self.sent.append(name)
        return self._start(name, f"Adasum of {_shape(tensor)}", tensor, tensor, adasum)

    def all_to_all_async(self, rows: torch.Tensor, received: torch.Tensor, name: str) -> Pending:
        assert rows.shape == received.shape and len(rows) == self.size, (rows.shape, received.shape)
        assert rows.dtype == received.dtype == torch.int32
        kind = f"all-to-all of {_shape(rows)}"
        self.sent.append(name)
        return self._start(name, kind, rows, received, lambda sent: torch.stack([one[self.rank] for one in sent]))

    def all_gather_async(self, row: torch.Tensor, rows: torch.Tensor, name: str) -> Pending:
        assert rows.shape == (self.size, *row.shape[1:]) and len(row) == 1, (row.shape, rows.shape)
        assert row.dtype == rows.dtype == torch.int32
        self.sent.append(name)
        return self._start(name, f"all-gather of {_shape(row)}", row, rows, torch.cat)

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        kind = f"copy of {_shape(tensor)} from rank {root}"
        self.copied.append(name)
        self._start(name, kind, tensor, tensor, lambda sent: sent[root]).wait()

    def split(self, sets: Sets) -> Group:
        meeting, rank = self._part("split", sets)
        if meeting is self._meeting:
            return self
        if meeting.size == 1:
            return LocalGroup()
        group = ThreadGroup(meeting, rank)
        self._parts.append(group)
        return group

    def axis(self, sets: Sets, device: torch.device) -> Axis:
        meeting, rank = self._part("axis", sets)
        if meeting.size == 1:
            return LocalAxis()
        axis = ThreadAxis(meeting, rank)
        self._parts.append(axis)
        return axis

    def _part(self, what: str, sets: Sets) -> tuple["_Meeting", int]:
        """Where the ranks of this rank's set meet, and its rank there."""
        own = set_of(self.rank, sets)
        turn = self._post(what, f"{what} of {[list(one) for one in sets]}", None)
        self._meeting.collect(turn, self.rank)
        if what == "split" and len(own) == self.size:
            return self._meeting, self.rank
        return self._meeting.part(turn, own), own.index(self.rank)

    def left(self) -> list[str]:
        """What was started and never waited for (local)."""
        return [*self.under_way, *(name for part in self._parts for name in part.under_way)]

    def close(self) -> None:
        left = self.left()
        assert not left, f"closed before {', '.join(left)} was waited for"
        self.barrier()
        self.leave("has closed its group")

    def abort(self, exit_code: int) -> None:
        self._meeting.end(JobEnded(self.rank, exit_code))

    def leave(self, why: str) -> None:
        """From now on this rank comes to nothing (local)."""
        self._meeting.leave(self.rank, why)

    def _start(
        self,
        name: str,
        kind: str,
        sent: torch.Tensor,
        result: torch.Tensor,
        combine: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    ) -> Pending:
        assert sent.is_contiguous() and result.is_contiguous()
        assert name not in self.under_way, f"{name} is under way already"
        values = self.under_way[name] = sent.detach().clone()
        turn = self._post(name, kind, values)
        _spoil(result)
        return _PendingTensor(self, name, turn, sent, result, combine)

    def _post(self, name: str, kind: str, value: Any) -> tuple[str, int]:
        self._turns[name] += 1
        turn = (name, self._turns[name])
        self._meeting.post(turn, self.rank, kind, value)
        return turn


class ThreadAxis(Axis):
    """The axis of some of the threads; stricter than a network: a send ends when its receive was posted, what will be
    received is spoilt, and what was sent must not change.

    calls: the collectives, in their order, as words. under_way: messages that were not waited for yet.
    """

    backend = "threads"

    def __init__(self, meeting: "_Meeting", rank: int):
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.calls: list[str] = []
        self.under_way: dict[str, torch.Tensor] = {}
        self._messages: Counter[str] = Counter()

    def all_gather_object(self, value: Any) -> list[Any]:
        return [pickle.loads(one) for one in self._meet("exchange of objects", pickle.dumps(value))]

    @torch.no_grad()
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(_sum(self._exchange(f"sum of {_shape(tensor)}", tensor)))

    @torch.no_grad()
    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self._exchange(f"gather of {_shape(part)} along {dim}", part), dim)

    @torch.no_grad()
    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert tensor.shape[dim] % self.size == 0, f"{_shape(tensor)} has no {self.size} equal parts along {dim}"
        summed = _sum(self._exchange(f"scatter_sum of {_shape(tensor)} along {dim}", tensor))
        return summed.chunk(self.size, dim)[self.rank].contiguous()

    @torch.no_grad()
    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        return tensor.copy_(self._exchange(f"copy of {_shape(tensor)} from rank {root}", tensor)[root])

    def send(self, tensor: torch.Tensor, to: int) -> Pending:
        return self._message("send", self.rank, to, tensor)

    def receive(self, tensor: torch.Tensor, source: int) -> Pending:
        return self._message("receive", source, self.rank, tensor)

    def close(self) -> None:
        pass

    def _message(self, what: str, source: int, to: int, tensor: torch.Tensor) -> Pending:
        assert tensor.is_contiguous() and source != to
        name = f"message from rank {source} to {to}"
        self._messages[name] += 1
        turn = (name, self._messages[name])
        values = self.under_way[f"{what} {turn[1]}, {name}"] = tensor.detach().clone()
        self._meeting.post(turn, self.rank, _shape(tensor), values if what == "send" else None, {source, to})
        if what == "receive":
            _spoil(tensor)
        return _PendingMessage(self, what, turn, tensor)

    def _exchange(self, call: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        assert tensor.is_contiguous()
        return self._meet(call, tensor.detach().clone())

    def _meet(self, call: str, value: Any) -> list[Any]:
        self.calls.append(call)
        turn = ("axis", len(self.calls))
        self._meeting.post(turn, self.rank, call, value)
        return self._meeting.collect(turn, self.rank)


@dataclass
class _PendingMessage:
    axis: ThreadAxis
    what: str
    turn: tuple[str, int]
    tensor: torch.Tensor
    has_waited: bool = False

    def done(self) -> bool:
        return self.has_waited or self.axis._meeting.is_complete(self.turn)

    @torch.no_grad()
    def wait(self) -> None:
        if self.has_waited:
            return
        values = self.axis._meeting.collect(self.turn, self.axis.rank)
        mine = self.axis.under_way.pop(f"{self.what} {self.turn[1]}, {self.turn[0]}")
        if self.what == "send":
            assert torch.equal(self.tensor, mine), f"{self.turn[0]} was written to while it was under way"
        else:
            self.tensor.copy_(next(value for value in values if value is not None))
        self.has_waited = True


def adasum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of 2^n tensors, by the formula (2006.02924, equation 4), in fp64."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    a, b = (adasum([part.double() for part in of_half]) for of_half in (parts[:half], parts[half:]))
    dot = (a * b).sum()
    both = [(1 - dot / (2 * square)) * one if (square := one.square().sum()) > 0 else one for one in (a, b)]
    return (both[0] + both[1]).to(parts[0].dtype)


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """In the order of the ranks; 16-bit floats in fp32, rounded once."""
    if parts[0].is_floating_point() and parts[0].itemsize == 2:
        return reduce(torch.add, [part.float() for part in parts]).to(parts[0].dtype)
    return reduce(torch.add, parts)


class LateGroup(ThreadGroup):
    """A group of one, whose tensors nevertheless hold their results only when they are waited for."""

    def __init__(self) -> None:
        super().__init__(_Meeting(1, PATIENCE_S), 0)


@dataclass
class _PendingTensor:
    group: ThreadGroup
    name: str
    turn: tuple[str, int]
    sent: torch.Tensor
    result: torch.Tensor
    combine: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    has_waited: bool = False

    def done(self) -> bool:
        return self.has_waited or self.group._meeting.is_complete(self.turn)

    @torch.no_grad()
    def wait(self) -> None:
        if self.has_waited:
            return
        all_sent = self.group._meeting.collect(self.turn, self.group.rank)
        mine = self.group.under_way.pop(self.name)
        if self.sent is not self.result:
            assert torch.equal(self.sent, mine), f"{self.name} was written to while it was under way"
        self.result.copy_(self.combine(all_sent))
        self.has_waited = True


@dataclass
class _Exchange:
    """What the ranks have sent of one collective, and who has not fetched it yet."""

    ranks: frozenset[int]
    to_fetch: set[int]
    kinds: dict[int, str] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)

    def absent(self) -> list[int]:
        return sorted(self.ranks - set(self.values))


class _Meeting:
    """Where the ranks leave what they send, by the collective's name and how often it came before."""

    def __init__(self, size: int, patience_s: float):
        self.size, self._patience_s = size, patience_s
        self._changed = threading.Condition()
        self._exchanges: dict[tuple[str, int], _Exchange] = {}
        self._gone: dict[int, str] = {}
        self._end: JobEnded | None = None
        self._parts: dict[tuple[str, int, tuple[int, ...]], _Meeting] = {}

    def part(self, turn: tuple[str, int], ranks: Sequence[int]) -> "_Meeting":
        """Where ``ranks`` meet, which have all asked for it at the same turn."""
        with self._changed:
            return self._parts.setdefault((*turn, tuple(ranks)), _Meeting(len(ranks), self._patience_s))

    def post(
        self, turn: tuple[str, int], rank: int, kind: str, value: Any, ranks: Collection[int] | None = None
    ) -> None:
        """ranks: who takes part; None: all."""
        with self._changed:
            self._check_it_runs()
            assert rank not in self._gone, f"rank {rank} {self._gone[rank]}"
            everyone = frozenset(ranks or range(self.size))
            exchange = self._exchanges.setdefault(turn, _Exchange(everyone, set(everyone)))
            exchange.kinds[rank], exchange.values[rank] = kind, value
            self._changed.notify_all()

    def is_complete(self, turn: tuple[str, int]) -> bool:
        """Would ``collect`` return, or fail, at once? Who asks in a loop shall not do so for ever."""
        with self._changed:
            absent = self._exchanges[turn].absent()
            return not absent or self._end is not None or any(one in self._gone for one in absent)

    def collect(self, turn: tuple[str, int], rank: int) -> list[Any]:
        """What each rank has sent, as soon as all have.

        Errors: RankLostError where one has left instead, or does not come in time; AssertionError where they do not
        mean the same.
        """
        with self._changed:
            exchange, (name, _) = self._exchanges[turn], turn

            def is_decided() -> bool:
                absent = exchange.absent()
                return self._end is not None or not absent or any(one in self._gone for one in absent)

            self._changed.wait_for(is_decided, self._patience_s)
            self._check_it_runs()
            if late := exchange.absent():
                first = next((one for one in late if one in self._gone), late[0])
                why = self._gone.get(first, f"has not come within {self._patience_s:g} s")
                raise RankLostError(f"rank {rank} waits for {name}, but rank {first} {why}")
            exchange.to_fetch.remove(rank)
            if not exchange.to_fetch:
                del self._exchanges[turn]
        first = min(exchange.ranks)
        for other, kind in exchange.kinds.items():
            theirs = exchange.kinds[first]
            assert kind == theirs, f"{name}: rank {first} has a {theirs}, rank {other} a {kind}"
        return [exchange.values[one] for one in sorted(exchange.ranks)]

    def leave(self, rank: int, why: str) -> None:
        with self._changed:
            self._gone.setdefault(rank, why)
            self._changed.notify_all()
            parts = dict(self._parts)
        for (_, _, ranks), part in parts.items():
            if rank in ranks:
                part.leave(ranks.index(rank), why)

    def end(self, end: JobEnded) -> None:
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()
            parts = list(self._parts.values())
        for part in parts:
            with suppress(JobEnded):
                part.end(end)
        self._check_it_runs()

    def _check_it_runs(self) -> None:
        if self._end is not None:
            raise JobEnded(self._end.rank, self._end.exit_code)


def _shape(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@torch.no_grad()
def _spoil(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(tensor.dtype == torch.bool or torch.iinfo(tensor.dtype).min)


class Scripted(LocalGroup):
    """One rank of several of which no other exists: for what asks only how many there are, what the others say, or how
    this one shall end.

    answer: all ranks' values, given this one's; without it, no exchange is expected of a group of several.
    did: ``barrier``, ``close`` and the exit code of ``abort``, in their order.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, answer: Callable[[Any], list[Any]] | None = None, backend: str = "none"
    ):
        self.rank, self.size, self.backend, self._answer = rank, size, backend, answer
        self.did: list[str | int] = []

    def all_gather_object(self, value: Any) -> list[Any]:
        if self._answer is not None:
            return self._answer(value)
        assert self.size == 1, "nobody has said what the other ranks answer"
        return [value]

    def barrier(self) -> None:
        self.did.append("barrier")

    def close(self) -> None:
        self.did.append("close")

    def abort(self, exit_code: int) -> None:
        self.did.append(exit_code)
