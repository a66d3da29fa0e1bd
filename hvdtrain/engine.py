"""One replica of a model, and its agreement with the others: what makes a step.

    forward_backward   cut/      loss and gradients of this rank's microbatches, which travel meanwhile
    finish             sync/     the sums over all replicas
    step               sync/     calls optim/update.py: divide, clip, guard, optimizer

Nothing here knows which cut or which sync it is.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import Checkpoint, load_own
from hvdtrain.checkpoint.state import own_state, run_state
from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import Mesh
from hvdtrain.comm.ranks import Ranks
from hvdtrain.cut.cut import Passed, Replica
from hvdtrain.data.batch import AnyBatch
from hvdtrain.data.loader import TrainLoader
from hvdtrain.data.sampler import derive
from hvdtrain.data.tickets import TicketLoader
from hvdtrain.optim.ema import Ema
from hvdtrain.optim.guard import Guard
from hvdtrain.optim.noise_scale import NoiseScale
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.slices import Slice
from hvdtrain.sync.replicas import ReplicaCheck
from hvdtrain.sync.sync import Sync, Told
from hvdtrain.tasks.task import Task


class Engine:
    """Trains one replica per place of the mesh, and owns what a run's progress is made of.

    Making it gives all replicas the weights of the first, and takes up ``progress`` (collective). Every method that is
    not marked *local* is a collective.
    """

    def __init__(
        self, replica: Replica, sync: Sync, update: Update, mesh: Mesh, seed: int, ema: Ema | None = None,
        progress: Progress | None = None,
    ):  # fmt: skip
        self.replica, self.sync, self.update, self.mesh, self.ema = replica, sync, update, mesh, ema
        self._seed, self._start = seed, progress or Progress()
        for piece in replica.slices:
            piece.holders.broadcast(piece.tensor.data, 0, f"hvdtrain.start.{piece.name}")
        replica.publish()
        self.noise = NoiseScale(replica.device)
        self.tokens: Any = self._start.tokens  # target tokens since step 0, of all replicas; on the device
        self.best_val_loss = self._start.best_val_loss
        self._checks = ReplicaCheck(mesh.replica, mesh.world.rank)
        self._copies = ReplicaCheck(mesh.tensor, mesh.world.rank)
        self._passed: Passed | None = None
        self._own: list[Slice] = []
        self._take_up(self._start)

    @property
    def guard(self) -> Guard:
        """The judge of divergence."""
        return self.update.guard

    @property
    def flops(self) -> int:
        """Model FLOPs of this rank in its last step."""
        return 0 if self._passed is None else self._passed.flops

    def report(self) -> Mapping[str, float]:
        """See ``Sync`` (local)."""
        return self.sync.report()

    def forward_backward(
        self, microbatches: Sequence[AnyBatch], task: Task, step: int, place: tuple[int, int] | None = None
    ) -> None:
        """Sums of loss and gradient over this replica's microbatches; gradients already travel while backward runs.

        Dropout's random numbers depend on (seed, step, replica) alone, so a resumed run draws the same ones and no
        random state has to be stored. place: step and replica, where the rows are another's (None: ``step``, this one).
        """
        self.sync.begin(len(microbatches))
        scale = None if self.update.loss_scale is None else self.update.loss_scale.scale
        seed = derive(self._seed, *(place or (step, self.mesh.number)), 2)
        self._passed = self.replica.forward_backward(microbatches, task, seed, scale)

    def finish(
        self, flags: int = 0, is_shown: bool = True, is_saved: bool = True, is_scored: bool = True,
        more: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Wait for the sums over all replicas. flags: what this rank adds to the sum of flags; see ``Told``."""
        assert self._passed is not None, "forward_backward comes first"
        scale = None if self.update.loss_scale is None else self.update.loss_scale.scale
        passed = self._passed
        self.sync.finish(Told(passed.loss, passed.weights, flags, scale, is_shown, is_saved, is_scored, more))

    def step(self, lr: float, step: int) -> Agreed | None:
        """Move the weights; None where the replicas have told one another nothing."""
        agreed = self.sync.step(self.update, lr)
        self.replica.publish()
        if self.ema is not None:
            self.ema.update(step)
        if agreed is not None:
            self.tokens = self.tokens + agreed.weight
            self.noise.update(agreed.part_square, agreed.part_inverse, agreed.whole_square, agreed.weight)
        return agreed

    def evaluate(self, batches: Iterable[AnyBatch], task: Task) -> dict[str, float]:
        """Scores of a split whose batches the replicas share; of the averaged weights, where there are any."""
        with self._viewed():
            return scores_of(self.replica, self.mesh.replica, batches, task)

    def note_best(self, val_loss: float) -> None:
        """A validation of the weights as they are (local)."""
        self.best_val_loss = val_loss if self.best_val_loss is None else min(self.best_val_loss, val_loss)

    def check_replicas(self, step: int) -> None:
        """Are the replicas equal, bit by bit, and what ranks of one replica have in common? Errors: ReplicaError."""
        with self.sync.viewed():
            slices = self.replica.slices
            self._checks.check({piece.name: piece.tensor for piece in slices}, step)
            self._copies.check({piece.name: piece.tensor for piece in slices if piece.is_whole}, step)

    def check(self, step: int, is_extra: bool = False) -> None:
        """Before a save: make one model of the replicas. Are they equal then, and the weights numbers?

        is_extra: the run saves only because it stops here. Then ``state`` also has what each rank had before.
        Errors: ReplicaError, DivergedError, on all ranks alike.
        """
        own = own_state(self.sync.own(self.update), self.mesh.replica) if is_extra else []
        self._own = [replace(piece, tensor=piece.tensor.clone()) for piece in own]
        self.sync.settle(self.update)
        self.replica.publish()
        self.check_replicas(step)
        weights = [piece.tensor for piece in self.replica.slices]
        if self.mesh.own.size == 1:
            self.guard.check_weights(step, weights)
        else:  # one rank alone may find out
            self.mesh.world.together(lambda: self.guard.check_weights(step, weights))

    def state(self) -> list[Slice]:
        """This rank's slices of what a checkpoint saves; the tensors themselves (local)."""
        learned = run_state(self.replica.slices, self.update.optimizer, self.ema, self.sync.moves)
        return [*learned, *self.sync.state(), *self._own]

    def take_up_own(self, saved: Checkpoint) -> str:
        """Go on from what this rank had of its own, where the run stopped between two saves. Returns what has to be
        said about it.
        """
        own = own_state(self.sync.own(self.update), self.mesh.replica)
        said = self.mesh.world.together(lambda: load_own(saved, own))
        self.replica.publish()
        return said

    def progress(
        self, step: int, loader: TrainLoader | TicketLoader, group: Ranks | None = None, **settings: Any
    ) -> Progress:
        """Where the run stands after ``step``, for a checkpoint. group: those who know which rows were consumed (None:
        the same place in every replica). settings: fields that the run itself knows.
        """
        own = sum((group or self.mesh.replica).all_gather_object(loader.fingerprint))
        loss_scale = self.update.loss_scale
        return replace(
            self._start,
            step=step,
            rows_consumed=loader.rows_consumed,
            tokens=int(self.tokens),
            fingerprint=(self._start.fingerprint + own) % (1 << 64),
            best_val_loss=self.best_val_loss,
            loss_scale=None if loss_scale is None else loss_scale.state(),
            noise=self.noise.state(),
            guard=self.update.guard.state(),
            world_size=self.mesh.world.size,
            **settings,
        )

    def close(self) -> None:
        """Let go of the gradients (local)."""
        self.sync.close()

    @contextlib.contextmanager
    def _viewed(self) -> Iterator[None]:
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.swapped(self._hand_on)
        with self.sync.viewed():
            self.replica.publish()
            with averaged:
                yield
        self.replica.publish()

    def _hand_on(self) -> None:
        """Others than the sync have changed the weights."""
        self.sync.hand_on()
        self.replica.publish()

    def _take_up(self, progress: Progress) -> None:
        if self.update.loss_scale is not None and progress.loss_scale is not None:
            self.update.loss_scale.load(progress.loss_scale)
        self.update.guard.load(progress.guard)
        if progress.noise is not None:
            self.noise.load(progress.noise)


def scores_of(replica: Replica, group: Group, batches: Iterable[AnyBatch], task: Task) -> dict[str, float]:
    """Scores of a split whose batches the replicas share, exact for any number of them (collective).

    group: the same place in every replica.
    """
    sums = replica.measure(batches, task)
    # A replica may have had no batch at all: it learns from the others how many sums there are.
    count = max(group.all_gather_object(0 if sums is None else len(sums)))
    if sums is None:
        sums = torch.zeros(count, dtype=torch.float64, device=replica.device)
    group.all_reduce_sum(sums, "hvdtrain.evaluation")
    return task.scores(sums.tolist())
