"""In which order the ranks of a pipeline run the passes of a step: lists of instructions, made by pure functions.

Stage s lies on rank s % ranks, so that with several stages a rank the activations go round and round:

    stages_per_rank 1    rank 0: stage 0       stages_per_rank 2    rank 0: stages 0, 4
                         rank 1: stage 1                            rank 1: stages 1, 5
                         rank 2: stage 2                            rank 2: stages 2, 6
                         rank 3: stage 3                            rank 3: stages 3, 7

Every stage sees the microbatches in ascending order, forward and backward, so that a gradient's sum over them is made
in the order in which one process makes it. docs/cuts.md has a drawing of each schedule; checker.py runs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Pass:
    """Something that a stage computes of a microbatch."""

    stage: int
    microbatch: int


class Forward(Pass):
    """Activations; the end of the pipeline makes the loss of them."""


class Backward(Pass):
    """Both gradients, of the stage's input and of its weights."""


class InputGradient(Pass):
    """What the stage before waits for."""


class WeightGradient(Pass):
    """The other half of backward, for which nobody waits; after the input's gradient."""


@dataclass(frozen=True, slots=True)
class Send:
    """Hand what ``made`` has given to rank ``to``; do not wait until it is there."""

    made: Pass
    to: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Make room for what rank ``source`` sends of ``made``, without waiting. The pass that needs it waits."""

    made: Pass
    source: int


Action = Pass | Send | Receive
Schedule = list[list[Pass]]  # of each rank
OfPass = TypeVar("OfPass", bound=Pass)


def gpipe(ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """All forward, then all backward: the activations of all microbatches are alive at once (Huang et al. 2019)."""
    assert stages_per_rank == 1
    every = range(microbatches)
    return [[*(Forward(rank, m) for m in every), *(Backward(rank, m) for m in every)] for rank in range(ranks)]


def one_forward_one_backward(ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """Backward as soon as it can be: a rank keeps the activations of as many microbatches as there are stages from its
    own to the last (Narayanan et al. 2021, "PipeDream-Flush"). The bubble is GPipe's.
    """
    assert stages_per_rank == 1
    schedule = []
    for rank in range(ranks):
        forward = [Forward(rank, m) for m in range(microbatches)]
        backward = [Backward(rank, m) for m in range(microbatches)]
        schedule.append(_in_turn(forward, backward, warmup=ranks - rank - 1))
    return schedule


def interleaved(ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """Several stages a rank, so that the first microbatch comes sooner to the last rank: the bubble is divided by
    ``stages_per_rank``; there are as many times more transfers (Narayanan et al. 2021, 2104.04473, 2.2).

    A rank takes a group of microbatches through its first stage, then the same through its second, and so on. A group
    has ``ranks`` of them, or a few more where they do not divide: with fewer the ranks would wait for one another.
    """
    count = max(1, microbatches // ranks)
    ends = [microbatches * (number + 1) // count for number in range(count)]
    groups = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    schedule = []
    for rank in range(ranks):
        stages = range(rank, ranks * stages_per_rank, ranks)
        forward = [Forward(stage, m) for group in groups for stage in stages for m in group]
        backward = [Backward(stage, m) for group in groups for stage in reversed(stages) for m in group]
        warmup = 2 * (ranks - rank - 1) + (stages_per_rank - 1) * max(map(len, groups))
        schedule.append(_in_turn(forward, backward, warmup))
    return schedule


def zero_bubble(ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """1F1B whose backward is divided: gradients of weights fill what was bubble (Qi et al. 2023, "ZB-H1").

    Rank r is r weight gradients late, which makes every rank keep the activations of ``ranks`` microbatches: as many as
    1F1B's first rank.
    """
    assert stages_per_rank == 1
    schedule: Schedule = []
    for rank, passes in enumerate(one_forward_one_backward(ranks, microbatches)):
        mine: list[Pass] = []
        weights = 0
        for step in passes:
            if isinstance(step, Forward):
                mine.append(step)
                continue
            mine.append(InputGradient(rank, step.microbatch))
            if step.microbatch - weights >= rank:
                mine.append(WeightGradient(rank, weights))
                weights += 1
        schedule.append([*mine, *(WeightGradient(rank, m) for m in range(weights, microbatches))])
    return schedule


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}


def needs(step: Pass, stages: int) -> Pass | None:
    """The pass of another stage whose result ``step`` takes; None: it takes a batch, or what its own stage has."""
    if isinstance(step, Forward):
        return _of_stage(step, step.stage - 1) if step.stage > 0 else None
    if isinstance(step, WeightGradient):
        return None
    return _of_stage(step, step.stage + 1) if step.stage + 1 < stages else None


def goes_to(step: Pass, stages: int) -> int | None:
    """The stage that takes the result of ``step``; None: nobody does."""
    if isinstance(step, WeightGradient):
        return None
    other = step.stage + 1 if isinstance(step, Forward) else step.stage - 1
    return other if 0 <= other < stages else None


def with_transfers(schedule: Schedule, ahead: int = 1) -> list[list[Action]]:
    """The same with sends and receives: for each rank what it does, in order.

    ahead: so many passes before it is needed a receive is posted; 0: just before the pass that needs it. Between two
    ranks the receives stand in the order of the sends, which is how they are matched.
    """
    ranks, stages = len(schedule), 1 + max(step.stage for passes in schedule for step in passes)
    sent: dict[tuple[int, int], list[Pass]] = {}
    for rank, passes in enumerate(schedule):
        for step in passes:
            if (stage := goes_to(step, stages)) is not None:
                sent.setdefault((rank, stage % ranks), []).append(step)
    return [_with_transfers(rank, passes, ranks, stages, sent, ahead) for rank, passes in enumerate(schedule)]


def _with_transfers(
    rank: int, passes: list[Pass], ranks: int, stages: int, sent: dict[tuple[int, int], list[Pass]], ahead: int
) -> list[Action]:
    actions: list[Action] = []
    posted = dict.fromkeys(range(ranks), 0)  # of each source, how many
    for number, step in enumerate(passes):
        first = 0 if number == 0 else number + ahead
        for later in passes[first : number + ahead + 1]:
            if (made := needs(later, stages)) is not None:
                source = made.stage % ranks
                end = sent[source, rank].index(made) + 1
                actions += [Receive(made, source) for made in sent[source, rank][posted[source] : end]]
                posted[source] = max(posted[source], end)
        actions.append(step)
        if (stage := goes_to(step, stages)) is not None:
            actions.append(Send(step, stage % ranks))
    return actions


def _in_turn(forward: Sequence[Pass], backward: Sequence[Pass], warmup: int) -> list[Pass]:
    """``warmup`` forward passes, then one forward and one backward in turn, then the rest backward."""
    warmup = min(warmup, len(forward))
    pairs = zip(forward[warmup:], backward, strict=False)
    steady = [step for pair in pairs for step in pair]
    return [*forward[:warmup], *steady, *backward[len(forward) - warmup :]]


def _of_stage(step: OfPass, stage: int) -> OfPass:
    return replace(step, stage=stage)
