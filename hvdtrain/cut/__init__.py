"""How one replica is spread over ranks: whole, each layer over some (tensor), layer after layer (pipeline), or both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.cut.blueprint import Blueprint, make_real
from hvdtrain.cut.cut import Replica
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.pipeline import Pipeline, hold
from hvdtrain.cut.precision import Precision
from hvdtrain.cut.stages import Stage, make_stages
from hvdtrain.cut.tensor import spread
from hvdtrain.cut.whole import Whole
from hvdtrain.errors import say
from hvdtrain.tasks.task import Task


@dataclass(frozen=True)
class Making:
    """How a replica is made. task: what it trains, for what its stages cost. compile: of ``compiling.COMPILES``. tell:
    gets on rank 0 what the user must be told, then or in the first step. stages: of a pipeline; None: by counted cost.
    """

    mesh: Mesh
    precision: Precision
    device: torch.device
    task: Task
    options: CutOptions
    compile: str = "none"
    tell: Callable[[str], None] = say
    stages: Sequence[Stage] | None = None


def make_replica(blueprint: Blueprint, how: Making) -> Replica:
    """The replica as the mesh cuts it, in training; its weights are not set (collective where it is cut)."""
    mesh, options = how.mesh, how.options
    model, placed = blueprint.copy(), None
    if mesh.tensor.size > 1:
        tell = how.tell if mesh.world.rank == 0 else lambda _: None
        placed = mesh.world.together(lambda: spread(model, mesh.tensor, options.sequence, tell))
    if mesh.pipe.size > 1:
        stages = how.stages or mesh.world.together(
            lambda: make_stages(blueprint.model, how.task, mesh.pipe.size, options.stages_per_rank)
        )
        held = hold(blueprint, model, mesh, how.device, stages, placed)
        return Pipeline(held, mesh, how.precision, options.schedule, how.compile)
    make_real(model, how.device)
    slices = blueprint.slices(model, mesh, placed)
    return Whole(model.train(), mesh, how.precision, how.compile, slices)
