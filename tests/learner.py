"""A tiny run on ranks, from its model to its checkpoints: what ``open_engine`` makes, without a recipe and shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from threads import ThreadGroup, on_ranks
from tiny import random_tokens
from torch import nn

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import load, load_kept
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import MeshOptions, make_mesh
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint, fill_slices
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.batch import Batch
from hvdtrain.data.sampler import even_parts
from hvdtrain.engine import Engine
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.depth import rate_shares
from hvdtrain.models.frozen import freeze
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.options import TransformerOptions
from hvdtrain.optim.ema import EmaOptions, make_ema
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.loss_scale import LossScale
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.sync.apart import Course
from hvdtrain.sync.matrices import make_matrices
from hvdtrain.tasks.lm import LanguageModel

ROWS, CONTEXT, VOCAB = 8, 8, 50
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """Ranks that are threads share torch's random numbers: dropout is for ranks that are processes.

    ``eps``: keys' biases have no gradient but rounding (softmax takes away what all keys have in common), which Adam
    would make steps of as large as any; with this one they are as small as they are.
    """

    sync: SyncOptions = field(default_factory=SyncOptions)
    optim: OptimOptions = field(default_factory=lambda: OptimOptions(lr=0.01, eps=1e-5))
    mesh: MeshOptions = field(default_factory=MeshOptions)
    cut: CutOptions = field(default_factory=CutOptions)
    model: Mapping[str, object] = field(default_factory=dict)
    precision: str = "fp32"
    ema: float = 0.0
    guard: GuardOptions = field(default_factory=GuardOptions)
    microbatches: int = 2
    course: Course = field(default_factory=Course)


class Learner:
    """Its ranks share batches of 8 rows, whatever their number; where it does not divide, the first have more."""

    def __init__(self, group: Group, recipe: Recipe, folder: Path | None = None):
        """folder: a checkpoint to go on from."""
        self.recipe, self.mesh = recipe, make_mesh(group, recipe.mesh, servers=recipe.sync.servers)
        small = {"layers": 2, "heads": 2, "width": 16, "context": CONTEXT, "ff_ratio": 2.0}
        options = TransformerOptions(**{**small, **recipe.model})

        def model() -> nn.Module:
            made = Decoder(options, VOCAB)
            freeze(made, recipe.optim.freeze, None, True)
            return made

        blueprint, self.task = Blueprint(model), LanguageModel()
        precision = PRECISIONS[recipe.precision]
        replica = make_replica(blueprint, Making(self.mesh, precision, CPU, self.task, recipe.cut))
        fill_slices(replica.slices, blueprint.initial(1 + (folder is not None)))
        self.sync = make_sync(recipe.sync, replica.slices, replica.computing, self.mesh, replica.uses, recipe.course)
        shares = rate_shares(list(blueprint.wholes), recipe.optim.layer_decay)
        moved = [piece.tensor for piece in self.sync.moves]
        of_moved = [shares[piece.name] for piece in self.sync.moves]
        matrices, self.notes = None, list[str]()
        if recipe.optim.name == "muon":
            parts = block_matrices(blueprint.wholes, options)
            matrices, self.notes = make_matrices(self.sync, parts, recipe.optim.muon, self.mesh, CPU, fast=False)
        self.optimizer = make_optimizer(moved, recipe.optim, self.sync.norms, of_moved, matrices)
        self.ema = make_ema(self.sync.moves, EmaOptions(decay=recipe.ema))
        progress = Progress()
        if folder is not None:
            saved = load(folder, replica.slices, self.optimizer, self.ema, moves=self.sync.moves)
            load_kept(saved, self.sync.state())
            progress = saved.progress
        scale = LossScale(CPU) if precision.scaled else None
        update = Update(self.optimizer, recipe.optim.clip_norm, Guard(recipe.guard, CPU), scale)
        self.engine = Engine(replica, self.sync, update, self.mesh, 1, self.ema, progress)
        self.done = progress.step

    def microbatches(self, step: int) -> list[Batch]:
        return self.share(step, self.mesh.number) if self.mesh.has_rows else []

    def share(self, step: int, number: int) -> list[Batch]:
        """That of replica ``number``."""
        windows = torch.from_numpy(random_tokens(ROWS * (CONTEXT + 1), VOCAB, seed=step)).view(ROWS, CONTEXT + 1)
        first, count = even_parts(ROWS, self.mesh.replicas)[number]
        parts = even_parts(count, min(count, self.recipe.microbatches))
        return [Batch.from_windows(windows[first + at : first + at + rows].numpy()) for at, rows in parts]

    def step(self) -> Agreed:
        self.done += 1
        self.engine.forward_backward(self.microbatches(self.done), self.task, self.done)
        self.engine.finish()
        agreed = self.engine.step(self.recipe.optim.lr, self.done)
        assert agreed is not None
        return agreed

    def train(self, steps: int) -> "Learner":
        for _ in range(steps):
            self.step()
        return self

    def save(self, run_dir: Path) -> Path:
        self.engine.check(self.done)
        progress = Progress(self.done, world_size=self.mesh.world.size)
        return writer.save(run_dir, self.engine.state(), progress, self.mesh.world, CheckpointOptions(keep_last=0))

    def weights(self) -> dict[str, torch.Tensor]:
        """What this rank holds, when the replicas have been made one."""
        self.engine.check(self.done)
        return {piece.name: piece.tensor.detach().clone() for piece in self.engine.replica.slices}

    def state_bytes(self) -> int:
        """Of the optimizer, here; without its counters."""
        states = [self.optimizer.state[piece.tensor] for piece in self.sync.moves]
        return sum(value.nbytes for state in states for value in state.values() if value.dim())


def trained(ranks: int, steps: int = 20, **recipe: object) -> list[Learner]:
    """The learners of ranks that are threads, after their steps; the replicas, those of servers too, were found equal,
    bit by bit.
    """

    def work(group: ThreadGroup) -> Learner:
        learner = Learner(group, Recipe(**recipe)).train(steps)
        learner.engine.check(steps)
        return learner

    return on_ranks(ranks, work)


def held(learner: Learner) -> dict[str, torch.Tensor]:
    return {piece.name: piece.tensor.detach() for piece in learner.engine.replica.slices}


def distances(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """|found - expected| / |expected| of each tensor."""
    assert found.keys() == expected.keys()
    return {
        name: float(torch.linalg.norm(found[name] - tensor) / torch.linalg.norm(tensor).clamp(min=1e-30))
        for name, tensor in expected.items()
    }


def furthest(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    return max(distances(found, expected).values())


def check_averages(learners: Sequence[Learner], whole: Learner) -> None:
    """Each one's part of the averaged weights is that of ``whole``, which has all of them."""
    expected = {average.name: average.tensor for average in whole.ema.averages()}
    for piece in (piece for one in learners for piece in one.ema.averages()):
        (place,) = piece.places
        rows = tuple(slice(a, a + n) for a, n in zip(*place, strict=True))
        torch.testing.assert_close(piece.tensor, expected[piece.name][rows], rtol=1e-4, atol=1e-6)
