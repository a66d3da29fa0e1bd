"""Who is slow gets fewer rows, soon and once; who recovers gets them back; noise moves nothing."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from tiny import CPU

from hvdtrain.watch.balance import Balance, BalanceOptions, new_speeds
from hvdtrain.watch.meter import StepTimes

EVERY = 5
Seconds = Callable[[int, int], float]  # of one row: (step, rank)


class Ranks:
    """Ranks without a computer: each takes its seconds a row, and ``fixed`` seconds a step."""

    def __init__(self, ranks: int, rows: int, a_row: Seconds, fixed: float = 0.0, noise: float = 0.0):
        self._all = [Balance(BalanceOptions(every=EVERY), rank, ranks, CPU) for rank in range(ranks)]
        self._rows, self._a_row, self._fixed, self._noise = rows, a_row, fixed, noise
        self._chance = np.random.default_rng(1)
        self.step, self.counts = 0, [rows // ranks] * ranks
        self.changed_at: list[int] = []
        self.slowest: list[float] = []  # of each step, without noise

    def train(self, steps: int) -> "Ranks":
        for _ in range(steps):
            self.step += 1
            told = [one.told(self.step) for one in self._all]
            times = [self._fixed + count * self._a_row(self.step, n) for n, count in enumerate(self.counts)]
            self.slowest.append(max(times))
            for one, own in zip(self._all, times, strict=True):
                own *= 1 + self._noise * self._chance.uniform(-1, 1)
                one.note(StepTimes(data=0.1 * own, compute=0.8 * own, sync=max(times) - own, optimizer=0.1 * own))
            if told[0] is not None:
                total = torch.stack(told).sum(0)
                for one in told:
                    one.copy_(total)
            said = {one.decide(self._rows) for one in self._all}
            assert len({one.speeds for one in self._all}) == 1
            if said != {""}:
                self.changed_at.append(self.step)
                self.counts = self._all[0].rows
        return self

    @property
    def reported(self) -> dict[str, float]:
        return dict(self._all[-1].report())

    def share_of_ideal(self) -> float:
        """The last step beside one in which rows are no whole things; nobody has time that does not go with rows."""
        ideal = self._rows / sum(1 / self._a_row(self.step, rank) for rank in range(len(self.counts)))
        return ideal / (self.slowest[-1] - self._fixed)


def slowed(rank: int, factor: float, first: int = 0, last: int = 10**9) -> Seconds:
    return lambda step, of: 0.01 * (factor if of == rank and first < step <= last else 1.0)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_one_look_is_enough_where_time_goes_with_rows(ranks: int, factor: float):
    run = Ranks(ranks, 16 * ranks, slowed(1, factor)).train(EVERY + 1)
    assert run.share_of_ideal() >= 0.92
    assert run.train(50).changed_at == [EVERY]


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_three_looks_are_enough_where_some_does_not(noise: float):
    """A third of an equal share's time is the optimizer's. Nothing moves back and forth afterwards."""
    run = Ranks(4, 64, slowed(2, 2.0), fixed=0.08, noise=noise).train(3 * EVERY + 1)
    assert run.share_of_ideal() >= 0.9
    assert len(run.changed_at) <= 3
    before = len(run.changed_at)
    assert len(run.train(500).changed_at) - before <= 1


def test_noise_moves_nothing():
    assert Ranks(8, 128, slowed(0, 1.0), noise=0.04).train(1000).changed_at == []


def test_who_recovers_gets_its_rows_back():
    run = Ranks(4, 64, slowed(3, 2.0, first=20, last=60)).train(40)
    assert run.counts == [19, 18, 18, 9]
    assert run.train(60).counts == [16, 16, 16, 16]
    assert run.changed_at == [25, 65]  # the median of steps 20 to 24, and of 60 to 64, is the new one
    assert run.reported == {"imbalance": 1.0, "fewest_rows": 16, "most_rows": 16, "share_changes": 2}


def test_the_line_tells_how_uneven_the_last_look_was():
    run = Ranks(4, 64, slowed(3, 2.0))
    assert run.reported == {}
    run.train(EVERY)
    assert run.reported == {"imbalance": 1.6, "fewest_rows": 9, "most_rows": 19, "share_changes": 1}
    run.train(EVERY)  # 19 : 18 : 18 : 2 x 9
    assert run.reported == {"imbalance": 1.0411, "fewest_rows": 9, "most_rows": 19, "share_changes": 1}


@pytest.mark.parametrize(
    ("counts", "seconds", "moves"),
    [
        ([16, 16], [1.0, 1.0], False),
        ([16, 16], [1.0, 1.06], False),  # a whole row is too much
        ([16, 16], [1.0, 1.2], True),
        ([100, 100], [1.0, 1.10], False),  # 4.5 % of the longest time
        ([100, 100], [1.0, 1.12], True),
        ([1, 31], [5.0, 1.0], False),  # it has one row, and keeps it
    ],
)
def test_rows_change_hands_for_a_twentieth_of_the_longest_time(
    counts: Sequence[int], seconds: Sequence[float], moves: bool
):
    assert (new_speeds(sum(counts), counts, seconds) is not None) == moves


def told_alone(balance: Balance, steps: int, seconds: float) -> list[float]:
    for _ in range(steps):
        balance.note(StepTimes(compute=seconds))
    return balance.told(EVERY).tolist()


def test_each_tells_its_median_at_its_own_place():
    balance = Balance(BalanceOptions(every=EVERY), 1, 3, CPU)
    balance.note(StepTimes(compute=9.0, sync=50.0))
    assert told_alone(balance, 4, 2.0) == [0.0, 2.0, 0.0]
    assert balance.told(EVERY + 1) is None
    assert balance.decide(12) == ""


@pytest.mark.parametrize(("slow", "known"), [(2.0, 0.0), (1.0, 1.0)])
def test_a_step_under_the_old_shares_tells_nothing_of_the_new(slow: float, known: float):
    """Rows change hands after step 1, or do not: is what step 1 took still told in step 2?"""
    balance = Balance(BalanceOptions(every=1), 0, 2, CPU)
    balance.note(StepTimes(compute=1.0))
    balance.told(1)[1] = slow
    balance.note(StepTimes(compute=1.0))
    assert bool(balance.decide(30)) == (slow > 1)
    assert balance.told(2).tolist() == [known, 0.0]


def test_where_one_rank_knows_of_no_step_nobody_decides():
    balance = Balance(BalanceOptions(every=EVERY), 0, 2, CPU)
    assert told_alone(balance, 3, 2.0) == [2.0, 0.0]
    assert balance.decide(12) == ""
    assert balance.report() == {}
    assert balance.summary() is None


def test_one_rank_and_runs_that_do_not_ask_exchange_nothing():
    for options, ranks in ((BalanceOptions(every=EVERY), 1), (BalanceOptions(), 4)):
        balance = Balance(options, 0, ranks, CPU)
        balance.note(StepTimes(compute=1.0))
        assert [balance.told(step) for step in range(1, 30)] == [None] * 29


def test_a_server_has_no_place_and_decides_as_the_others():
    server = Balance(BalanceOptions(every=EVERY), 2, 2, CPU)
    told = server.told(EVERY)
    assert told.tolist() == [0.0, 0.0]
    told.copy_(torch.tensor([1.0, 2.0]))
    assert server.decide(30) == "from now on ranks take 20, 10 rows of a step; for what they had, they took 1 to 2 s"
    assert server.summary() == {"rows": [20, 10], "share_changes": 1, "imbalance": 1.3333}


def test_of_many_ranks_only_the_range_is_told():
    server = Balance(BalanceOptions(every=EVERY), 20, 20, CPU)
    server.told(EVERY).copy_(torch.tensor([4.0] + [1.0] * 19))
    assert "ranks take 2 to 11 rows" in server.decide(200)
