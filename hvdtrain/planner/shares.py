"""What each rank of a replica has of its model: cut as a run cuts it, and never made real.

pipe of 2, tensor of 2       rank 0, 1: stage 0      of a stage, the part of the tensor axis that has most
                             rank 2, 3: stage 1
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from hvdtrain.comm.axis import LocalAxis
from hvdtrain.config import RunConfig
from hvdtrain.cut.blueprint import Blueprint, Placed
from hvdtrain.cut.stages import Stage, balance_of, make_stages
from hvdtrain.cut.tensor import spread
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.pieces import Staged, keep
from hvdtrain.planner.workload import build_model
from hvdtrain.tasks import make_task


class _PlanAxis(LocalAxis):
    """The last of so many ranks, which has most, without the others; what they would send has the shape of its own."""

    def __init__(self, size: int):
        self.rank, self.size = size - 1, size

    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([part] * self.size, dim)

    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(self.size, dim)[self.rank].clone()


_axis_of = cache(_PlanAxis)  # graphs know axes by number, so there shall be one of a size


@dataclass(frozen=True)
class Share:
    """Of one rank of the pipe. stages: by number, on the meta device. holders: of each of its parameters, by the whole
    model's name, the ranks of a replica whose gradients of it add up. cost: of its stages, as stages.py counts it.
    in_blocks: names of the matrices of blocks.
    """

    stages: Mapping[int, Staged]
    holders: Mapping[str, int]
    parameters: Mapping[str, nn.Parameter]
    cost: float
    in_blocks: Collection[str] = ()

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters.values() if p.requires_grad)

    @property
    def matrices(self) -> list[int]:
        """Numbers in each weight that is made of matrices of blocks and is trained."""
        return [p.numel() for name, p in self.parameters.items() if p.requires_grad and name in self.in_blocks]

    @property
    def largest(self) -> int:
        """Numbers in the largest tensor that is trained."""
        return max((p.numel() for p in self.parameters.values() if p.requires_grad), default=0)

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for model in self.stages.values() for buffer in model.buffers())

    def by_holders(self) -> Mapping[int, int]:
        """Numbers that are trained, by how many ranks of a replica hold them."""
        found: dict[int, int] = {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                found[self.holders[name]] = found.get(self.holders[name], 0) + parameter.numel()
        return found


def shares_of(config: RunConfig, facts: CorpusFacts) -> list[Share]:
    """Of the ranks of the pipe, in order. Errors: ConfigError where the model has fewer pieces than stages."""
    blueprint = Blueprint(partial(build_model, config, facts))
    model, ranks = blueprint.copy(), config.mesh.pipeline
    stages, costs, placed = [model], [1.0], dict[str, Placed]()
    if config.mesh.tensor > 1:
        placed |= spread(model, _axis_of(config.mesh.tensor), config.cut.sequence, tell=lambda _: None)
    if ranks > 1:
        cut = make_stages(blueprint.model, make_task(config.task), ranks, config.cut.stages_per_rank)
        stages, costs = list(_in_stages(blueprint, model, cut)), [stage.cost for stage in cut]
    named = [dict(_named(blueprint, stages[rank::ranks])) for rank in range(ranks)]
    found, in_blocks = [], block_matrices(blueprint.wholes, config.model)
    for rank, own in enumerate(named):
        having = {name: sum(name in other for other in named) for name in own}
        for path, place in placed.items():
            if place.is_partial and (name := blueprint.names[path]) in having:
                having[name] *= config.mesh.tensor
        numbers = range(rank, len(stages), ranks)
        found.append(
            Share({number: stages[number] for number in numbers}, having, own, sum(costs[rank::ranks]), in_blocks)
        )
    return found


def balance(shares: Sequence[Share]) -> float:
    """Mean cost of a rank over that of the dearest."""
    return balance_of([share.cost for share in shares])


def _in_stages(blueprint: Blueprint, model: Staged, stages: Iterable[Stage]) -> Iterator[Staged]:
    """See ``hold`` in cut/pipeline.py: a parameter that two stages have is one."""
    pieces = blueprint.model.pieces()
    same = {id(parameter): parameter for parameter in model.parameters()}
    for stage in stages:
        one: Staged = copy.deepcopy(model, dict[int, Any](same))
        keep(one, pieces, [pieces[piece] for piece in stage.pieces])
        yield one


def _named(blueprint: Blueprint, models: list[Staged]) -> Iterator[tuple[str, nn.Parameter]]:
    for model in models:
        for path, parameter in model.named_parameters(remove_duplicate=False):
            yield blueprint.names[path], parameter
