"""Learners whose ranks share each batch unequally, and otherwise in every step of five."""

from learner import CONTEXT, ROWS, VOCAB, Learner
from tiny import random_tokens

from hvdtrain.data.batch import Batch
from hvdtrain.data.dealing import dealt

SPEEDS = ((1.0, 1.0, 1.0, 1.0), (3.0, 1.0, 2.0, 1.0), (1.0, 20.0, 1.0, 1.0), (1.0, 2.0, 1.0, 4.0))
LONGEST = 3  # rows of a microbatch


class Uneven(Learner):
    """One rank has all rows in one pass, and of several each has its share in passes of ``LONGEST`` rows at most: with
    8 rows over 4 ranks, 5 on one of them and 1 on the others.
    """

    def microbatches(self, step: int) -> list[Batch]:
        if not self.mesh.has_rows:
            return []
        windows = random_tokens(ROWS * (CONTEXT + 1), VOCAB, seed=step).reshape(ROWS, CONTEXT + 1)
        replicas, number = self.mesh.replicas, self.mesh.number
        counts = dealt(ROWS, SPEEDS[step // 5 % len(SPEEDS)][:replicas])
        mine = windows[sum(counts[:number]) : sum(counts[: number + 1])]
        longest = LONGEST if replicas > 1 else ROWS
        return [Batch.from_windows(mine[at : at + longest]) for at in range(0, len(mine), longest)]
