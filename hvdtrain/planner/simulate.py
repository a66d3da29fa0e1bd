"""A whole run on a machine that fails, as a series of events: its time by the calendar, and what of that is training.

A job waits in the queue, starts, trains and saves in turn, until it is done, or a rank is lost, or its wall time is
over (before which it saves). Then the next job of the chain waits:

    job    [wait][start][train |s| train |s| tra*        a rank is lost: what came after the last save is gone
    job                                         [requeue][start][train |s| train |s| train |s]     wall time is over
    job                                                                                       [wait][start][train ...

Failures of single ranks are independent and come at a constant rate, so those of all together do so too, at ``ranks``
times the rate: a run of 100,000 ranks has as many events as it has failures and jobs, and many runs are simulated side
by side. Between two events everything is arithmetic.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.checkpoint.saver import interval_steps
from hvdtrain.errors import ConfigError

DAY_S = 86_400.0
RUNS = 400  # simulated side by side
_MOST_JOBS = 200_000  # of one run, before it is said to get nowhere
_SPREAD_OF_WAITS = 1.0  # of the logarithm: a tenth waits 3.6 times the median or longer

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """A run and the machine that it runs on.

    work_s: seconds of training that it needs, by itself. save_s: for which a save holds training up; write_s: until it
    is safe, counted from its beginning. restart_s: from a job's first second to its first step. requeue_s: from the
    loss of a rank to the next job's first second, on average. link_s: wall time of a job; queue_s: median wait of a job
    that follows on one whose wall time is over.
    """

    ranks: int
    work_s: float
    failures_per_rank_day: float
    save_every_s: float
    save_s: float
    write_s: float = 0.0
    restart_s: float = 0.0
    requeue_s: float = 0.0
    link_s: float = math.inf
    queue_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Between failures of the whole job."""
        rate = self.ranks * self.failures_per_rank_day / DAY_S
        return 1 / rate if rate else math.inf


@dataclass(frozen=True)
class Outcome:
    """Of each simulated run. calendar_s: from the first job's request to the end. held_s: of it, with nodes held.
    trained_s: training that was done, what was lost and done again among it. saving_s: in which saves held it up.
    """

    chain: Chain
    calendar_s: Numbers
    held_s: Numbers
    trained_s: Numbers
    saving_s: Numbers
    failures: Numbers
    jobs: Numbers

    @property
    def lost_s(self) -> Numbers:
        """Training that was done again."""
        return self.trained_s - self.chain.work_s

    @property
    def goodput(self) -> Numbers:
        """Of the time in which nodes were held, the share that trained for good."""
        return self.chain.work_s / self.held_s

    @property
    def effective(self) -> Numbers:
        """The same of all the time by the calendar; what Meta calls effective training time."""
        return self.chain.work_s / self.calendar_s


def daly(save_s: float, mean_s: float) -> float:
    """Seconds of training between two saves, by Daly's formula."""
    return float(interval_steps(save_s, 1.0, mean_s)) if math.isfinite(mean_s) else math.inf


def simulate(chain: Chain, runs: int = RUNS, seed: int = 1) -> Outcome:
    """``runs`` runs with other luck. The same seed gives other chains the same luck, so that they can be compared.

    Errors: ConfigError for a chain that does not get ahead.
    """
    _check(chain)
    rng = np.random.default_rng(seed)
    done = np.zeros(runs)  # and safe
    calendar, held, trained, saving, failures, jobs = (np.zeros(runs) for _ in range(6))
    wait = _waits(rng, chain.queue_s, runs)
    for _ in range(_MOST_JOBS):
        going = done < chain.work_s
        if not going.any():
            return Outcome(chain, calendar, held, trained, saving, failures, jobs)
        fails_at = rng.exponential(1.0, runs) * chain.mean_s if math.isfinite(chain.mean_s) else np.full(runs, np.inf)
        job = _run_job(chain, chain.work_s - done, fails_at)
        calendar += going * (wait + job["held"])
        held += going * job["held"]
        trained += going * job["trained"]
        saving += going * job["saving"]
        failures += going * job["failed"]
        jobs += going
        done = np.where(going, np.minimum(done + job["safe"], chain.work_s), done)
        requeued = rng.exponential(1.0, runs) * chain.requeue_s
        wait = np.where(job["failed"], requeued, _waits(rng, chain.queue_s, runs))
    raise ConfigError(f"the run is not done after {_MOST_JOBS:,} jobs: {_slow_words(chain)}")


