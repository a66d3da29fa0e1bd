"""How a replica is cut, where ``mesh`` spreads it over ranks."""

from typing import Literal

from hvdtrain.options import Options, option

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]


class CutOptions(Options):
    schedule: ScheduleName = option(
        "1f1b",
        "order of a pipeline's passes; gpipe: all forward, then all backward; 1f1b: in turn, fewer activations alive; "
        "interleaved: several stages a rank, a smaller bubble; zero_bubble: gradients of weights fill the bubble",
    )
    stages_per_rank: int = option(1, "interleaved: stages of a pipeline that each rank holds", ge=1)
    sequence: bool = option(
        True, "mesh.tensor above 1: norms and dropout are shared by positions too, which keeps fewer activations"
    )
