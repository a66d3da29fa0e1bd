"""Replicas that step by themselves: what local SGD, gossip and averaging have in common.

step          1      2      3      4 shown   5      6 saved
replica 0     own    own    own    own       own    own  \\
replica 1     own    own    own    own       own    own  / one model, one optimizer state
told to all                        sums             sums

A step is a replica's own: its gradient is the mean over its own targets, that gradient's norm is clipped, and its own
optimizer moves its weights. Rows and their order are those of every sync. What the replicas tell one another, where a
step is shown or saved, is of all steps since they did so before: the loss over all their targets, the mean of the norms
of their gradients before clipping.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import Mesh, whole_replicas
from hvdtrain.optim.lars import Norms, whole_norms
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.options import Options
from hvdtrain.slices import Slice
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.sync.means import put_mean
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.sync import Drift, Told
from hvdtrain.sync.traffic import mib, of_all_reduce

_SAMPLED = 1 << 16  # numbers of a model, from which the distance between replicas is told between two means


@dataclass(frozen=True)
class Course:
    """What a sync may know of its run. done: steps before it begins, or goes on; steps: of the whole run.

    val_loss: measures the weights as they are, of which each replica takes a share of the batches; so they must be
    alike (collective).
    """

    done: int = 0
    steps: int = 0
    val_loss: Callable[[], float] | None = None


class ApartOptions(Options):
    """Of a sync whose replicas step by themselves."""

    def problems(self, replicas: int, steps: int) -> list[str]:
        """What does not fit so many replicas, or a run of so many steps."""
        return []


def needs_apart(trained: Trained, kept: int = 0, buffers: int = 0, passing: int = 0, sent: float = 0.0) -> Needs:
    """Of any of them, with what one needs besides. All that replicas average is copied into what is sent."""
    weights, state = 4 * trained.count, trained.state_bytes
    averaging = max(2 * weights, state)  # to look at the mean of the weights, or to settle
    return Needs(weights, trained.count, kept, buffers, max(averaging, passing), weights, sent)


class ApartSync:
    """See ``Sync``; a subclass says when replicas meet and how. slices, computing, uses: see ``AllReduceSync``."""

    drift: Drift

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        uses: Sequence[int] | None,
        course: Course,
    ):
        self.moves: Sequence[Slice] = [piece for piece in slices if piece.tensor.requires_grad]
        self.norms: Norms = whole_norms
        self.notes: list[str] = []
        self._slices, self._computing, self._uses, self._mesh = slices, computing, uses, mesh
        self._course, self._step = course, course.done
        self._weights = [piece.tensor.detach() for piece in self.moves]
        self._bytes = sum(weight.nbytes for weight in self._weights)
        self._own = self._alone()
        self._told = Told(torch.zeros(()), ())
        # Since they told one another: loss, targets; norms of gradients, and how many.
        self._since = torch.zeros(4, dtype=torch.float64, device=self._weights[0].device)
        self._steps, self._sent_bytes = 0, 0.0  # of this process
        self._square: torch.Tensor | None = None  # of this replica's distance from the mean, when it was last known
        self._distance = torch.zeros((), dtype=torch.float64)
        self._are_apart = False  # are the weights not alike?
        self._states_are_apart = False
        self._states_are_complete = False

    def begin(self, passes: int) -> None:
        self._step += 1
        self._steps += 1
        self._own.begin(passes)

    def finish(self, told: Told) -> None:
        self._told = told
        self._own.finish(told)

    def step(self, update: Update, lr: float) -> Agreed | None:
        self._step_alone(update, lr)
        return self._tell(update) if self._told.is_shown or self._told.is_saved else None

    def settle(self, update: Update) -> None:
        if self._are_apart:
            self._put_mean_of_weights()
        if self._states_are_apart:
            self._put_mean_of_states(update)

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        if self._mesh.replicas == 1:
            return {}
        found = {f"model.{piece.name}": weight for piece, weight in zip(self.moves, self._weights, strict=True)}
        return {**found, **self._own_states(update)}

    @contextlib.contextmanager
    def viewed(self) -> Iterator[None]:
        if not self._are_apart:
            yield
            return
        own = [weight.clone() for weight in self._weights]
        square = self._square
        self._view()
        self._square = square
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, own)

    def hand_on(self) -> None:
        """These are the same tensors."""

    def state(self) -> Sequence[Slice]:
        return ()

    def report(self) -> Mapping[str, float]:
        """``sent_mib`` is of a step, in the mean of all of this process; for what weights and states are sent."""
        sent = self._sent_bytes / max(1, self._steps)
        return {"sent_mib": mib(sent), "consensus_distance": float(self._distance)}

    def close(self) -> None:
        self._own.close()

    def _alone(self) -> AllReduceSync:
        """Sums over this replica alone."""
        nobody = LocalGroup()
        slices = [replace(piece, holders=nobody) for piece in self._slices]
        return AllReduceSync(slices, self._computing, whole_replicas(nobody), AllReduceOptions(), self._uses)

    def _step_alone(self, update: Update, lr: float) -> None:
        """This replica's own step; none where it had no targets (local)."""
        self._are_apart = self._states_are_apart = self._mesh.replicas > 1  # all know: whoever had no targets too
        if not sum(self._told.weights):
            return
        agreed = self._own.step(update, lr)
        norm, count = agreed.grad_norm, torch.ones_like(agreed.grad_norm)
        if update.loss_scale is not None:  # an overflow has no norm, and explains why
            count = norm.isfinite().double()
            norm = torch.where(norm.isfinite(), norm, 0.0)
        self._since += torch.stack([self._told.loss.double(), agreed.weight, norm, count])

    def _tell(self, update: Update, flags: int | None = None) -> Agreed:
        """Sums over all replicas since this was last called (collective). flags: None: those of the step."""
        own = torch.zeros(7, dtype=torch.float64, device=self._since.device)
        own[:4] = self._since
        own[4] = self._told.flags if flags is None else flags
        if self._square is not None:
            own[5] = self._square
        if update.loss_scale is not None:
            own[6] = update.loss_scale.scale
        sums = self._mesh.world.all_reduce_sum(own, "hvdtrain.sums")
        loss, weight, norms, count, told_flags, square, scales = sums.unbind()
        if self._square is not None:
            self._distance = (square / self._mesh.replicas).sqrt()
        self._since.zero_()
        unknown = torch.full_like(loss, torch.nan)  # of the noise scale: no step had two sizes of batch
        scale = None if update.loss_scale is None else scales / self._mesh.replicas
        return Agreed(loss / weight, weight, norms / count, unknown, unknown, unknown, told_flags, scale)

    def _view(self) -> None:
        """Put the one model in place of this replica's; the trajectory is not touched (collective)."""
        put_mean(self._mesh.replica, self._weights, "weights")

    def _put_mean_of_weights(self) -> None:
        """The replicas meet (collective)."""
        self._square = put_mean(self._mesh.replica, self._weights, "weights")
        self._sent_bytes += of_all_reduce(self._bytes, self._mesh.replicas)
        self._are_apart = False

    def _put_mean_of_states(self, update: Update, members: Collection[int] | None = None) -> None:
        """Of what the optimizers keep; of the scales of the loss, the least. members: see ``put_mean`` (collective)."""
        self._complete_states(update)
        states = update.optimizer.state
        kept = [
            states[piece.tensor][key].detach() for piece in self.moves for key in sorted(states.get(piece.tensor, {}))
        ]
        if kept:
            put_mean(self._mesh.replica, kept, "states", members)
            sent = sum(value.nbytes for value in kept)
            self._sent_bytes += of_all_reduce(sent, self._mesh.replicas)
        if update.loss_scale is not None:  # the lowest suits all
            update.loss_scale.load(min(self._mesh.replica.all_gather_object(update.loss_scale.state())))
        self._states_are_apart = False

    def _own_states(self, update: Update) -> dict[str, torch.Tensor]:
        """What this replica's optimizer keeps, and its scale of the loss (collective)."""
        self._complete_states(update)
        states = update.optimizer.state
        found = {
            f"optimizer.{key}.{piece.name}": value
            for piece in self.moves
            for key, value in states.get(piece.tensor, {}).items()
        }
        if update.loss_scale is not None:
            found |= {f"loss_scale.{name}": value for name, value in update.loss_scale.tensors.items()}
        return found

    def _complete_states(self, update: Update) -> None:
        """Begin what an optimizer keeps of a parameter that only other replicas have had a gradient of, as zeros."""
        if self._states_are_complete:
            return
        states = update.optimizer.state
        kept = {
            piece.name: {key: value.dim() == 0 for key, value in states[piece.tensor].items()}
            for piece in self.moves
            if states.get(piece.tensor)
        }
        names = {name: keys for of_rank in self._mesh.replica.all_gather_object(kept) for name, keys in of_rank.items()}
        for piece in self.moves:
            if piece.name in names and piece.name not in kept:
                weight = piece.tensor.detach()
                for key, is_scalar in names[piece.name].items():
                    states[piece.tensor][key] = weight.new_zeros(() if is_scalar else weight.shape)
        self._states_are_complete = len(names) == len(self.moves)

    def _sample_distance(self) -> None:
        """Take ``_square`` from a sample of the weights, where no mean was made (collective)."""
        count = sum(weight.numel() for weight in self._weights)
        stride = -(-count // _SAMPLED) | 1  # odd: widths are not
        sample = torch.cat([weight.reshape(-1)[::stride] for weight in self._weights]).clone()
        self._square = put_mean(self._mesh.replica, [sample], "sample") * (count / sample.numel())
