"""How one replica is spread over ranks: whole, each layer over some (tensor), layer after layer (pipeline), or both."""

from dataclasses import dataclass

import torch

from hvdtrain.comm.mesh import Mesh
from hvdtrain.cut.blueprint import Blueprint, make_real
from hvdtrain.cut.cut import Replica
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.precision import Precision
from hvdtrain.cut.whole import Whole


@dataclass(frozen=True)
class Making:
    """How a replica is made. compile: of ``compiling.COMPILES``."""

    mesh: Mesh
    precision: Precision
    device: torch.device
    options: CutOptions
    compile: str = "none"


def make_replica(blueprint: Blueprint, how: Making) -> Replica:
    """The replica as the mesh cuts it, in training; its weights are not set (collective where it is cut)."""
    assert how.mesh.own.size == 1, "nobody cuts a model yet"
    model = blueprint.copy()
    make_real(model, how.device)
    slices = blueprint.slices(model, how.mesh)
    return Whole(model.train(), how.mesh, how.precision, how.compile, slices)
