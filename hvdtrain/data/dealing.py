"""A batch shared by ranks of unequal speed. Pure arithmetic: the same shares for the same numbers, on every rank.

speeds      2    2    2    1       rows in a second
64 rows     19   18   18   9       a rank's rows / speed: 9.5  9  9  9 seconds; no other deal ends sooner
"""

import heapq
from collections.abc import Sequence


def dealt(rows: int, speeds: Sequence[float]) -> list[int]:
    """How many of ``rows`` each rank takes, one at least, so that the last is ready as soon as can be.

    Row after row goes to the rank that would be ready first with one more; of several, to the first. So ranks of equal
    speed have equal parts, where that is possible, and with more rows no rank has fewer. Source: D'Hondt's seats.

    rows: as many as ranks at least. speeds: above 0, in any unit.
    """
    assert rows >= len(speeds) and min(speeds) > 0
    before_the_last_rounds = (rows - len(speeds)) / sum(speeds)  # seconds; rounded up, all would have no more than rows
    counts = [max(1, int(before_the_last_rounds * speed)) for speed in speeds]
    ready = [((count + 1) / speed, rank) for rank, (count, speed) in enumerate(zip(counts, speeds, strict=True))]
    heapq.heapify(ready)
    for _ in range(rows - sum(counts)):
        _, rank = ready[0]
        counts[rank] += 1
        heapq.heapreplace(ready, ((counts[rank] + 1) / speeds[rank], rank))
    return counts
