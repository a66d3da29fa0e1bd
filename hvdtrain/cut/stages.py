"""Which pieces of a model each stage of a pipeline has, so that the slowest stage is as fast as it can be.

    pieces   embed  attention  feed_forward  attention  feed_forward  end       costs  0 1 2 1 2 3
    stages   [------------ 0 ------------]   [---- 1 ----]  -> 3, 6             balance of 2 stages  4.5 / 5 = .9

A model's pieces follow one another, and may be parted between attention and feed-forward too.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch

from hvdtrain.errors import ConfigError
from hvdtrain.models.flops import piece_flops
from hvdtrain.models.layers import Attention
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Staged
from hvdtrain.tasks.task import Task


class Stage(NamedTuple):
    """pieces: numbers of the model's pieces, which follow one another; cost: of all of them."""

    pieces: range
    cost: float


def make_stages(model: Staged, task: Task, ranks: int, stages_per_rank: int = 1) -> list[Stage]:
    """The stages of a whole ``model`` that trains ``task``, by counted cost. Errors: ConfigError, see ``divide``."""
    costs = count_costs(model, task)
    return [Stage(pieces, sum(costs[piece] for piece in pieces)) for pieces in divide(costs, ranks, stages_per_rank)]


def count_costs(model: Staged, task: Task) -> list[float]:
    """Model FLOPs of each piece, for a row of the whole context (see models/flops.py); embeddings count for nothing."""
    options = cast(TransformerOptions, model.options)
    model = copy.copy(model)
    model.trained = None  # as if all of it were: where a model is cut does not depend on what is frozen
    with torch.device("meta"):
        whole = task.training_flops(model, task.example(1, options.context))
    found: list[float] = []
    pieces = model.pieces()
    for piece in pieces:
        is_causal = piece.kind == "attention" and cast(Attention, model.get_submodule(piece.needs[1])).causal
        found.append(piece_flops(options, piece.kind, options.context, is_causal))
    found[-1] = max(0, whole - sum(found))  # norm and head
    return found


def divide(costs: Sequence[float], ranks: int, stages_per_rank: int = 1) -> list[range]:
    """The pieces of each stage, in order: the cost of the dearest stage is the least that there is. Every stage has a
    piece that costs something.

    Of the ways that are as good it takes the one with the lightest first stages, which keep most activations; with
    several stages a rank one where the ranks' costs are about alike.

    Errors: ConfigError where there are more stages than pieces that cost something.
    """
    stages = ranks * stages_per_rank
    most = sum(cost > 0 for cost in costs)
    if stages > most:
        raise ConfigError(
            f"mesh.pipeline times cut.stages_per_rank makes {stages} stages, but the model can be cut into {most} "
            f"at most (between attention and feed-forward parts); choose at most {most}"
        )
    limits = sorted({total for end in range(1, len(costs) + 1) for total in accumulate(reversed(costs[:end]))})
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_from_the_end(costs, limits[middle], stages)) <= stages:
            high = middle
        else:
            low = middle + 1
    found = _from_the_end(costs, limits[low], stages)
    return found if stages_per_rank == 1 else _with_ranks_alike(costs, found, ranks)


def balance(costs: Sequence[float], stages: Sequence[range]) -> float:
    """Mean cost of a stage over that of the dearest: 1 where all are alike."""
    return balance_of([sum(costs[piece] for piece in stage) for stage in stages])


def balance_of(costs: Sequence[float]) -> float:
    """The same of the costs of stages, or of ranks that have several."""
    return sum(costs) / len(costs) / max(costs)


def _from_the_end(costs: Sequence[float], limit: float, stages: int) -> list[range]:
    """Stages of at most ``limit``, where it can be, each as long as it can be: the last is filled first. Where that
    would be fewer than ``stages``, the first ones have one costly piece each.
    """
    costly_until = list(accumulate(cost > 0 for cost in costs))
    found: list[range] = []
    end, total = len(costs), 0.0
    for piece in reversed(range(len(costs))):
        is_full = total + costs[piece] > limit
        is_needed = 0 < costly_until[piece] < stages - len(found)  # a stage for each of those that are left
        if costs[piece] > 0 and total > 0 and (is_full or is_needed):
            found.append(range(piece + 1, end))
            end, total = piece + 1, 0.0
        total = costs[piece] + total
    return [range(end), *reversed(found)]


def _with_ranks_alike(costs: Sequence[float], stages: Sequence[range], ranks: int) -> list[range]:
    """``stages`` whose boundaries have moved, a piece at a time, as long as that makes the dearest rank cheaper, and
    the dearest stage no dearer.
    """

    def sums(ends: Sequence[int]) -> list[float]:
        return [sum(costs[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def dearest(of_stage: Sequence[float]) -> list[float]:
        return sorted((sum(of_stage[rank::ranks]) for rank in range(ranks)), reverse=True)

    ends = [stage.stop for stage in stages]
    limit = max(sums(ends))
    while True:
        ways = [[*ends[:n], ends[n] + by, *ends[n + 1 :]] for n in range(len(ends) - 1) for by in (-1, 1)]
        fit = [way for way in ways if min(sums(way)) > 0 and max(sums(way)) <= limit]
        best = min(fit, key=lambda way: dearest(sums(way)), default=ends)
        if dearest(sums(best)) >= dearest(sums(ends)):
            return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        ends = best
