"""The contract of a sync: how replicas agree. It only agrees; what becomes of the sums is ``optim/update.py``'s."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from hvdtrain.optim.lars import Norms
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.slices import Slice


@dataclass(frozen=True)
class Told:
    """What a rank has to tell the others of a step.

    loss: scalar fp64, the sum over its targets; weights: targets of each of its microbatches, whose sum divides the
    loss; flags: what it adds to a sum of integers (see watch/stopping.py). loss_scale: what its gradients were
    multiplied by, alike on all ranks that meet in every step; None: nothing.
    is_shown, is_saved, is_scored: does somebody read this step's numbers, does a checkpoint follow it, an evaluation?
    Alike on all ranks. more: fp64 numbers on the device, as many on all ranks, which become their sums; only of ranks
    that meet in every step. None: on no rank.
    """

    loss: torch.Tensor
    weights: Sequence[int]
    flags: int = 0
    loss_scale: torch.Tensor | None = None
    is_shown: bool = True
    is_saved: bool = True
    is_scored: bool = True
    more: torch.Tensor | None = None


@dataclass(frozen=True)
class Drift:
    """How far a run on several replicas may be from one process. ``bound``: in words, with its conditions."""

    is_exact: bool
    bound: str = ""


EXACT = Drift(True, "fp32 sums in another order")


class Sync(Protocol):
    """How replicas agree. Every method that is not marked *local* is a collective.

    One step:  ``begin(passes)``, a backward for each pass, ``finish(told)``, ``step(update, lr)``.

    drift: from one process. moves: what this rank's optimizer updates: all slices, or a shard of them. norms: of whole
    tensors, for the optimizers that go by them. notes: what the user has to be told of it.
    """

    drift: Drift
    moves: Sequence[Slice]
    norms: Norms
    notes: list[str]

    def begin(self, passes: int) -> None:
        """Empty the gradients. A bucket leaves after ``passes`` gradients of each of its members (local)."""

    def finish(self, told: Told) -> None:
        """This rank's gradients are all there: send what is left, and wait for what the step needs."""

    def step(self, update: Update, lr: float) -> Agreed | None:
        """Move the weights; None where the replicas have not met in this step, and nobody needs to know how it went."""

    def settle(self, update: Update) -> None:
        """ONE model and ONE optimizer state, before a save; training goes on from it, interrupted or not."""

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        """What each rank has of its own, and ``settle`` makes alike: the tensors themselves, by the same names and in
        the same shapes on all ranks. Empty where ranks differ in nothing, and where there is one.

            save of every k steps      settle                    the one state, on any number of ranks
            stop between two saves     own is copied; settle     as many ranks: each goes on from its own
                                                                 others: from the one state, which is said

        So the save of a stop, which the unbroken run does not have, changes nothing of what follows.
        """

    def viewed(self) -> AbstractContextManager[None]:
        """Within: the one model, to be evaluated; afterwards training goes on as if nobody had looked."""

    def hand_on(self) -> None:
        """Give all slices the weights that ``moves`` has, after others than ``step`` have changed these."""

    def state(self) -> Sequence[Slice]:
        """What it keeps from step to step, by names that say nothing of ranks and begin with ``sync.`` (local)."""

    def report(self) -> Mapping[str, float]:
        """What there is to say of it, for the run's record and each line of metrics (local; asks the device).

        ``sent_mib``: by this rank in the last step, headers not counted.
        """

    def close(self) -> None:
        """Let go of the gradients (local)."""
