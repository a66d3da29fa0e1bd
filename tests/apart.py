"""Runs of replicas that step by themselves, in this process or under mpirun, with batches that are made up."""

from collections.abc import Callable, Mapping, Sequence

import torch
from tiny import CPU, random_tokens, tiny_decoder
from torch import nn

from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.cut.whole import Whole
from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.engine import Engine, scores_of
from hvdtrain.models.matrices import block_matrices
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.loss_scale import LossScale
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Agreed, Update
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.sync.apart import Course
from hvdtrain.sync.matrices import make_matrices
from hvdtrain.tasks.lm import LanguageModel

ROWS, CONTEXT = 12, 8
TASK = LanguageModel()
ADAMW = OptimOptions(lr=0.01, clip_norm=0.0)
SGD = OptimOptions(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.0)
MUON = OptimOptions(name="muon", lr=0.01, clip_norm=0.0)
PLAIN_SGD = OptimOptions(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0)
Saved = Mapping[str, torch.Tensor]


def batch_of(step: int, part: int = 0, parts: int = 1) -> Batch:
    """Rows of a replica in a step; all targets count."""
    windows = random_tokens(ROWS * (CONTEXT + 1), seed=step).reshape(ROWS, -1)
    first, count = part * ROWS // parts, ROWS // parts
    return Batch.from_windows(windows[first : first + count])


def without_targets(batch: Batch) -> Batch:
    return Batch(batch.tokens, torch.full_like(batch.targets, IGNORE), 0)


class Training:
    """A run on one rank, from step ``done`` on. saved: what another has ``save``d there."""

    def __init__(
        self, group: Group, sync: SyncOptions, optim: OptimOptions = ADAMW, steps: int = 12, done: int = 0,
        saved: Saved | None = None, precision: str = "fp32", model: nn.Module | None = None,
    ):  # fmt: skip
        self.group, self.optim, self.step_number = group, optim, done
        self.model = tiny_decoder() if model is None else model
        mesh = whole_replicas(group)
        whole = Whole(self.model, mesh, PRECISIONS[precision])
        val = [batch_of(1000 + number) for number in range(group.rank, 4, group.size)]

        def val_loss() -> float:
            return scores_of(whole, group, val, TASK)["val_loss"]

        self.sync = make_sync(sync, whole.slices, whole.computing, mesh, whole.uses, Course(done, steps, val_loss))
        moves = [piece.tensor for piece in self.sync.moves]
        matrices = None
        if optim.name == "muon":
            parts = block_matrices(dict(self.model.named_parameters()), self.model.options)
            matrices, _ = make_matrices(self.sync, parts, optim.muon, mesh, CPU, fast=False)
        self.optimizer = make_optimizer(moves, optim, matrices=matrices)
        scale = LossScale(CPU) if PRECISIONS[precision].scaled else None
        update = Update(self.optimizer, optim.clip_norm, Guard(GuardOptions(), CPU), scale)
        if saved is not None:
            self._load(saved, whole)
        self.engine = Engine(whole, self.sync, update, mesh, seed=1)

    def step(self, shown: bool = False, saved: bool = False, batches: Sequence[Batch] | None = None) -> Agreed | None:
        """One step, whose rows the ranks share."""
        self.step_number += 1
        if batches is None:
            batches = [batch_of(self.step_number, self.group.rank, self.group.size)]
        self.engine.forward_backward(batches, TASK, self.step_number)
        self.engine.finish(is_shown=shown, is_saved=saved)
        return self.engine.step(self.optim.lr, self.step_number)

    def to(self, last: int, save_at: int = 0) -> "Training":
        """Up to step ``last``; saved at ``save_at`` and at the end. ``kept`` is what the first of these saved."""
        self.kept: Saved = {}
        while self.step_number < last:
            is_saved = self.step_number + 1 in (save_at, last)
            self.step(saved=is_saved)
            if is_saved:
                saved = self.save()
                self.kept = self.kept or saved
        return self

    def save(self) -> Saved:
        self.engine.check(self.step_number)
        return {piece.name: piece.tensor.clone() for piece in self.engine.state()}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def _load(self, saved: Saved, whole: Whole) -> None:
        with torch.no_grad():
            for piece in whole.slices:
                piece.tensor.copy_(saved[f"model.{piece.name}"])
        for name, value in saved.items():
            kind, key, of = (*name.split(".", 2), "")[:3]
            if kind == "optimizer":
                self.optimizer.state[dict(self.model.named_parameters())[of]][key] = value.clone()
        for piece in self.sync.state():
            piece.tensor.copy_(saved[piece.name])


def assert_equal(found: Saved, expected: Saved, tolerance: float = 0.0) -> None:
    """Of all numbers together, relative; 0: bit by bit."""
    assert found.keys() == expected.keys()
    if tolerance == 0:
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differing, differing
        return
    assert distance(found, expected) <= tolerance


def distance(found: Saved, expected: Saved) -> float:
    """|found - expected| / |expected|."""
    with torch.no_grad():
        square = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
        return (square / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def by_hand(
    ranks: int, steps: int, optim: OptimOptions, mixed: Callable[[int, list[nn.Module]], None]
) -> list[nn.Module]:
    """Models that one process trains side by side by plain torch, each on its rows. ``mixed(step, models)``: what they
    do together after each step.
    """
    models = [tiny_decoder() for _ in range(ranks)]
    optimizers = [make_optimizer(model.parameters(), optim) for model in models]
    for step in range(1, steps + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            batch = batch_of(step, rank, ranks)
            model.zero_grad()
            loss = TASK.loss(model, model(*TASK.inputs(batch)), batch)
            (loss.total / loss.weight).backward()
            optimizer.step()
        with torch.no_grad():
            mixed(step, models)
    return models
