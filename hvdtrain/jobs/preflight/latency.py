"""How long does a sum of 64 KB take between two nodes? So long would each of a tensor axis's take that spans them.

    nodes   n1  n2  n3  n4  n5       n1 with n2, n3 with n4, all at once; then n4 with n5

The first rank of each node takes part, over the way that a run's axis would take, which is not Horovod's.
"""

from collections.abc import Sequence

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh_map import sum_s, summed_in
from hvdtrain.jobs.preflight.findings import Look


def measure_latency(nodes: Sequence[str], group: Group) -> dict[str, Look]:
    """node -> what was found, where there are several (collective). nodes: of each rank."""
    first = {node: nodes.index(node) for node in nodes}
    looks: dict[str, Look] = {}
    for pairs in rounds(list(first.values())):
        axis = group.axis(pairs, torch.device("cpu"))
        took_s = sum_s(axis, torch.device("cpu")) if axis.size > 1 else 0.0
        told = group.all_gather_object((took_s, axis.backend))
        for pair in pairs:
            for rank, other in (pair, pair[::-1]):
                seconds, backend = told[rank]
                found = f"{summed_in(seconds)} over {backend}, with {nodes[other]}"
                looks.setdefault(nodes[rank], Look("tensor axis", found, amount=seconds))
    return looks


def rounds(ranks: Sequence[int]) -> list[list[list[int]]]:
    """Pairs of neighbours: each rank in one, the last of an odd number in a second round (local)."""
    paired = [list(pair) for pair in zip(ranks[::2], ranks[1::2], strict=False)]
    last = [[list(ranks[-2:])]] if len(ranks) % 2 and len(ranks) > 1 else []
    return [paired, *last] if paired else []
