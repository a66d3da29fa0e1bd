"""Which rows make step k? Pure arithmetic, the same for every rank count.

The text is one line of tokens, cut into windows of ``context + 1`` that start ``context`` apart, so every token is a
target once an epoch. Each epoch shifts the cuts by a few tokens and draws the windows in a new order:

    epoch 0   |--2--|--0--|--3--|--1--|--         the number is the turn at which a window is drawn
    epoch 1      |--1--|--2--|--0--|--3--|--      shifted cuts, another order

    consumed rows   0 1 2 3 | 4 5 6 7 | ...       a step takes the next ``global_batch`` of them;
    rank 0 of 2     0 1     | 4 5     |           a rank takes its contiguous part
    rank 1 of 2         2 3 |     6 7 |

The order is a keyed bijection, not a stored permutation: constant memory for any corpus, and step k is reached by
arithmetic, not by replay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hvdtrain.errors import ConfigError, DataError

_U64 = np.uint64
_MASK = (1 << 64) - 1
_GOLDEN, _START = 0x9E3779B97F4A7C15, 0x632BE59BD9B4E019
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROUNDS = 4
_TABLE_BITS = 15  # tables of 1 MiB a key at most: a thousand million rows
_POWERS_OF_4 = np.array([4**n for n in range(1, 32)], _U64)


def mix(values: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 -> uint64, every input bit moves every output bit. ``key`` may be an array.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    return _mix_from(values.astype(_U64, copy=False), _offset_of_each(key))


def _mix_from(values: np.ndarray, offset: np.ndarray) -> np.ndarray:
    x = values + offset
    x ^= x >> _U64(30)
    x *= _U64(_FACTORS[0])
    x ^= x >> _U64(27)
    x *= _U64(_FACTORS[1])
    x ^= x >> _U64(31)
    return x


def _mix_one(value: int, key: int) -> int:
    """``mix`` of a single number: plain integers are faster than arrays of one."""
    x = (value + _offset(key)) & _MASK
    x = ((x ^ (x >> 30)) * _FACTORS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _FACTORS[1]) & _MASK
    return x ^ (x >> 31)


def _offset(key: int) -> int:
    return (key * _GOLDEN + _START) & _MASK


def _offset_of_each(key: int | np.ndarray) -> np.ndarray:
    if isinstance(key, np.ndarray):
        return key.astype(_U64, copy=False) * _U64(_GOLDEN) + _U64(_START)
    return _U64(_offset(key))


def derive(*parts: int) -> int:
    """One 63-bit seed from several numbers (a seed, an epoch, a step, ...): equal only for equal numbers."""
    key = 0
    for part in parts:
        key = _mix_one(part & _MASK, key)
    return key >> 1


def derive_each(*parts: int | np.ndarray) -> np.ndarray:
    """``derive`` of every element of arrays that broadcast (at least one-dimensional): uint64."""
    key: int | np.ndarray = 0
    for part in parts:
        key = mix(part if isinstance(part, np.ndarray) else np.array([part & _MASK], _U64), key)
    return key >> _U64(1)


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """A bijection of ``0 .. size-1`` chosen by ``key``, evaluated at ``indices``: int64, same shape.

    A Feistel network over the next even power of two, walked again where it leaves the range (at most 4 walks on
    average). Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    if half_bits > _TABLE_BITS:
        return permute_each(indices, size, key)
    rounds = [table.take for table in _round_tables(half_bits, key)]

    def walk(x: np.ndarray, _) -> tuple[np.ndarray, np.ndarray]:
        x = _feistel(x, half_bits, (1 << half_bits) - 1, rounds)
        return x, x >= size

    return _walk_into_range(indices.astype(np.int64, copy=False), walk)


