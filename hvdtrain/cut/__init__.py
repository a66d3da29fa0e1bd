"""How one replica is spread over ranks. A cut is one file and one line in this table."""

from torch import nn

from hvdtrain.comm.mesh import Mesh
from hvdtrain.cut.cut import Cut, Replica
from hvdtrain.cut.precision import Precision
from hvdtrain.cut.whole import Whole

CUTS: dict[str, Cut] = {
    "whole": Whole,
}


def make_replica(model: nn.Module, mesh: Mesh, precision: Precision, compile: str = "none") -> Replica:
    """The replica as the mesh cuts it. model: whole, on its device. compile: of ``compiling.COMPILES``."""
    assert mesh.own.size == 1, "nobody cuts a model yet"
    return CUTS["whole"](model, mesh, precision, compile)
