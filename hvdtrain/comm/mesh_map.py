"""What the user is told of a mesh: which rank is where, and what the ways between the ranks are.

mesh: 2 replicas x 2 stages x 2 parts; parts over shared memory (64 KB summed in 0.03 ms), stages over shared memory
  replica 0  stage 0  n1: 0-1
             stage 1  n1: 2-3
  replica 1  stage 0  n2: 4-5
             stage 1  n2: 6-7
"""

import statistics
import time
from collections.abc import Sequence
from itertools import groupby

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.mesh import Mesh, grid
from hvdtrain.comm.world import node_name
from hvdtrain.errors import plural

_MOST_ROWS = 8
_BYTES, _TRIES = 1 << 16, 20


def describe_mesh(mesh: Mesh, device: torch.device) -> tuple[list[str], list[str]]:
    """Lines to show, and what the user must be told besides; nothing where every replica is whole on its rank
    (collective).
    """
    if mesh.own.size == 1:
        return [], []
    stages, parts = mesh.pipe.size, mesh.tensor.size
    everyone = mesh.world.all_gather_object((node_name(), sum_s(mesh.tensor, device), _notes(mesh)))
    hosts, slowest = [host for host, *_ in everyone], max(seconds for _, seconds, _ in everyone)
    took = summed_in(slowest)
    ways = [f"parts over {mesh.tensor.backend} ({took})"] if parts > 1 else []
    ways += [f"stages over {mesh.pipe.backend}"] if stages > 1 else []
    sizes = " x ".join(plural(*size) for size in ((mesh.replicas, "replica"), (stages, "stage"), (parts, "part")))
    rows = grid(mesh.world.size, stages, parts)
    notes = sorted({note for _, _, theirs in everyone for note in theirs})
    return [f"mesh: {sizes}; {', '.join(ways)}", *draw(rows, hosts)], notes + _far_parts(rows, hosts, took)


def draw(rows: Sequence[Sequence[Sequence[int]]], hosts: Sequence[str]) -> list[str]:
    """A line for each stage of each replica: its ranks, by their hosts (local). rows: see ``grid``."""
    width = len(f"replica {len(rows) - 1}")
    lines = [
        f"  {f'replica {replica}' if stage == 0 else '':<{width}}  stage {stage}  {_by_host(ranks, hosts)}"
        for replica, own in enumerate(rows)
        for stage, ranks in enumerate(own)
    ]
    if len(lines) <= _MOST_ROWS:
        return lines
    return [*lines[: _MOST_ROWS - 1], f"  ... and {len(lines) - _MOST_ROWS + 1} lines more, to rank {len(hosts) - 1}"]


def sum_s(axis: Axis, device: torch.device) -> float:
    """How long a sum of 64 KB takes over ``axis``: the median of some, in seconds (collective of the axis)."""
    tensor, seconds = torch.zeros(_BYTES // 4, device=device), []
    for _ in range(_TRIES):
        began = time.perf_counter()
        axis.sum(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def summed_in(seconds: float) -> str:
    """What ``sum_s`` has found, in words."""
    return f"64 KB summed in {1e3 * seconds:.2g} ms"


def _far_parts(rows: Sequence[Sequence[Sequence[int]]], hosts: Sequence[str], took: str) -> list[str]:
    spread = [ranks for own in rows for ranks in own if len({hosts[rank] for rank in ranks}) > 1]
    if not spread:
        return []
    near = min(hosts.count(host) for host in hosts)
    return [
        f"parts of a layer are on several nodes ({_by_host(spread[0], hosts)}), and meet dozens of times a "
        f"pass ({took}): mesh.tensor of at most {near} can stay within a node"
    ]


def _by_host(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """``n1: 0-1, n2: 2``; ranks follow one another."""
    together = [(host, list(same)) for host, same in groupby(ranks, key=lambda rank: hosts[rank])]
    return ", ".join(f"{host}: {same[0]}{f'-{same[-1]}' if len(same) > 1 else ''}" for host, same in together)


def _notes(mesh: Mesh) -> list[str]:
    axes = (("parts", mesh.tensor), ("stages", mesh.pipe))
    return [f"{name} over {axis.backend}: {axis.note}" for name, axis in axes if axis.note]
