"""Which part of the exchange of gradients is not hidden by backward: the timeline of a step's buckets, replayed.

    backward    [layer 4][layer 3][layer 2][layer 1]
    exchange             [bucket 0 ------][bucket 1 -----][bucket 2 -----]
                                                    |---- exposed -------|

One bucket is under way at a time; the next leaves when it is ready and the one before it has arrived.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Bucket(NamedTuple):
    """ready_s: since backward began. exchange_s: how long it is under way."""

    ready_s: float
    exchange_s: float


def exposed(buckets: Sequence[Bucket], backward_s: float) -> float:
    """Seconds from the end of backward until the last bucket has arrived."""
    now = 0.0
    for bucket in buckets:
        now = max(now, bucket.ready_s) + bucket.exchange_s
    return max(0.0, now - backward_s)


def ready_times(sizes: Sequence[float], backward_s: float) -> list[float]:
    """When each bucket is full, where backward takes as long for each byte of gradients as for any other."""
    whole, so_far, found = sum(sizes), 0.0, []
    for size in sizes:
        so_far += size
        found.append(backward_s * so_far / whole)
    return found
