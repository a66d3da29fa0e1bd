"""Gossip: each replica mixes its weights with those of a few neighbours; nobody waits for all.

D-PSGD (Lian et al. 2017, 1705.09056, Algorithm 1). Messages travel while the step computes:

    begin   x_i -> neighbours          backward of x_i: g_i          step   x_i <- sum_j W_ij x_j, moved by g_i

Stochastic gradient push (Assran et al. 2019, 1811.10792, Algorithm 2), ``push``: what is sent in a step is taken up in
the next exchange, so nobody waits even for neighbours that are a step behind. Part of the weights is then always on its
way. Each replica has a share s_i of the mass, and what computes is x_i / s_i:

    begin   W_ji (x_i, s_i) -> j;  keeps W_ii (x_i, s_i)
    step    x_i <- x_i, moved by g_i;  (x_i, s_i) += what came of the exchange before

Weights and shares add up to those of all, on their way or not: the one model is sum x / sum s.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.comm.ranks import Done, Pending
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.options import option
from hvdtrain.slices import Slice
from hvdtrain.sync.apart import ApartOptions, ApartSync, Course, needs_apart
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.sync.sync import Drift, Told
from hvdtrain.sync.topologies import counts_near, fits, matrices, spectral_gap

_CPU = torch.device("cpu")


class GossipOptions(ApartOptions):
    topology: Literal["ring", "torus", "hypercube", "exponential"] = option(
        "exponential", "who mixes with whom; exponential: one peer a step, 1, 2, 4, ... ranks away"
    )
    every: int = option(1, "steps from one exchange to the next", ge=1)
    push: bool = option(False, "stochastic gradient push: messages are taken up one exchange later; nobody waits")

    def problems(self, replicas: int, steps: int) -> list[str]:
        found = []
        if not fits(self.topology, replicas):
            counts = " or ".join(map(str, counts_near(self.topology, replicas)))
            found.append(
                f"sync.gossip.topology={self.topology} does not fit {replicas} replicas; start {counts}, or set "
                "sync.gossip.topology=exponential, which fits any number"
            )
        if self.every > steps:
            found.append(
                f"sync.gossip.every={self.every} is longer than the run, {steps} steps; set it to {steps} or less"
            )
        return found


def needs_of_gossip(options: GossipOptions, trained: Trained) -> Needs:
    if trained.ranks == 1:
        return needs_apart(trained)
    message, mixing = 4 * (trained.count + 1), matrices(options.topology, trained.ranks)
    targets = [len(_others(matrix[:, 0], 0)) for matrix in mixing]  # of rank 0; all have as many
    rooms = 2 if options.push else 1
    return needs_apart(
        trained,
        buffers=message * (rooms * max(targets) + 1),
        passing=rooms * message,
        sent=message * sum(targets) / len(targets) / options.every,
    )


class GossipSync(ApartSync):
    """See ``Sync`` and ``ApartSync``. Messages go through the host's memory.

    A save puts the mean in place of every replica's weights and optimizer state.
    """

    drift = Drift(False, "a replica mixes with its neighbours only: they are as far apart as consensus_distance says")

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        mesh: Mesh,
        options: GossipOptions,
        uses: Sequence[int] | None,
        course: Course,
    ):
        super().__init__(slices, computing, mesh, uses, course)
        self._options = options
        ranks = mesh.replicas
        self._pushes = options.push and ranks > 1
        self._mixing = matrices(options.topology, ranks)
        self._axis = mesh.world.axis([range(ranks)], _CPU)
        if ranks > 1:
            gap = spectral_gap(self._mixing)
            self.notes.append(f"sync.gossip.topology={options.topology} of {ranks} replicas: spectral gap {gap:.3f}")
        # A message: the weights times their share of the mass, and behind them the share. With ``push`` those of two
        # exchanges are under way.
        numbers = sum(weight.numel() for weight in self._weights) + 1
        most = max(len(_others(matrix[mesh.number], mesh.number)) for matrix in self._mixing)
        self._room = [[torch.empty(numbers) for _ in range(most)] for _ in range(2 if self._pushes else 1)]
        self._sent_flat, self._sends = torch.empty(numbers), list[Pending]()
        self._coming: list[_Message] = []
        self._came: list[_Message] = []  # of the exchange before
        # The share of the mass that is here; how much of what was sent last is on its way.
        self._mass = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def begin(self, passes: int) -> None:
        super().begin(passes)
        if self._exchanges:
            self._send()

    def finish(self, told: Told) -> None:
        super().finish(told)
        for message in self._came if self._pushes else self._coming:
            message.pending.wait()

    def step(self, update: Update, lr: float) -> Agreed | None:
        if self._pushes:
            before = [weight.clone() for weight in self._weights]
            self._step_alone(update, lr)
            # The step is made by what computes, and moves the whole replica, be its mass here or on its way.
            moved = torch._foreach_sub(self._weights, before)
            torch._foreach_copy_(self._weights, before)
            self._times_share()
            torch._foreach_add_(self._weights, moved)
            self._take_in(self._came)
            torch._foreach_div_(self._weights, float(self._mass[0]))
        else:
            if self._coming:
                self._times_share()
                self._take_in(self._coming)
                self._all_is_here()
            self._step_alone(update, lr)
        if not (self._told.is_shown or self._told.is_saved):
            return None
        self._sample_distance()
        return self._tell(update)

    def settle(self, update: Update) -> None:
        for pending in (*self._sends, *(message.pending for message in self._coming)):
            pending.wait()
        self._collect()
        self._sends, self._coming = [], []
        self._all_is_here()
        super().settle(update)

    def own(self, update: Update) -> Mapping[str, torch.Tensor]:
        """With ``push`` also what is on its way, of the exchange before this or the next step."""
        found = dict(super().own(update))
        if self._pushes:
            for message in self._coming:
                message.pending.wait()
            arriving = self._messages(self._step // self._options.every, lambda flat, source: Done())
            found |= {f"sync.gossip.coming.{number}": message.flat for number, message in enumerate(arriving)}
            found |= {"sync.gossip.sent": self._sent_flat, "sync.gossip.mass": self._mass}
        return found

    @property
    def _exchanges(self) -> bool:
        """Does this step begin an exchange?"""
        return self._step % self._options.every == 0 and self._mesh.replicas > 1

    def _send(self) -> None:
        """Begin an exchange (local)."""
        for pending in self._sends:  # of the exchange before, from the same memory
            pending.wait()
        number, rank = self._step // self._options.every, self._mesh.number
        matrix, (share, away) = self._mixing[number % len(self._mixing)], self._mass.tolist()
        if away and not self._coming:  # it came to a run that stopped, and this one goes on from there
            self._coming = self._messages(number - 1, lambda flat, source: Done())
        self._came, self._coming = self._coming, self._messages(number, self._axis.receive)
        torch._foreach_copy_(self._parts(self._sent_flat), torch._foreach_mul(self._weights, share))
        self._sent_flat[-1] = share
        targets = _others(matrix[:, rank], rank)
        self._sends = [self._axis.send(self._sent_flat, target) for target in targets]
        self._sent_bytes += self._sent_flat.nbytes * len(targets)
        kept = float(matrix[rank, rank])
        self._mass[0], self._mass[1] = share * kept, 1 - kept

    def _messages(self, number: int, receive: Callable[[torch.Tensor, int], Pending]) -> list["_Message"]:
        """To this replica, of one exchange."""
        rank, room = self._mesh.number, self._room[number % len(self._room)]
        weights = self._mixing[number % len(self._mixing)][rank]
        return [
            _Message(float(weights[source]), flat, receive(flat, source))
            for source, flat in zip(_others(weights, rank), room, strict=False)
        ]

    def _times_share(self) -> None:
        torch._foreach_mul_(self._weights, float(self._mass[0]))

    def _all_is_here(self) -> None:
        self._mass[0], self._mass[1] = 1.0, 0.0

    def _take_in(self, messages: list["_Message"]) -> None:
        """Add what has come to the weights, times their share, and to the share (local)."""
        for message in messages:
            self._add(message.flat, message.factor)
            self._mass[0] += message.factor * float(message.flat[-1])
        messages.clear()

    def _add(self, flat: torch.Tensor, factor: float) -> None:
        parts = [part.to(weight.device) for part, weight in zip(self._parts(flat), self._weights, strict=True)]
        torch._foreach_add_(self._weights, parts, alpha=factor)

    def _parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each weight's place in a message."""
        parts = flat[:-1].split([weight.numel() for weight in self._weights])
        return [part.view(weight.shape) for part, weight in zip(parts, self._weights, strict=True)]

    def _collect(self) -> None:
        """Put all of this replica's mass into its weights, with what is on its way: their mean is the one model."""
        if away := float(self._mass[1]):
            self._times_share()
            self._add(self._sent_flat, away)

    def _view(self) -> None:
        self._collect()
        super()._view()


@dataclass(frozen=True)
class _Message:
    """One that is under way to this replica. factor: what it is multiplied by."""

    factor: float
    flat: torch.Tensor
    pending: Pending


def _others(weights: torch.Tensor, rank: int) -> list[int]:
    """The ranks but ``rank`` that have a part in a row or column of a matrix."""
    return [other for other, weight in enumerate(weights.tolist()) if weight and other != rank]
