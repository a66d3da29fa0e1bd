"""Local SGD: each replica takes H steps by itself, then all take the mean of their weights (Stich 2019, 1805.09767).

step        1   2   3   4 | 5   6   7   8 | 9          every = 4
replica 0   .   .   .   . | .   .   .   . | .
replica 1   .   .   .   . | .   .   .   . | .
                        mean            mean           and ``outer`` makes of it where they go on from

Post-local SGD (Lin et al. 2018, 1808.07217): gradients are summed in every step, as by ``allreduce``, until
``after_steps``.

With x where the round began and d = x - mean, the way that the replicas have gone in it:

    none       x <- mean
    slowmo     v <- m v lr / lr_before + d    x <- x - outer_lr v            Wang et al. 2019, 1910.00643 (u is v / lr)
    nesterov   v <- m v + d                   x <- x - outer_lr (d + m v)    DiLoCo, Douillard et al. 2023, 2311.08105

H may fall with the loss F, from ``every`` on (AdaComm, Wang and Joshi 2018, 1810.08313): H = every sqrt(F / F1), F1
that of the first round: far from the end replicas may go further apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import model_validator

from hvdtrain.comm.mesh import Mesh
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.options import option
from hvdtrain.slices import Slice, whole_slice
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.sync.apart import ApartOptions, ApartSync, Course, needs_apart
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.sync import Drift
from hvdtrain.sync.traffic import of_all_reduce

# Of each outer step (learning rate, momentum), where a recipe says nothing: the papers'.
_OUTER = {"none": (1.0, 0.0), "slowmo": (1.0, 0.7), "nesterov": (0.7, 0.9)}


class LocalSgdOptions(ApartOptions):
    every: int = option(8, "steps that a replica takes by itself between two means of the weights (H)", ge=1)
    adaptive: bool = option(False, "H falls from sync.local_sgd.every on, as the root of the loss")
    after_steps: int = option(0, "steps in which gradients are summed first (post-local SGD)", ge=0)
    after_share: float = option(0.0, "the same as a share of the run", ge=0, lt=1)
    outer: Literal["none", "slowmo", "nesterov"] = option(
        "none", "what is made of the mean; none: it is taken; slowmo: slow momentum; nesterov: DiLoCo's outer step"
    )
    outer_lr: float = option(0.0, "learning rate of the outer step; 0: the papers' (slowmo 1, nesterov 0.7)", ge=0)
    outer_momentum: float = option(0.0, "its momentum; 0: the papers' (slowmo 0.7, nesterov 0.9)", ge=0, lt=1)
    optimizer: Literal["averaged", "kept", "reset"] = option(
        "averaged",
        "what becomes of the optimizer's state where weights are averaged; averaged: it is too; kept: each replica has "
        "its own, which is not sent; reset: it begins anew",
    )

    @model_validator(mode="after")
    def _one_beginning(self) -> "LocalSgdOptions":
        if self.after_steps and self.after_share:
            raise ValueError("give after_steps or after_share, not both")
        return self

    def begins_after(self, steps: int) -> int:
        """The last step of ``steps`` in which gradients are summed."""
        return self.after_steps or round(self.after_share * steps)

    def problems(self, replicas: int, steps: int) -> list[str]:
        first = self.begins_after(steps)
        if first and first >= steps:
            return [f"sync.local_sgd.after_steps={first} leaves no local step in a run of {steps}; lower it"]
        if self.every > steps - first:
            local = f"the {steps - first} local steps of this run" if first else f"the run, {steps} steps"
            return [f"sync.local_sgd.every={self.every} is longer than {local}; set it to {steps - first} or less"]
        return []


def needs_of_local_sgd(options: LocalSgdOptions, trained: Trained) -> Needs:
    """sent: where H falls, at least."""
    first, weights = options.begins_after(trained.steps), 4 * trained.count
    averaged = weights + (trained.state_bytes if options.optimizer == "averaged" else 0)
    numbers = (first * weights + (trained.steps - first) / options.every * averaged) / max(1, trained.steps)
    kept = 2 * weights if options.outer != "none" else 0
    return needs_apart(trained, kept=kept, sent=of_all_reduce(numbers, trained.ranks))


class LocalSgdSync(ApartSync):
    """See ``Sync`` and ``ApartSync``.

    A save within a round puts the mean of the weights in place of each replica's own, and the round goes on from there;
    at a round's end it changes nothing but an optimizer's state that is ``kept``. A run that is asked to stop does so
    at a round's end or at a save.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: LocalSgdOptions,
        uses: Sequence[int] | None,
        course: Course,
    ):
        super().__init__(slices, computing, mesh, uses, course)
        self._options = options
        self._begins_after = options.begins_after(course.steps)
        lr, momentum = _OUTER[options.outer]
        self._lr, self._momentum = options.outer_lr or lr, options.outer_momentum or momentum
        self.drift = Drift(False, _drift(options))
        # Steps since the round began, H, the loss of the first round, the rate of the last one (0: there was none).
        self._round = torch.tensor([0, options.every, 0, 0], dtype=torch.float64)
        self._has_outer = options.outer != "none"
        self._began = [weight.clone() for weight in self._weights] if self._has_outer else []
        self._momenta = [torch.zeros_like(weight) for weight in self._weights] if self._has_outer else []
        if self._step < self._begins_after:
            self._own.close()
            self._own = AllReduceSync(slices, computing, mesh, AllReduceOptions(), uses)

    def begin(self, passes: int) -> None:
        if self._step == self._begins_after > self._course.done:
            self._own.close()
            self._own = self._alone()
        if self._has_outer and not int(self._round[0]):
            torch._foreach_copy_(self._began, self._weights)
        super().begin(passes)

    def step(self, update: Update, lr: float) -> Agreed | None:
        if self._step <= self._begins_after:
            self._sent_bytes += of_all_reduce(self._bytes, self._mesh.replicas)
            return self._own.step(update, lr)
        self._step_alone(update, lr)
        self._round[0] += 1
        ends = int(self._round[0]) >= self._length
        if ends:
            self._meet(update, lr)
        if not (ends or self._told.is_shown or self._told.is_saved):
            return None
        # A run stops where that changes nothing for those who go on.
        agreed = self._tell(update, self._told.flags if ends or self._told.is_saved else 0)
        if ends and self._options.adaptive:
            self._choose_length(float(agreed.loss))
        return agreed

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        """A run is asked to stop at a round's end, where weights are alike (see ``step``)."""
        is_apart = self._options.optimizer == "kept" and self._step > self._begins_after and self._mesh.replicas > 1
        return self._own_states(update) if is_apart else {}

    def state(self) -> Sequence[Slice]:
        everyone = self.moves[0].holders
        # Another outer step has other names: none goes on from where this one began.
        name = f"sync.local_sgd.{self._options.outer}"
        kept = [whole_slice(f"{name}.round", self._round, everyone)]
        for what, tensors in (("began", self._began), ("momentum", self._momenta)):
            for piece, tensor in zip(self.moves, tensors, strict=bool(tensors)):
                kept.append(whole_slice(f"{name}.{what}.{piece.name}", tensor, piece.holders))
        return kept

    def report(self) -> Mapping[str, float]:
        return {**super().report(), "local_steps": self._length}

    @property
    def _length(self) -> int:
        """Steps of the round."""
        every = self._options.every
        return min(every, int(self._round[1])) if self._options.adaptive else every

    def _meet(self, update: Update, lr: float) -> None:
        """The end of a round (collective)."""
        self._round[0] = 0
        if self._are_apart:
            self._put_mean_of_weights()
        if self._has_outer:
            self._step_outer(lr)
        if self._options.optimizer == "averaged" and self._states_are_apart:
            self._put_mean_of_states(update)
        elif self._options.optimizer == "reset":
            update.optimizer.state.clear()
            self._states_are_apart = self._states_are_complete = False

    def _step_outer(self, lr: float) -> None:
        """From where the round began, along the way to the mean; alike on all replicas (local)."""
        way = torch._foreach_sub(self._began, self._weights)
        torch._foreach_copy_(self._weights, self._began)
        if self._options.outer == "slowmo":
            before = float(self._round[3])
            self._round[3] = lr
            torch._foreach_mul_(self._momenta, self._momentum * lr / before if before else 0.0)
            torch._foreach_add_(self._momenta, way)
            torch._foreach_add_(self._weights, self._momenta, alpha=-self._lr)
        else:
            torch._foreach_mul_(self._momenta, self._momentum)
            torch._foreach_add_(self._momenta, way)
            torch._foreach_add_(self._weights, way, alpha=-self._lr)
            torch._foreach_add_(self._weights, self._momenta, alpha=-self._lr * self._momentum)

    def _choose_length(self, loss: float) -> None:
        first = float(self._round[2])
        if not first:
            self._round[2] = loss
        elif 0 < loss < first:
            length = math.ceil(self._options.every * math.sqrt(loss / first))
            self._round[1] = min(length, self._length)


def _drift(options: LocalSgdOptions) -> str:
    length = f"at most {options.every}" if options.adaptive else f"{options.every}"
    return f"replicas step by themselves for {length} steps: they see their own rows only, in between"
