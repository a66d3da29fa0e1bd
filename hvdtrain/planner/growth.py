"""How the time of a step grows with the nodes: fitted to a few small runs, and told of larger ones with an interval.

The time of a microbatch on n nodes, in units of what it takes alone on the smallest number (n = 1):

    t(n) = a * (1 + e log2 n  +  (u + s [n > 1] + c log2 n) / m(n))

    a   a microbatch                                    e   what every doubling of the nodes adds to each microbatch
    u   paid once a step, on any number of nodes        s   and, once a step, for leaving the first node
    c   and, once a step, for every doubling            m   microbatches of a step

Where the global batch is fixed, m falls as n rises, so what is paid once a step weighs more and more: that is why such
runs scale worse than a law in n alone says. Where m is the same everywhere, u is a part of a, and e a part of c.

Two or three small runs do not determine five numbers. So the fit begins with what is usual (``PRIOR``) and moves away
from it as far as the runs ask for: a Bayesian linear regression, whose noise and whose coefficients are known up to a
few scales that are weighed against one another by how well each explains the runs. tests/bench/scaling_tables.py says
how PRIOR was found, and how well it predicts published tables that were left out when it was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvdtrain.errors import ConfigError

Numbers = NDArray[np.float64]


class Point(NamedTuple):
    """A run that was measured, or is asked for: seconds of one microbatch of a rank, its share of the step's other
    costs included. microbatches: of a step; 1 where it is the same at every size.
    """

    nodes: float
    seconds: float
    microbatches: float = 1.0


@dataclass(frozen=True)
class Prior:
    """Of (e, u, s, c): what is usual, how far one goes from it. noise: of a measurement, relative.

    u is in seconds, which hardly depend on how long a microbatch takes, up to ``most_u`` microbatches. s and c are of
    a very short microbatch; of one of ``short_s`` seconds, half of that: what is sent does not grow with it.
    scales, noises: by which ``spread`` and ``noise`` are multiplied, each pair as likely as another beforehand.
    """

    usual: tuple[float, float, float, float]
    spread: tuple[float, float, float, float]
    noise: float
    short_s: float = math.inf
    most_u: float = 3.0
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    noises: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)

    def sizes(self, seconds: float) -> Numbers:
        """By which both are multiplied where a microbatch takes so long."""
        less = 1.0 if math.isinf(self.short_s) else self.short_s / (self.short_s + seconds)
        return np.array([1.0, min(1 / seconds, self.most_u), less, less])


PRIOR = Prior(usual=(0.0137, 0.110, 0.0385, 0.0099), spread=(0.0100, 0.259, 0.198, 0.163), noise=0.0058, short_s=0.113)
_SPREAD_OF_A = 1.0
_MOST_GAIN = 0.8  # of the quickest measured microbatch: no number of nodes makes one quicker than that


@dataclass(frozen=True)
class Prediction:
    """seconds: of a microbatch, the median; low, high: the ends of the interval in which ``share`` of such are."""

    seconds: float
    low: float
    high: float
    share: float


class Growth:
    """Fitted to ``points``. Errors: ConfigError for fewer than two sizes, or sizes and times that cannot be."""

    def __init__(self, points: Sequence[Point], prior: Prior = PRIOR):
        _check(points)
        self._first = min(points)
        self._times = [point.seconds for point in points]
        self._mixture: list[tuple[float, Numbers, Numbers, float]] = []  # log weight, mean, covariance, noise
        rows = np.array([self._row(point) for point in points])
        times = np.array([point.seconds for point in points]) / self._first.seconds
        sizes = prior.sizes(self._first.seconds)
        for scale in prior.scales:
            for noise in prior.noises:
                mean = np.array([1.0, *(np.array(prior.usual) * sizes)])
                spread = np.diag([_SPREAD_OF_A**2, *(np.array(prior.spread) * sizes * scale) ** 2])
                self._mixture.append(_explain(rows, times, mean, spread, noise * prior.noise))

    def predict(self, nodes: float, microbatches: float = 1.0, share: float = 0.8) -> Prediction:
        """A run on ``nodes``, with so many microbatches a step."""
        weights, means, deviations = self._of(nodes, microbatches)
        least = _MOST_GAIN * min(self._times)
        low, middle, high = (
            max(least, self._first.seconds * _quantile(weights, means, deviations, at))
            for at in ((1 - share) / 2, 0.5, (1 + share) / 2)
        )
        return Prediction(middle, low, high, share)

    def log_density(self, point: Point) -> float:
        """Of a measured point, of its relative time: how little it surprises."""
        weights, means, deviations = self._of(point.nodes, point.microbatches)
        z = (point.seconds / self._first.seconds - means) / deviations
        return float(np.log(np.sum(weights * np.exp(-z * z / 2) / deviations)))

    def _of(self, nodes: float, microbatches: float) -> tuple[Numbers, Numbers, Numbers]:
        """The mixture's weights, means and deviations of the time there, relative to the first point's."""
        row = self._row(Point(nodes, 0.0, microbatches))
        logs = np.array([one[0] for one in self._mixture])
        weights = np.exp(logs - logs.max())
        means = np.array([row @ one[1] for one in self._mixture])
        variances = [row @ one[2] @ row + (one[3] * mean) ** 2 for one, mean in zip(self._mixture, means, strict=True)]
        return weights / weights.sum(), means, np.sqrt(variances)

    def _row(self, point: Point) -> Numbers:
        """a, a e, a u, a s, a c."""
        doublings, once = math.log2(point.nodes / self._first.nodes), 1 / point.microbatches
        left = float(point.nodes > 1) - float(self._first.nodes > 1)
        # What the first size pays once a step is in its time already, which is the unit.
        return np.array([1.0, doublings, once - 1 / self._first.microbatches, left * once, doublings * once])


def _check(points: Sequence[Point]) -> None:
    sizes = sorted({point.nodes for point in points})
    if len(sizes) < 2:
        said = f"only runs on {sizes[0]:g}" if sizes else "no run"
        raise ConfigError(f"{said}: how the time grows needs runs of two sizes at least, like 1 and 2 nodes")
    for point in points:
        if not (point.nodes > 0 and point.seconds > 0 and point.microbatches > 0 and math.isfinite(point.seconds)):
            raise ConfigError(f"{point.seconds:g} s on {point.nodes:g}: nothing that a run can take")


def _explain(
    rows: Numbers, times: Numbers, mean: Numbers, spread: Numbers, noise: float
) -> tuple[float, Numbers, Numbers, float]:
    """The posterior of a linear model with Gaussian prior and noise, and the logarithm of the data's density."""
    of_data = rows @ spread @ rows.T + np.diag((noise * times) ** 2)
    rest = times - rows @ mean
    solved = np.linalg.solve(of_data, np.column_stack([rest, rows @ spread]))
    gain = spread @ rows.T
    log = -0.5 * (rest @ solved[:, 0] + np.linalg.slogdet(of_data)[1])
    return float(log), mean + gain @ solved[:, 0], spread - gain @ solved[:, 1:], noise


def _quantile(weights: Numbers, means: Numbers, deviations: Numbers, at: float) -> float:
    """Of a mixture of normal distributions, by halving."""
    each = [NormalDist(mean, deviation) for mean, deviation in zip(means, deviations, strict=True)]
    low = min(one.inv_cdf(at) for one in each)
    high = max(one.inv_cdf(at) for one in each)
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(weight * one.cdf(middle) for weight, one in zip(weights, each, strict=True))
        low, high = (middle, high) if below < at else (low, middle)
    return (low + high) / 2
