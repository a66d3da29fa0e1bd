"""What a way to agree will need of a rank, from its settings and the shapes of a model: bytes held, bytes sent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def bytes_of_bucket(mib: float, gradient_bytes: int) -> int:
    """``mib``; where a recipe says nothing, 0: 1/32 of the gradients, 2 to 16 MiB. Each bucket costs some time of its
    own, but the last one leaves when backward is over, and nothing hides its way.
    """
    return int(mib * (1 << 20)) or min(max(gradient_bytes // 32, 2 << 20), 16 << 20)


def bucket_of(count: int, largest: int, mib: float) -> int:
    """Numbers of the largest bucket, of ``count`` fp32 numbers in tensors of at most ``largest``. mib: 0: see above."""
    return min(count, max(largest, bytes_of_bucket(mib, 4 * count) // 4))


@dataclass(frozen=True)
class Trained:
    """What a rank trains, and in what company.

    shapes: of its tensors. state_bytes: of the optimizer, for all of them. ranks: that agree, servers among them;
    steps: of the run, microbatches: of a step. narrow_weights: a copy in two bytes computes. holders: how many of its
    numbers are summed over how many ranks, where a replica is cut; None: all, over all ranks.
    """

    shapes: Sequence[Sequence[int]]
    state_bytes: int
    ranks: int
    steps: int = 1
    microbatches: int = 1
    narrow_weights: bool = False
    holders: Mapping[int, int] | None = None

    @property
    def count(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def largest(self) -> int:
        """Numbers of the largest tensor."""
        return max(map(math.prod, self.shapes), default=0)

    def bucket(self, mib: float = 16.0) -> int:
        """Numbers of the largest bucket, where tensors are gathered up to so many MiB."""
        return bucket_of(self.count, self.largest, mib)


@dataclass(frozen=True)
class Needs:
    """Of one rank, in bytes; ``moved`` alone is numbers: those that its optimizer moves, and keeps its state of.

    gradients; kept: what the sync keeps from step to step; buffers: to send from and receive in; passing: what comes
    and goes while replicas agree, when the step's activations have gone; viewed: what an evaluation takes beside its
    own. sent: in a step, in the mean of many, without what saves and evaluations take; headers are not counted.
    server: of a rank that only keeps parameters.
    """

    gradients: int
    moved: int
    kept: int = 0
    buffers: int = 0
    passing: int = 0
    viewed: int = 0
    sent: float = 0.0
    server: "Needs | None" = None
