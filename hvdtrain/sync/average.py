"""Train apart on parts of the data, then make one model of all.

replica 0   ....................  \\
replica 1   ....................   >  one-shot mean, or greedy soup        before a save; training goes on from there
replica 2   ....................  /

mean   of all replicas' weights, once (Zinkevich et al. 2010)
soup   the best replica by validation loss, and each further one, best first, where their mean gets no worse with it
       (Wortsman et al. 2022, 2203.05482, Recipe 1)

Replicas begin with the same weights: means of models that do not are of no use.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.optim.update import Update
from hvdtrain.options import option
from hvdtrain.slices import Slice
from hvdtrain.sync.apart import ApartOptions, ApartSync, Course, needs_apart
from hvdtrain.sync.means import put_mean
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.sync import Drift
from hvdtrain.sync.traffic import of_all_reduce


class AverageOptions(ApartOptions):
    fuse: Literal["mean", "soup"] = option(
        "mean", "how one model is made of all; mean: of all weights; soup: of those that lower the validation loss"
    )


def needs_of_average(options: AverageOptions, trained: Trained) -> Needs:
    # A soup that is looked at: the replica's own weights twice, and the mean of some on its way.
    return needs_apart(trained, passing=3 * 4 * trained.count if options.fuse == "soup" else 0)


class AverageSync(ApartSync):
    """See ``Sync`` and ``ApartSync``. Replicas meet where a checkpoint is saved, and nowhere else.

    An evaluation in between is of the mean of all. At the run's last step, and where a soup is made, each replica is
    measured too.
    """

    drift = Drift(
        False, "replicas meet only where a checkpoint is saved: what each has learned of its part is averaged"
    )

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: AverageOptions,
        uses: Sequence[int] | None,
        course: Course,
    ):
        super().__init__(slices, computing, mesh, uses, course)
        self._options = options
        self._losses: dict[str, float] = {}
        self._chosen: tuple[int, list[int]] = 0, []  # in which step, and of which replicas

    def settle(self, update: Update) -> None:
        if self._are_apart and (self._options.fuse == "soup" or self._step == self._course.steps):
            self._measure_and_fuse(update)
        super().settle(update)

    def report(self) -> Mapping[str, float]:
        return {**super().report(), **self._losses}

    def _measure_and_fuse(self, update: Update) -> None:
        members = self._fuse()
        self._are_apart = False
        self._sent_bytes += of_all_reduce(self._bytes, self._mesh.replicas)
        self._put_mean_of_states(update, members)

    def _view(self) -> None:
        if self._options.fuse == "soup" and self._told.is_saved:  # what is evaluated is what is saved
            self._fuse()
        else:
            super()._view()

    def _fuse(self) -> Sequence[int]:
        """Put the one model in place of this replica's; of which replicas it is made (collective)."""
        own = [weight.clone() for weight in self._weights]
        if self._chosen[0] != self._step:  # else an evaluation has chosen already
            everyone = list(range(self._mesh.replicas))
            losses = [self._loss_of([replica], own) for replica in everyone]
            if self._options.fuse == "soup":
                members, fused = self._soup(losses, own)
            else:
                members, fused = everyone, self._loss_of(everyone, own)
            self._chosen = self._step, members
            self._losses = {f"val_loss_of_replica_{number}": loss for number, loss in enumerate(losses)}
            self._losses |= {"val_loss_fused": fused, "replicas_fused": len(members)}
        _, members = self._chosen
        self._mix(members, own)
        return members

    def _soup(self, losses: Sequence[float], own: list[torch.Tensor]) -> tuple[list[int], float]:
        """Which replicas go into it, and its validation loss (collective). losses: of each replica alone."""
        first, *others = sorted(range(len(losses)), key=lambda replica: losses[replica])
        members, least = [first], losses[first]
        for replica in others:
            loss = self._loss_of([*members, replica], own)
            if loss <= least:
                members, least = [*members, replica], loss
        return members, least

    def _loss_of(self, members: Sequence[int], own: list[torch.Tensor]) -> float:
        """Validation loss of the mean of some replicas (collective)."""
        assert self._course.val_loss is not None
        self._mix(members, own)
        return self._course.val_loss()

    def _mix(self, members: Sequence[int], own: list[torch.Tensor]) -> None:
        torch._foreach_copy_(self._weights, own)
        self._square = put_mean(self._mesh.replica, self._weights, "weights", members)
