"""Which documents share a row? Best fit, planned on how many pieces of each length there are.

A document longer than a row is cut into full rows and a rest. The pieces are laid into rows, the longest first, each
where the least room is left over; equal lengths are laid all at once, so the plan costs the same for any number of
documents. Context 8, three pieces of 5, three of 3 and two of 2:

    3 pieces of 5    |5 5 5 5 5 . . .| x3                           no open row: start three
    3 pieces of 3    |5 5 5 5 5 3 3 3| x3                           3 free is the tightest fit: all three are full
    2 pieces of 2    |5 5 5 5 5 3 3 3| x3    |2 2 2 2 . . . .| x1   no open row: start one, both fit
                      a strategy     copies

An epoch draws the rows in a new order, and for every place of length n another piece of length n:

    places of length 3    strategy 0 copy 0, copy 1, copy 2            in the order of the plan
    pieces of length 3    document 7, document 12's rest, document 40  in the order of the text
                          place i takes piece permute(i), another bijection for each (seed, epoch, length)

So the rows of an epoch hold every token exactly once, and any row is reached by arithmetic.

Sources: Ding et al., "Fewer truncations improve language modeling", ICML 2024 (best fit); Krell et al., "Efficient
sequence packing without cross-contamination", 2021 (the histogram).
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from hvdtrain.data.sampler import concat_ranges, derive_each, permute_each
from hvdtrain.errors import ConfigError, DataError


class Strategies(NamedTuple):
    """``copies[s]`` rows hold ``repeats[r]`` pieces of ``lengths[r]`` tokens for each run r of strategy ``s``."""

    copies: np.ndarray  # int64 [strategies]
    strategy: np.ndarray  # int64 [runs], non-decreasing
    lengths: np.ndarray  # int64 [runs], decreasing within a strategy
    repeats: np.ndarray  # int64 [runs]


def plan_rows(counts: np.ndarray, context: int) -> Strategies:
    """Best-fit decreasing for ``counts[n]`` pieces of each length n = 1 .. context: the rows it makes one by one.

    A strategy's open rows are alike, so a piece goes to the tightest strategy; what is then left of that row is
    tighter still, so the next piece of this length goes there too, until no more fit.
    """
    open_rows: dict[int, list[tuple[int, tuple]]] = {}  # free positions -> [(copies, ((length, repeats), ...)), ...]
    frees: list[int] = []  # its keys, sorted

    def put(free: int, copies: int, runs: tuple) -> None:
        if copies:
            if free not in open_rows:
                open_rows[free] = []
                insort(frees, free)
            open_rows[free].append((copies, runs))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            tightest = bisect_left(frees, length)
            free = frees[tightest] if tightest < len(frees) else context
            fit = free // length
            if tightest < len(frees):
                copies, runs = open_rows[free].pop()
                if not open_rows[free]:
                    del open_rows[free], frees[tightest]
            else:
                copies, runs = -(-left // fit), ()
            filled = min(copies, left // fit)
            left -= filled * fit
            put(free - fit * length, filled, (*runs, (length, fit)))
            if filled < copies:  # the pieces of this length end here: the last ones, fewer than fit, share one row
                put(free - left * length, 1 if left else 0, (*runs, (length, left)))
                put(free, copies - filled - (1 if left else 0), runs)
                left = 0
    strategies = [strategy for free in frees for strategy in open_rows[free]]
    runs = [(number, *run) for number, (_, contents) in enumerate(strategies) for run in contents]
    table = np.array(runs, np.int64).reshape(-1, 3)
    return Strategies(np.array([copies for copies, _ in strategies], np.int64), *np.ascontiguousarray(table.T))


class Pieces(NamedTuple):
    """The pieces of some rows, in the order they stand in them, the longest of a row first."""

    row: np.ndarray  # int64 [pieces], 0 .. count-1, non-decreasing
    start: np.ndarray  # int64 [pieces], where in the line of all documents
    length: np.ndarray  # int64 [pieces], tokens


class PackSampler:
    """Rows of at most ``context`` tokens made of whole documents, in the order that ``seed`` draws.

    ``lengths``: tokens of each document, integers [documents]; empty documents are left out. Keeps 8 bytes a piece.
    Errors: ConfigError for a context below 1; DataError where there is no token, or a length is negative.
    """

    def __init__(self, lengths: np.ndarray, context: int, seed: int):
        lengths = np.asarray(lengths).astype(np.int64, copy=False)
        if context < 1:
            raise ConfigError(f"model.context={context} tokens cannot hold a document; set it to 1 or more")
        if lengths.size and lengths.min() < 0:
            raise DataError(f"document {lengths.argmin()} has {lengths.min()} tokens; lengths are 0 or more")
        self.context, self.seed = context, seed
        self._starts, self._counts = _pieces_by_length(lengths, context)
        self.pieces = len(self._starts)
        if not self.pieces:
            raise DataError(f"the {len(lengths)} documents to pack have no token at all; prepare some text")
        self._first_of_length = np.cumsum(self._counts) - self._counts
        plan = plan_rows(self._counts, context)
        self.rows_per_epoch = int(plan.copies.sum())
        tokens = int(self._counts @ np.arange(context + 1))
        self.efficiency = tokens / (self.rows_per_epoch * context)

        # Slots: a strategy's pieces one by one. Copy c of the strategy takes, among the pieces of the slot's length,
        # number base + stride * c; a run of n equal lengths has n slots with n bases and the stride n.
        self._strategy_ends = np.cumsum(plan.copies)
        self._strategy_first_row = self._strategy_ends - plan.copies
        run, repeat = concat_ranges(np.zeros(len(plan.lengths), np.int64), plan.repeats)
        self._slot_length, self._slot_stride = plan.lengths[run], plan.repeats[run]
        self._slot_base = _taken_before(plan, self._first_of_length)[run] + repeat
        self._slots = np.bincount(plan.strategy, plan.repeats, len(plan.copies)).astype(np.int64)
        self._first_slot = np.cumsum(self._slots) - self._slots

    def rows(self, first: int, count: int) -> Pieces:
        """The pieces in the rows number ``first .. first+count-1`` since the beginning of training."""
        epochs, turns = np.divmod(np.arange(first, first + count), self.rows_per_epoch)
        rows = permute_each(turns, self.rows_per_epoch, derive_each(self.seed, epochs, 0))
        strategy = np.searchsorted(self._strategy_ends, rows, side="right")
        copy = rows - self._strategy_first_row[strategy]
        row, slot = concat_ranges(self._first_slot[strategy], self._slots[strategy])
        length = self._slot_length[slot]
        number = self._slot_base[slot] + self._slot_stride[slot] * copy[row]
        key = derive_each(self.seed, epochs[row], length)  # a length is never the 0 that draws the rows
        piece = self._first_of_length[length] + permute_each(number, self._counts[length], key)
        return Pieces(row, self._starts[piece], length)


def _pieces_by_length(lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece starts, sorted by its length and then by its place; how many there are of each length."""
    ends = np.cumsum(lengths, dtype=np.int64)
    full, rest = np.divmod(lengths, context)
    # 16 bits where they do: numpy sorts those by radix, several times faster
    rest = rest.astype(np.uint16 if context <= 1 << 16 else np.int64)
    counts = np.bincount(rest, minlength=context + 1)
    by_length = np.argsort(rest, kind="stable")[counts[0] :]
    rest_starts = (ends - rest)[by_length]
    long = np.flatnonzero(full)
    document, turn = concat_ranges(np.zeros(len(long), np.int64), full[long])
    full_starts = (ends - lengths)[long][document] + turn * context
    counts[0], counts[context] = 0, len(full_starts)
    return np.concatenate([rest_starts, full_starts]), counts


def _taken_before(plan: Strategies, first_of_length: np.ndarray) -> np.ndarray:
    """For each run, how many pieces of its length the strategies before it take: int64 [runs]."""
    taken = plan.copies[plan.strategy] * plan.repeats
    order = np.argsort(plan.lengths, kind="stable")
    before = np.empty_like(taken)
    before[order] = np.cumsum(taken[order]) - taken[order] - first_of_length[plan.lengths[order]]
    return before
