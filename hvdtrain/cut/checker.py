"""Runs a schedule of a pipeline without computing anything: does it end, how long does it take, what does it keep?

    schedule = with_transfers(gpipe(ranks=4, microbatches=8))
    checked = check(schedule, Costs.alike(4))
    checked.makespan, checked.bubble, checked.alive

``draw`` makes the picture of a schedule that the docs show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from hvdtrain.cut.schedules import Action, Backward, Forward, InputGradient, Pass, Receive, Send, WeightGradient, needs


class WrongSchedule(Exception):
    """A pass is missing, or made twice, or in the wrong order or place."""


class Deadlock(Exception):
    """The ranks wait for one another; the message says for what."""


@dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) of each stage's passes.

    backward: both gradients. weights_share: of backward, the part that WeightGradient takes. transfer: from the end of
    a pass until its result is at the other rank.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weights_share: float = 0.5
    transfer: float = 0.0

    @classmethod
    def alike(cls, stages: int, transfer: float = 0.0) -> "Costs":
        """Forward 1, backward 2."""
        return cls([1.0] * stages, [2.0] * stages, transfer=transfer)

    def of(self, step: Pass) -> float:
        if isinstance(step, Forward):
            return self.forward[step.stage]
        backward = self.backward[step.stage]
        if isinstance(step, Backward):
            return backward
        share = self.weights_share
        return backward * (share if isinstance(step, WeightGradient) else 1 - share)


@dataclass(frozen=True)
class Event:
    step: Pass
    begin: float
    end: float


@dataclass(frozen=True)
class Checked:
    """events: of each rank, in order. alive: of each rank, the most microbatches of its stages whose activations it
    keeps at once. bubble: the ranks' idle share of the time from the first pass to the last.
    """

    events: list[list[Event]]
    makespan: float
    bubble: float
    alive: list[int]


def check(schedule: Sequence[Sequence[Action]], costs: Costs, synchronous: bool = False) -> Checked:
    """Run ``schedule``, which has its sends and receives.

    synchronous: a send returns when its receive has been posted, as MPI's does for all but small tensors where it is
    not told otherwise; else at once.

    Errors: WrongSchedule, Deadlock.
    """
    _check_passes(schedule)
    _check_transfers(schedule)
    stages = len(costs.forward)
    ranks = [_Rank(list(actions)) for actions in schedule]
    made: dict[Pass, float] = {}  # when its result is there
    posted: dict[Pass, float] = {}  # when somebody has made room for it
    while any(rank.has_more for rank in ranks):
        if not any(_go_on(rank, costs, stages, made, posted, synchronous) for rank in ranks):
            stuck = [f"rank {n} at {rank.actions[rank.place]}" for n, rank in enumerate(ranks) if rank.has_more]
            raise Deadlock("; ".join(stuck))
    makespan = max(rank.now for rank in ranks)
    busy = sum(event.end - event.begin for rank in ranks for event in rank.events)
    return Checked(
        [rank.events for rank in ranks], makespan, 1 - busy / (len(ranks) * makespan), [rank.most for rank in ranks]
    )


@dataclass
class _Rank:
    actions: list[Action]
    place: int = 0
    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    alive: int = 0
    most: int = 0

    @property
    def has_more(self) -> bool:
        return self.place < len(self.actions)

    def run(self, step: Pass, seconds: float) -> None:
        self.events.append(Event(step, self.now, self.now + seconds))
        self.now += seconds
        self.alive += isinstance(step, Forward)
        self.most = max(self.most, self.alive)
        self.alive -= isinstance(step, Backward | WeightGradient)


def _go_on(
    rank: _Rank, costs: Costs, stages: int, made: dict[Pass, float], posted: dict[Pass, float], synchronous: bool
) -> bool:
    """Run a rank's actions until it has to wait; False: it waits already."""
    began = rank.place
    while rank.has_more:
        action = rank.actions[rank.place]
        if isinstance(action, Receive):
            posted[action.made] = rank.now
        elif isinstance(action, Send):
            if synchronous:
                if action.made not in posted:
                    break
                rank.now = max(rank.now, posted[action.made])
            made[action.made] = rank.now + costs.transfer
        else:
            needed = needs(action, stages)
            if needed is not None:
                if needed not in made:
                    break
                if needed not in posted:
                    raise WrongSchedule(f"{action} takes what nobody has received: {needed}")
                rank.now = max(rank.now, made[needed])
            rank.run(action, costs.of(action))
        rank.place += 1
    return rank.place > began


