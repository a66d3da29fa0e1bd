"""Do the nodes' clocks agree? The order of events proves by how much they differ at least.

    a   enter |-------------| leave           nobody leaves a barrier before everybody has entered it, so
    b       enter |-----| leave               enter_a - leave_b  <=  clock_a - clock_b  <=  leave_a - enter_b

A rank that comes late, or is slow, only widens what is possible; it never looks like a wrong clock.
"""

import time
from collections.abc import Sequence
from statistics import median_low

from hvdtrain.comm.group import Group
from hvdtrain.jobs.preflight.findings import Look

Rounds = Sequence[tuple[float, float]]  # (enter, leave) of each barrier, by the rank's own clock, in seconds

_ROUNDS = 10


def meet(group: Group) -> list[Rounds]:
    """Each rank's rounds (collective)."""
    rounds = []
    for _ in range(_ROUNDS):
        entered = time.time()
        group.barrier()
        rounds.append((entered, time.time()))
    return group.all_gather_object(rounds)


def look_at_clocks(rounds: Sequence[Rounds], max_skew_s: float) -> list[Look]:
    """One look a node, each against the middle one of all clocks; of two against the first.

    A difference counts only as far as it is proved.
    """
    found = [ahead(mine, rounds[0]) for mine in rounds]
    middle = median_low([offset for offset, _ in found]) if len(found) > 2 else 0.0
    looks = []
    for offset, unsure in found:
        skew_s = offset - middle
        text = f"{skew_s * 1e3:+.1f} ms (± {unsure * 1e3:.1f})" if abs(skew_s) < 1 else f"{skew_s:+.2f} s"
        problem = f"more than {max_skew_s:g} s from the others" if abs(skew_s) - unsure > max_skew_s else ""
        looks.append(Look("clock", text, problem, amount=skew_s))
    return looks


def ahead(mine: Rounds, others: Rounds) -> tuple[float, float]:
    """By how many seconds one clock is ahead of another, and how far from that the truth may be."""
    both = list(zip(mine, others, strict=True))
    least = max(enter - other_leave for (enter, _), (_, other_leave) in both)
    most = min(leave - other_enter for (_, leave), (other_enter, _) in both)
    return (least + most) / 2, max(0.0, (most - least) / 2)
