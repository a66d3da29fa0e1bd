"""Which rows make a batch, where each row is a pair or a text with a label? Rows of like length, as many as a budget
of tokens holds.

    lengths         1 .. 8     9 .. 16     17 .. 24        a bucket ends at a multiple of 8 (``bucket_edges``)
    rows a batch     6            3           2            48 tokens // the bucket's end
    batches        |======|    |===|===|   |==|==|=|       a bucket's rows, in an order drawn anew each epoch;
                       0         1   2      3  4  5        its last batch may be shorter
    their order    4  0  2  5  1  3                        drawn anew each epoch too

Both orders are keyed bijections, so batch k is reached by arithmetic, and it is the same for every number of ranks:
each takes its contiguous part (``sampler.even_parts``), which is empty where a batch has fewer rows than ranks.
"""

from functools import reduce

import numpy as np

from hvdtrain.data.sampler import concat_ranges, derive_each, permute_each
from hvdtrain.errors import ConfigError, DataError


def bucket_edges(max_length: int) -> list[int]:
    """The longest row of each bucket: 8, 16, ... 64, then an eighth more each time, cut to multiples of 8.

    The last one is ``max_length``. So a row that is not empty is padded by less than 8 positions, or by less than a
    ninth of its bucket's end.
    """
    edges = [8]
    while edges[-1] < max_length:
        edges.append(max(edges[-1] + 8, edges[-1] * 9 // 8 // 8 * 8))
    return [*edges[:-1], max_length]


class BucketSampler:
    """Batches of rows of like length, of at most ``batch_tokens`` padded positions (or of a single row).

    ``lengths``: integers [rows], or [rows, columns] for pairs (source, target). A row counts as its longest column:
    then no column of a batch is wider than the bucket's end, and the budget bounds the positions of each, the
    encoder's and the decoder's. Rows longer than ``max_length`` are left out, ``dropped`` of them. Keeps 4 bytes a row
    (8 from 2**32 rows on).

    ``padding``: the share of padding among all positions when every column is as wide as its bucket's end; less where
    a batch is padded to its own longest row. ``longest``: tokens of the longest row that is not left out.
    Errors: ConfigError for a budget or ``max_length`` below 1; DataError where no row is left, or a length is negative.
    """

    def __init__(self, lengths: np.ndarray, batch_tokens: int, seed: int, max_length: int):
        lengths = np.asarray(lengths)
        if batch_tokens < 1 or max_length < 1:
            raise ConfigError(
                f"a batch of {batch_tokens} tokens, of rows of at most {max_length}, cannot hold a row; set both to 1 "
                f"or more"
            )
        columns = list(lengths.T) if lengths.ndim == 2 else [lengths]
        longest = reduce(np.maximum, columns).astype(np.int64)
        if min(column.min(initial=0) for column in columns) < 0:
            row = np.minimum.reduce(columns).argmin()
            raise DataError(f"row {row} has a length of {lengths[row].min()} tokens; lengths are 0 or more")
        edges = np.array(bucket_edges(max_length), np.int64)
        too_long = min(max_length, int(longest.max(initial=0))) + 1
        bucket_of_length = np.searchsorted(edges, np.arange(too_long + 1)).astype(np.uint16)
        bucket_of_length[-1] = len(edges)
        bucket = bucket_of_length[np.minimum(longest, too_long)]  # 16 bits: numpy sorts those by radix
        rows = np.bincount(bucket, minlength=len(edges) + 1)
        self.dropped = int(rows[-1])
        rows = rows[:-1]
        if not rows.any():
            raise DataError(
                f"none of the {len(longest)} rows has at most {max_length} tokens; allow longer rows or prepare more"
            )
        self.seed, self.edges = seed, edges
        self.rows_per_epoch = int(rows.sum())
        order = np.argsort(bucket, kind="stable")[: self.rows_per_epoch]
        self._order = order.astype(np.uint32 if len(longest) <= 1 << 32 else np.int64)
        self._rows = rows
        self._first_row = np.cumsum(rows) - rows
        self._rows_per_batch = np.maximum(1, batch_tokens // edges)
        batches = -(-rows // self._rows_per_batch)
        self._batch_ends = np.cumsum(batches)
        self._first_batch = self._batch_ends - batches
        self.batches_per_epoch = int(batches.sum())
        kept = longest <= max_length
        self.longest = int(longest.max(initial=1, where=kept))
        tokens = sum(int(column.sum(dtype=np.int64, where=kept)) for column in columns)
        self.padding = 1 - tokens / (len(columns) * int(rows @ edges))

    def batch(self, number: int) -> np.ndarray:
        """The rows of batch ``number`` since the beginning of training: int64 [1 .. batch_tokens // its length]."""
        return self.batches(number, 1)[0]

    def batches(self, first: int, count: int) -> list[np.ndarray]:
        """The batches number ``first .. first+count-1`` since the beginning of training."""
        epochs, turns = np.divmod(np.arange(first, first + count), self.batches_per_epoch)
        slot = permute_each(turns, self.batches_per_epoch, derive_each(self.seed, epochs, 0))
        bucket = np.searchsorted(self._batch_ends, slot, side="right")
        begin = (slot - self._first_batch[bucket]) * self._rows_per_batch[bucket]
        sizes = np.minimum(self._rows_per_batch[bucket], self._rows[bucket] - begin)
        batch, turn = concat_ranges(begin, sizes)
        keys = derive_each(self.seed, epochs, bucket + 1)  # 0 draws the order of the batches
        place = permute_each(turn, self._rows[bucket][batch], keys[batch]) + self._first_row[bucket][batch]
        return np.split(self._order[place].astype(np.int64), np.cumsum(sizes)[:-1]) if count else []
