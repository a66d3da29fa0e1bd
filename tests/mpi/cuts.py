"""A few steps of a tiny model on a mesh, and the same on one process: gradients and parameters as whole tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import Mesh, MeshOptions, make_mesh, whole_replicas
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint, fill_slices
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.batch import IGNORE, AnyBatch, Batch, LabelBatch, PairBatch
from hvdtrain.data.sampler import even_parts
from hvdtrain.data.shards import Manifest
from hvdtrain.engine import Engine
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Staged
from hvdtrain.models.recompute import RecomputeOptions, use_recompute
from hvdtrain.optim.ema import EmaOptions, make_ema
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.loss_scale import LossScale
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Update
from hvdtrain.slices import Slice
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.sync.matrices import make_matrices
from hvdtrain.tasks import TaskOptions, make_task

CPU = torch.device("cpu")
VOCAB, LABELS, ROWS, POSITIONS, SEED = 50, 3, 8, 8, 7
LR = 1e-3  # ten times as much makes of an encoder-decoder whatever the rounding says
MANIFEST = Manifest(VOCAB, "", "uint16", (), {}, label_names=tuple("abc"))
Whole = Mapping[str, torch.Tensor]
_ALONE: "dict[tuple[str, int], Outcome]" = {}  # what one process has made of a trial


@dataclass(frozen=True)
class Trial:
    """``model``: options; ``settings``: of the rooms, by their names; ``microbatch``: rows of a forward pass."""

    task: str = "lm"
    model: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    optim: Mapping[str, Any] = field(default_factory=dict)
    sync: Mapping[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    compile: str = "none"
    ema: float = 0.0
    guard: Mapping[str, Any] = field(default_factory=dict)
    microbatch: int = 1

    def make(self) -> Staged:
        # A bias of keys has no gradient but rounding, which AdamW makes as large as any other.
        small = {"layers": 4, "heads": 4, "width": 32, "context": POSITIONS, "qkv_bias": "no", **self.model}
        model: Staged = make_task(TaskOptions(name=self.task)).make_model(TransformerOptions(**small), MANIFEST)
        use_recompute(model, RecomputeOptions(name=self.recompute))
        return model

    def engine(self, mesh: Mesh, cut: CutOptions) -> Engine:
        task = make_task(TaskOptions(name=self.task))
        blueprint, precision = Blueprint(self.make), PRECISIONS[self.precision]
        replica = make_replica(blueprint, Making(mesh, precision, CPU, task, cut, self.compile))
        fill_slices(replica.slices, blueprint.initial(SEED))
        sync = make_sync(SyncOptions(**self.sync), replica.slices, replica.computing, mesh, replica.uses)
        # A small eps lets AdamW move a weight whose gradient is nearly nothing by what its rounding says.
        options = OptimOptions(**{"lr": LR, "eps": 1e-3, "clip_norm": 0.0, **self.optim})
        matrices = None
        if options.name == "muon":
            parts = block_matrices(blueprint.wholes, blueprint.model.options)
            matrices, _ = make_matrices(sync, parts, options.muon, mesh, CPU, fast=False)
        moved = [piece.tensor for piece in sync.moves]
        optimizer = make_optimizer(moved, options, sync.norms, matrices=matrices)
        scale = LossScale(CPU) if precision.scaled else None
        update = Update(optimizer, options.clip_norm, Guard(GuardOptions(**self.guard), CPU), scale)
        return Engine(replica, sync, update, mesh, SEED, make_ema(sync.moves, EmaOptions(decay=self.ema)))

    def microbatches(self, mesh: Mesh, step: int) -> list[AnyBatch]:
        """This replica's rows of the step's, which are the same for any number of replicas."""
        first, count = even_parts(ROWS, mesh.replicas)[mesh.number]
        return [
            batch_of(self.task, step, range(begin, min(begin + self.microbatch, first + count)))
            for begin in range(first, first + count, self.microbatch)
        ]


@dataclass(frozen=True)
class Outcome:
    """gradients: of the first step, divided and clipped; losses: of each step; scores: of an evaluation at the end."""

    gradients: Whole
    parameters: Whole
    losses: Sequence[float]
    norms: Sequence[float]
    scores: Mapping[str, float]
    averages: Whole
    engine: Engine


def batch_of(task: str, step: int, rows: range) -> AnyBatch:
    """Row r of a step is the same in every batch; about half of the targets count."""
    generators = [torch.Generator().manual_seed(1000 * step + row) for row in rows]
    tokens = torch.stack([torch.randint(VOCAB, (POSITIONS,), generator=g) for g in generators])
    targets = torch.stack([torch.randint(VOCAB, (POSITIONS,), generator=g) for g in generators])
    drawn = torch.stack([torch.rand(POSITIONS, generator=g) for g in generators])
    targets = targets.where(drawn < 0.6, IGNORE)
    targets[:, 0] = tokens[:, 0]
    count, lengths = int((targets != IGNORE).sum()), 1 + drawn[:, 0].mul(POSITIONS).long()
    if task == "lm":
        return Batch(tokens, targets, count)
    if task == "seq2seq":
        return PairBatch(tokens.flip(1), lengths, tokens, targets, count)
    return LabelBatch(tokens, lengths, torch.zeros_like(tokens), tokens[:, 1] % LABELS, len(rows))


def run(trial: Trial, mesh: Mesh, cut: CutOptions, steps: int) -> Outcome:
    engine, task = trial.engine(mesh, cut), make_task(TaskOptions(name=trial.task))
    gradients: Whole = {}
    losses, norms = [], []
    for step in range(1, steps + 1):
        engine.forward_backward(trial.microbatches(mesh, step), task, step)
        engine.finish()
        agreed = engine.step(LR, step)
        assert agreed is not None
        losses.append(float(agreed.loss))
        norms.append(float(agreed.grad_norm))
        if step == 1:
            gradients = put_together(mesh, engine.sync.moves, [piece.tensor.grad for piece in engine.sync.moves])
    scores = engine.evaluate(trial.microbatches(mesh, 99), task)
    engine.check(steps)
    parameters = put_together(mesh, engine.replica.slices, [piece.tensor for piece in engine.replica.slices])
    averages: Whole = {}
    if engine.ema is not None:
        held = engine.ema.averages()
        averages = put_together(mesh, held, [piece.tensor for piece in held])
    engine.close()
    return Outcome(gradients, parameters, losses, norms, scores, averages, engine)


def put_together(mesh: Mesh, slices: Sequence[Slice], tensors: Sequence[torch.Tensor | None]) -> Whole:
    """Whole tensors out of what all ranks hold of them; a place that nobody holds is nan."""
    mine = [
        (piece.name, piece.whole, piece.places, None if tensor is None else tensor.detach().float().numpy())
        for piece, tensor in zip(slices, tensors, strict=True)
    ]
    whole: dict[str, torch.Tensor] = {}
    for name, shape, places, values in (one for held in mesh.world.all_gather_object(mine) for one in held):
        if values is None:
            continue
        tensor = whole.setdefault(name, torch.full(shape, torch.nan))
        held = torch.from_numpy(values)
        parts = held.split([place.shape[0] for place in places]) if len(places) > 1 else [held]
        for place, part in zip(places, parts, strict=True):
            tensor[tuple(slice(a, a + n) for a, n in zip(*place, strict=True))] = part.reshape(place.shape)
    return whole


def distances(found: Whole, expected: Whole) -> dict[str, float]:
    """|found - expected| / |expected| of each tensor; nan where one of them has it alone."""
    assert found.keys() == expected.keys()
    least = 1e-6 * max(float(tensor.norm()) for tensor in expected.values())  # below it is rounding, as of a key's bias
    return {
        name: float((found[name] - tensor).norm() / max(float(tensor.norm()), least))
        for name, tensor in expected.items()
    }


def alone(trial: Trial, steps: int) -> Outcome:
    """One process, which has the whole model and all rows."""
    key = repr(trial), steps
    if key not in _ALONE:
        _ALONE[key] = run(trial, whole_replicas(LocalGroup()), CutOptions(), steps)
    return _ALONE[key]


@cache
def mesh_of(group: Group, tensor: int, pipeline: int) -> Mesh:
    """One for each shape: groups of ranks are made once in a process."""
    return make_mesh(group, MeshOptions(tensor=tensor, pipeline=pipeline))