def _run_job(chain: Chain, rest: Numbers, fails_at: Numbers) -> dict[str, Any]:
    """One job of each run. rest: training that it still needs. fails_at: seconds from the job's first."""
    every, save = chain.save_every_s, chain.save_s
    ends_after = rest + save * np.ceil(rest / every)  # the last save is the end's
    limit = chain.link_s - chain.restart_s - save  # then what there is by then is saved
    stops_after = np.minimum(ends_after, limit)
    runs_for = fails_at - chain.restart_s
    failed = runs_for < stops_after + np.where(ends_after <= limit, 0.0, save)
    ran = np.clip(np.minimum(runs_for, stops_after), 0.0, None)
    saves, into = np.divmod(ran, every + save)
    trained = np.minimum(saves * every + np.minimum(into, every), rest)
    last_safe = np.floor(np.clip(ran - chain.write_s + save, 0.0, None) / (every + save))
    safe = np.where(failed, np.minimum(saves, last_safe) * every, trained)
    at_limit = ~failed & (ends_after > limit)
    held = np.where(failed, fails_at, chain.restart_s + stops_after + at_limit * save)
    return {
        "failed": failed,
        "held": held,
        "trained": trained,
        "safe": safe,
        "saving": held - np.minimum(chain.restart_s, held) - trained,
    }


def _waits(rng: np.random.Generator, median_s: float, runs: int) -> Numbers:
    return np.asarray(median_s * np.exp(_SPREAD_OF_WAITS * rng.standard_normal(runs)))


def _check(chain: Chain) -> None:
    room = chain.link_s - chain.restart_s - chain.save_s
    if room <= 0:
        raise ConfigError(
            f"jobs of {hours(chain.link_s)}: starting takes {hours(chain.restart_s)} and saving {hours(chain.save_s)}, "
            "so nothing is left to train in; ask for longer jobs"
        )
    needed = chain.restart_s + min(chain.save_every_s + chain.save_s, room, chain.work_s)
    if needed / chain.mean_s > 7:  # one job in a thousand comes as far
        raise ConfigError(f"the run does not get ahead: {_slow_words(chain)}")


def _slow_words(chain: Chain) -> str:
    return (
        f"a rank of {chain.ranks:,} is lost every {hours(chain.mean_s)} on average, and from a job's begin to its "
        f"first save are {hours(chain.restart_s + chain.save_every_s + chain.save_s)}; "
        "save more often, or take fewer ranks"
    )


def best_interval(chain: Chain, runs: int = RUNS, seed: int = 1) -> Outcome:
    """The chain with the save interval that takes the least time, of those around Daly's; no save begins before the one
    before it is safe.
    """
    first = min(daly(chain.save_s, chain.mean_s), chain.work_s)
    first = max(first, chain.save_s, chain.write_s, 1.0)
    tried = {min(max(first * 2 ** (step / 2), chain.write_s), chain.work_s) for step in range(-6, 7)}
    return _best((replace(chain, save_every_s=every) for every in sorted(tried)), runs, seed)


def best_link(chain: Chain, links: Sequence[tuple[float, float]], runs: int = RUNS, seed: int = 1) -> Outcome:
    """The chain with the length of a job that takes the least time. links: (wall time, median wait), seconds."""
    return _best((replace(chain, link_s=link_s, queue_s=queue_s) for link_s, queue_s in links), runs, seed)


def _best(chains: Iterable[Chain], runs: int, seed: int) -> Outcome:
    """The chain with the least mean time by the calendar; those that get nowhere are left out, unless all do."""
    found: list[Outcome] = []
    problems: list[ConfigError] = []
    for chain in chains:
        try:
            found.append(simulate(chain, runs, seed))
        except ConfigError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return min(found, key=lambda one: float(one.calendar_s.mean()))


def hours(seconds: float) -> str:
    """In a unit that reads well."""
    for size, name in ((DAY_S, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}" if math.isfinite(seconds) else "no limit"
    return f"{seconds:,.1f} s"
