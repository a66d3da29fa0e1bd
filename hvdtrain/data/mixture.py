"""Which corpus does row k come from, where several are mixed by weight? Exact in every block of 4,096 rows.

    weights 2 : 1 : 1, a block of 8     A B A C A A C B | A A C B C A B A | ...     4 A, 2 B and 2 C in each,
                                                                                    in an order drawn for each block
    row number of its corpus            0 0 1 0 2 3 1 1 | 4 5 2 2 3 6 3 7 | ...     none left out: a corpus has its
                                                                                    own epochs, at its own pace

The order is a keyed bijection and the counts are the same in each block, so row k is reached by arithmetic.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hvdtrain.data.sampler import derive, permute
from hvdtrain.errors import ConfigError

BLOCK = 4096


def quotas(weights: Sequence[float], block: int) -> list[int]:
    """How many of ``block`` rows each weight gets: at least one, else by largest remainder, the first where equal.

    In exact fractions, since a rounded sum could differ from machine to machine.
    """
    shares = [Fraction(float(weight)) for weight in weights]
    rows = [0] * len(shares)
    left, total = block, sum(shares)
    ascending = sorted(range(len(shares)), key=lambda number: shares[number])
    while shares[ascending[0]] * left < total:  # below one row: it gets one, and the others share what is left
        number = ascending.pop(0)
        rows[number] = 1
        left, total = left - 1, total - shares[number]
    exact = {number: shares[number] * left / total for number in sorted(ascending)}
    for number, share in exact.items():
        rows[number] = math.floor(share)
    by_remainder = sorted(exact, key=lambda number: rows[number] - exact[number])
    for number in by_remainder[: block - sum(rows)]:
        rows[number] += 1
    return rows


class Mixture:
    """Several corpora, mixed by ``weights`` of any scale, in the order that ``seed`` draws.

    A weight is realised in steps of 1/4096 (0.024 %), the smallest as one step.
    Errors: ConfigError for a weight that is not a finite number above 0, for no corpus, or for more than 4,096.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        if not 1 <= len(weights) <= BLOCK:
            raise ConfigError(f"a mixture of {len(weights)} corpora; give a weight to each of 1 to {BLOCK}")
        for number, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"corpus {number} of the mixture has the weight {weight}; give it a number above 0, or leave it out"
                )
        self.seed = seed
        self.rows_per_block = np.array(quotas(weights, BLOCK), np.int64)
        self._corpus = np.repeat(np.arange(len(weights)), self.rows_per_block)  # of each slot of a block
        first_slot = np.cumsum(self.rows_per_block) - self.rows_per_block
        self._turn = np.arange(BLOCK) - first_slot[self._corpus]

    @property
    def share(self) -> tuple[float, ...]:
        """The weights as realised, exactly: multiples of 1/4096 that sum to 1."""
        return tuple((self.rows_per_block / BLOCK).tolist())

    def place(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Corpus, and row number of that corpus, of the rows ``first .. first+count-1`` since the beginning of
        training: two int64 [count].
        """
        corpora, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        turn = np.empty(BLOCK, np.int64)
        for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
            corpus = self._corpus[permute(np.arange(BLOCK), BLOCK, derive(self.seed, block))]
            turn[np.argsort(corpus.astype(np.uint16), kind="stable")] = self._turn  # 16 bits: numpy's radix sort
            start, stop = max(first - block * BLOCK, 0), min(first + count - block * BLOCK, BLOCK)
            here = slice(block * BLOCK + start - first, block * BLOCK + stop - first)
            corpora[here] = corpus[start:stop]
            rows[here] = (block * self.rows_per_block[corpus] + turn)[start:stop]
        return corpora, rows
