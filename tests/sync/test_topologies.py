"""Mixing matrices: stochastic by columns and rows, of the neighbours that belong there, and how fast they mix."""

import math

import pytest
import torch

from hvdtrain.errors import ConfigError
from hvdtrain.sync import SyncOptions, check_sync
from hvdtrain.sync.gossip import GossipOptions
from hvdtrain.sync.topologies import counts_near, fits, matrices, spectral_gap

TOPOLOGIES = ("ring", "torus", "hypercube", "exponential")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_nothing_is_lost_and_the_mean_stays(topology: str):
    for ranks in (n for n in (1, 2, 3, 4, 6, 8, 9, 12, 16) if fits(topology, n)):
        for matrix in matrices(topology, ranks):
            assert matrix.min() >= 0
            assert (matrix.sum(0) - 1).abs().max() < 1e-15
            assert (matrix.sum(1) - 1).abs().max() < 1e-15
            assert topology == "exponential" or torch.equal(matrix, matrix.T)
            assert (matrix.diagonal() > 0).all()
        if ranks > 1:
            assert 0 < spectral_gap(matrices(topology, ranks)) <= 1


def neighbours(topology: str, ranks: int) -> list[set[int]]:
    return [set((row > 0).nonzero().flatten().tolist()) for row in matrices(topology, ranks)[0]]


def test_who_mixes_with_whom():
    assert neighbours("ring", 5)[0] == {4, 0, 1}
    assert neighbours("ring", 2) == [{0, 1}, {0, 1}]
    #  0  1  2  3
    #  4  5  6  7
    #  8  9 10 11
    assert neighbours("torus", 12)[5] == {5, 4, 6, 1, 9}
    assert neighbours("torus", 12)[0] == {0, 3, 1, 8, 4}
    assert neighbours("hypercube", 8)[5] == {5, 4, 7, 1}
    hops = [[int(row.nonzero().flatten()[row.nonzero().flatten() != 0][0]) for row in m[:1]] for m in
            matrices("exponential", 8)]  # fmt: skip
    assert hops == [[7], [6], [4]]


def test_the_gap_is_what_theory_says():
    """A ring is circulant: its second eigenvalue is 1/3 + 2/3 cos(2 pi / n). Hypercube: 1 - 2 / (d + 1)."""
    for ranks in (3, 8, 16):
        expected = 1 - abs(1 / 3 + 2 / 3 * math.cos(2 * math.pi / ranks))
        assert spectral_gap(matrices("ring", ranks)) == pytest.approx(expected, abs=1e-12)
    assert spectral_gap(matrices("hypercube", 8)) == pytest.approx(1 / 2, abs=1e-12)
    assert spectral_gap(matrices("exponential", 16)) == 1  # after four steps, the exact mean


@pytest.mark.parametrize(
    ("topology", "ranks", "counts"),
    [("hypercube", 6, [4, 8]), ("torus", 7, [6, 8]), ("torus", 2, [4]), ("hypercube", 100, [64, 128])],
)
def test_what_does_not_fit_is_refused_with_what_would(topology: str, ranks: int, counts: list[int]):
    assert counts_near(topology, ranks) == counts
    sync = SyncOptions(name="gossip", gossip=GossipOptions(topology=topology))
    said = f"topology={topology} does not fit {ranks} replicas; start {' or '.join(map(str, counts))}, or set .*=expo"
    with pytest.raises(ConfigError, match=said):
        check_sync(sync, ranks, 100)
    for count in (1, *counts):
        check_sync(sync, count, 100)


def test_an_exchange_after_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"gossip.every=11 is longer than the run, 10 steps; set it to 10 or less"):
        check_sync(SyncOptions(name="gossip", gossip=GossipOptions(every=11)), 4, 10)