def _check_passes(schedule: Sequence[Sequence[Action]]) -> None:
    """Each stage on its rank; of each microbatch forward once, then backward once, whole or in its two halves; the
    microbatches of a stage in ascending order.
    """
    passes = [(rank, action) for rank, actions in enumerate(schedule) for action in actions if isinstance(action, Pass)]
    stages = 1 + max(step.stage for _, step in passes)
    microbatches = 1 + max(step.microbatch for _, step in passes)
    for rank, step in passes:
        if step.stage % len(schedule) != rank:
            raise WrongSchedule(f"rank {rank} makes {step}, which is rank {step.stage % len(schedule)}'s")
    for stage in range(stages):
        mine = [step for _, step in passes if step.stage == stage]
        kinds = [kind for kind in (Forward, Backward, InputGradient, WeightGradient) if kind in map(type, mine)]
        if kinds not in ([Forward, Backward], [Forward, InputGradient, WeightGradient]):
            raise WrongSchedule(f"stage {stage} makes {', '.join(kind.__name__ for kind in kinds)}")
        for kind in kinds:
            order = [step.microbatch for step in mine if type(step) is kind]
            if order != list(range(microbatches)):
                raise WrongSchedule(f"stage {stage} makes {kind.__name__} of the microbatches {order}")
        for m in range(microbatches):
            made = [type(step) for step in mine if step.microbatch == m]
            if made != kinds:
                raise WrongSchedule(f"stage {stage}, microbatch {m}: {', '.join(kind.__name__ for kind in made)}")


def _check_transfers(schedule: Sequence[Sequence[Action]]) -> None:
    """Between two ranks the receives are in the order of the sends."""
    sends: dict[tuple[int, int], list[Pass]] = {}
    receives: dict[tuple[int, int], list[Pass]] = {}
    for rank, actions in enumerate(schedule):
        for action in actions:
            if isinstance(action, Send):
                sends.setdefault((rank, action.to), []).append(action.made)
            elif isinstance(action, Receive):
                receives.setdefault((action.source, rank), []).append(action.made)
    for source, to in {**sends, **receives}:
        given, taken = sends.get((source, to), []), receives.get((source, to), [])
        for number, (sent, received) in enumerate(zip_longest(given, taken)):
            if sent != received:
                raise WrongSchedule(f"rank {source} to {to}, number {number}: {sent} is sent, {received} received")


# --- pictures -----------------------------------------------------------------------------------------------------

_MARKS = {Forward: ">", Backward: "<", InputGradient: "<", WeightGradient: "w"}


def draw(schedule: Sequence[Sequence[Action]]) -> str:
    """A line a rank, two characters a unit of time; forward takes one unit, backward two, each half of it one.

    ``>3`` is forward of microbatch 3, ``<3--`` backward, ``<3`` and ``w3`` its halves; a rank's second stage calls the
    microbatches a, b, c.
    """
    passes = [[action for action in actions if isinstance(action, Pass)] for actions in schedule]
    stages = 1 + max(step.stage for mine in passes for step in mine)
    lines = []
    for rank, events in enumerate(check(schedule, Costs.alike(stages)).events):
        line = ""
        for event in events:
            name = chr(ord("a" if event.step.stage >= len(schedule) else "0") + event.step.microbatch)
            cell = (_MARKS[type(event.step)] + name).ljust(2 * int(event.end - event.begin), "-")
            line = line.ljust(2 * int(event.begin)) + cell
        lines.append(f"rank {rank}  {line}".rstrip())
    return "\n".join(lines)