def permute_each(indices: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """``permute``, where each index may have a size and a key of its own: ``sizes`` and ``keys`` are [indices] or one.

    Slower than ``permute`` by an index, faster by a key: for many keys with few indices each.
    """
    sizes = np.array(sizes, _U64, ndmin=1)
    half_bits = (np.searchsorted(_POWERS_OF_4, sizes) + 1).astype(_U64)
    low_mask = (_U64(1) << half_bits) - _U64(1)
    seed = mix(np.array(keys, _U64, ndmin=1), 0)
    offsets = [_offset_of_each(mix(np.array([n], _U64), seed) >> _U64(1)) for n in range(_ROUNDS)]  # of derive(key, n)

    def walk(x: np.ndarray, at: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        size, half, mask, *own = (
            part if at is None or part.size == 1 else part[at] for part in (sizes, half_bits, low_mask, *offsets)
        )
        x = _feistel(x, half, mask, [lambda right, offset=offset: _mix_from(right, offset) & mask for offset in own])
        return x, x >= size

    return _walk_into_range(indices.astype(_U64, copy=False), walk).astype(np.int64, copy=False)


@lru_cache(maxsize=8)
def _round_tables(half_bits: int, key: int) -> list[np.ndarray]:
    """What each round does to every half there is: looked up, a round is 2 array operations instead of 11."""
    halves = np.arange(1 << half_bits, dtype=_U64)
    return [(mix(halves, derive(key, n)) & _U64((1 << half_bits) - 1)).astype(np.int64) for n in range(_ROUNDS)]


def _feistel(x: np.ndarray, half_bits, low_mask, rounds: list[Callable[[np.ndarray], np.ndarray]]) -> np.ndarray:
    left, right = x >> half_bits, x & low_mask
    for function in rounds:
        left, right = right, left ^ function(right)
    return (left << half_bits) | right


def _walk_into_range(indices: np.ndarray, walk: Callable) -> np.ndarray:
    """``walk(x, at)``: one walk of the indices numbered ``at`` (None: of all), and which of them left the range."""
    out, outside = walk(indices.reshape(-1), None)
    walking = np.flatnonzero(outside)
    while walking.size:
        x, outside = walk(out[walking], walking)
        out[walking] = x
        walking = walking[outside]
    return out.reshape(indices.shape)


@dataclass(frozen=True)
class WindowSampler:
    """Rows of a token stream of ``tokens`` tokens, in the order that ``seed`` draws.

    A row is a window's start; the window is ``stream[start : start + context + 1]``.
    Errors: DataError where the stream is shorter than one window.
    """

    tokens: int
    context: int
    seed: int

    def __post_init__(self) -> None:
        if self.tokens < self.context + 1:
            raise DataError(
                f"the split has {self.tokens} tokens, fewer than one context: model.context={self.context} needs "
                f"{self.context + 1}; prepare more text or lower model.context"
            )

    @property
    def shifts(self) -> int:
        """How many shifts of the cuts there are: all of a window's, unless the text is hardly longer than one."""
        return min(self.context, self.tokens - self.context)

    @property
    def rows_per_epoch(self) -> int:
        return (self.tokens - self.shifts) // self.context

    def starts(self, first: int, count: int) -> np.ndarray:
        """Starts of the rows number ``first .. first+count-1`` since the beginning of training: int64 [count]."""
        return self.starts_of(np.arange(first, first + count))

    def starts_of(self, numbers: np.ndarray) -> np.ndarray:
        """Starts of the rows with these numbers since the beginning of training, ascending: int64 [rows]."""
        rows = self.rows_per_epoch
        out = np.empty(len(numbers), np.int64)
        start = 0
        while start < len(numbers):
            epoch = int(numbers[start]) // rows
            stop = int(np.searchsorted(numbers, (epoch + 1) * rows))
            windows = permute(numbers[start:stop] - epoch * rows, rows, derive(self.seed, epoch, 0))
            shift = derive(self.seed, epoch, 1) % self.shifts
            out[start:stop] = windows * self.context + shift
            start = stop
        return out


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch: rows ``first .. first+count-1`` of it, in microbatches of ``microbatch``."""

    first: int
    count: int
    microbatch: int


def share_of(global_batch: int, microbatch: int, rank: int, size: int, sharer: str = "rank") -> Share:
    """How ``size`` ranks share a global batch; ``microbatch`` 0 or above a rank's rows: all of them in one pass.
    sharer: what messages call each of them.

    Errors: ConfigError where they cannot share it evenly.
    """
    if global_batch % size:
        below = global_batch // size * size
        near = f"{below} or {below + size}" if below else f"{size}"
        fewer = next(n for n in range(min(size, global_batch), 0, -1) if global_batch % n == 0)
        raise ConfigError(
            f"train.global_batch={global_batch} sequences cannot be shared evenly by {size} {sharer}s; "
            f"set train.global_batch={near}, or start {fewer} {sharer}s"
        )
    count = global_batch // size
    microbatch = min(microbatch or count, count)
    if count % microbatch:
        raise ConfigError(
            f"train.microbatch={microbatch} does not divide the {count} sequences of each {sharer} "
            f"(train.global_batch={global_batch} over {size} {sharer}s)"
        )
    return Share(rank * count, count, microbatch)


def even_parts(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``0 .. count-1`` into ``parts`` contiguous runs, as even as can be: [(first, count), ...]."""
    return [(count * i // parts, count * (i + 1) // parts - count * i // parts) for i in range(parts)]


def concat_ranges(firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers ``firsts[i] .. firsts[i]+counts[i]-1`` of all i in one line, and the i of each: two int64 [total]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) + (firsts - before)[owner]
