"""How long ranks take to sum a tensor, or hand it on: by the latency and the bandwidth of the links that it crosses.

Of an all-reduce of n bytes over p ranks, on several nodes of g ranks each:

    ring          2 (p - 1) times n / p to the next rank; at every turn the slowest link is waited for
    tree          up and down log2 of the nodes, in pieces, so that every link is busy (NCCL's double tree: n, twice)
    hierarchical  scattered within a node, a ring for each of its ranks between the nodes, gathered within the node
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """latency_s: of a message of no size. bytes_per_s: in one direction."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size: float) -> float:
        return self.latency_s + size / self.bytes_per_s


@dataclass(frozen=True)
class Place:
    """Where the ranks of one group are. inside: between two ranks of a node. between: what a node has to other nodes;
    ``sharing`` such groups use it at once.
    """

    nodes: int
    per_node: int
    inside: Link
    between: Link
    sharing: int = 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def out(self) -> Link:
        """This group's share of what a node has to others."""
        return Link(self.between.latency_s, self.between.bytes_per_s / self.sharing)

    @property
    def slowest(self) -> Link:
        """What two neighbours of a ring have between them, at worst."""
        if self.nodes == 1:
            return self.inside
        if self.per_node == 1:
            return self.out
        return Link(max(self.inside.latency_s, self.out.latency_s), min(self.inside.bytes_per_s, self.out.bytes_per_s))


def ring(size: float, place: Place) -> float:
    """Seconds. Thakur et al. 2005, "Optimization of collective communication operations in MPICH"."""
    turns = 2 * (place.ranks - 1)
    inside = 2 * place.nodes * (place.per_node - 1) if place.nodes > 1 else turns
    latency = inside * place.inside.latency_s + (turns - inside) * place.out.latency_s
    return latency + turns * size / place.ranks / place.slowest.bytes_per_s


def tree(size: float, place: Place) -> float:
    """Seconds. Sanders et al. 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan"."""
    if place.ranks == 1:
        return 0.0
    between = 2 * math.ceil(math.log2(place.nodes)) * place.out.latency_s
    within = 2 * (place.per_node - 1) * place.inside.latency_s
    return between + within + 2 * size / place.slowest.bytes_per_s


def hierarchical(size: float, place: Place) -> float:
    """Seconds. The ranks of a node send at once, each its part, so that together they have all of the node's link."""
    inside = Place(1, place.per_node, place.inside, place.between)
    between = 2 * (place.nodes - 1) * place.out.seconds(size / place.nodes)
    return ring(size, inside) + between


ALGORITHMS: dict[str, Callable[[float, Place], float]] = {"ring": ring, "tree": tree, "hierarchical": hierarchical}


def all_reduce(size: float, place: Place) -> float:
    """By the algorithm that takes least, as NCCL and MPI libraries choose."""
    return min(seconds(size, place) for seconds in ALGORITHMS.values())
