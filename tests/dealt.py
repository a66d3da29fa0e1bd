"""A tiny run whose rows are dealt: the learner of tests/learner.py, with the walk that train.py has for it."""

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from learner import CPU, ROWS, Learner, Recipe
from threads import ThreadGroup, on_ranks

from hvdtrain.comm.group import Group
from hvdtrain.data.batch import AnyBatch
from hvdtrain.data.loader import Step
from hvdtrain.data.sampler import derive
from hvdtrain.data.tickets import TicketLoader
from hvdtrain.optim.update import Agreed
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.apart import Course
from hvdtrain.sync.async_server import AsyncServerSync
from hvdtrain.sync.parameter_server import ParameterServerOptions

BUCKET_MIB = 4e-3


def server(servers: int, **more: Any) -> SyncOptions:
    options = ParameterServerOptions(mode="asynchronous", servers=servers, bucket_mib=BUCKET_MIB, **more)
    return SyncOptions(name="parameter_server", parameter_server=options)


class Rows:
    """A source of the learner's rows. pause_s: what a step of this rank takes longer."""

    rows_per_step, rows_per_epoch, steps_per_block, read_through = ROWS, 10**6, 1, ()

    def __init__(self, learner: Learner, number: int = 0, pause_s: float = 0.0):
        self._learner, self._number, self._pause_s = learner, number, pause_s

    def for_rank(self, rank: int) -> "Rows":
        return Rows(self._learner, rank, self._pause_s)

    def block(self, first_row: int, steps: int, number: int) -> list[Step]:
        step = first_row // ROWS + 1
        return [Step(step, derive(step, self._number), ROWS)]

    def batches(self, content: int, device: torch.device) -> Sequence[AnyBatch]:
        time.sleep(self._pause_s)
        return self._learner.share(content, self._number)


class Dealt(Learner):
    """A learner whose rows are dealt. ``walk`` returns what all ranks were told where they met, by step; told: what
    this one alone was told in between; tickets: how many it had.
    """

    def __init__(
        self,
        group: Group,
        recipe: Recipe,
        steps: int,
        folder: Path | None = None,
        pause_s: float = 0,
        done: int = 0,
    ):
        super().__init__(group, replace(recipe, course=Course(done, steps)), folder)
        self.done = done
        assert isinstance(self.sync, AsyncServerSync)
        self.loader = TicketLoader(Rows(self, pause_s=pause_s), CPU, self.sync)
        self.told: list[tuple[int, Agreed]] = []
        self.tickets = 0

    def walk(self, meetings: Collection[int] = (), asks_at: int = 0, asker: int = 1) -> dict[int, Agreed]:
        met, last, before = {}, self.recipe.course.steps, 0
        for step in self.loader.steps(range(self.done + 1, last + 1)):
            assert step >= before, "whoever gets rows that others left has the steps of others"
            before = step
            self.engine.forward_backward(self.loader.next_step(), self.task, step, self.loader.place)
            self.tickets += self.loader.place is not None
            asks = bool(asks_at) and step >= asks_at and self.mesh.world.rank == asker
            self.engine.finish(int(asks), is_saved=step in meetings or step == last, is_scored=False)
            agreed = self.engine.step(self.recipe.optim.lr, step)
            if agreed is not None and agreed.is_met:
                self.done = step
                self.engine.check(step)  # the replicas, those of servers too, are equal, bit by bit
                met[step] = agreed
                if agreed.flags:
                    break
            elif agreed is not None:
                self.told.append((step, agreed))
        return met

    @property
    def numbers(self) -> dict[str, float]:
        return dict(self.sync.report())


def dealt(ranks: int, steps: int, pauses_s: Sequence[float] = (), **recipe: Any) -> list[Dealt]:
    def work(group: ThreadGroup) -> Dealt:
        pause_s = pauses_s[group.rank] if group.rank < len(pauses_s) else 0.0
        learner = Dealt(group, Recipe(**recipe), steps, pause_s=pause_s)
        learner.walk()
        return learner

    return on_ranks(ranks, work)


def fingerprint(steps: int, parts: int) -> int:
    return sum(derive(step, part) for step in range(1, steps + 1) for part in range(parts)) % (1 << 64)
