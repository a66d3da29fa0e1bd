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

from dataclasses import dataclass

import numpy as np

from hvdtrain.errors import ConfigError, DataError

_U64 = np.uint64
_MASK = (1 << 64) - 1
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROUNDS = 4


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64's finaliser: uint64 -> uint64, every input bit moves every output bit.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = values.astype(_U64) + _U64(_offset(key))
    x = (x ^ (x >> _U64(30))) * _U64(_FACTORS[0])
    x = (x ^ (x >> _U64(27))) * _U64(_FACTORS[1])
    return x ^ (x >> _U64(31))


def _mix_one(value: int, key: int) -> int:
    """``mix`` of a single number: plain integers are faster than arrays of one."""
    x = (value + _offset(key)) & _MASK
    x = ((x ^ (x >> 30)) * _FACTORS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _FACTORS[1]) & _MASK
    return x ^ (x >> 31)


def _offset(key: int) -> int:
    return (key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK


def derive(*parts: int) -> int:
    """One 63-bit seed from several numbers (a seed, an epoch, a step, ...): equal only for equal numbers."""
    key = 0
    for part in parts:
        key = _mix_one(part & _MASK, key)
    return key >> 1


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """A bijection of ``0 .. size-1`` chosen by ``key``, evaluated at ``indices``: int64, same shape.

    A Feistel network over the next even power of two, walked again where it leaves the range (at most 4 walks on
    average). Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    low_mask = _U64((1 << half_bits) - 1)
    round_keys = [derive(key, number) for number in range(_ROUNDS)]
    out = indices.astype(_U64)
    walking = np.arange(out.size)
    flat = out.reshape(-1)
    while walking.size:
        x = flat[walking]
        left, right = x >> _U64(half_bits), x & low_mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right, round_key) & low_mask)
        x = (left << _U64(half_bits)) | right
        flat[walking] = x
        walking = walking[x >= size]
    return flat.reshape(indices.shape).astype(np.int64)


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
        numbers = np.arange(first, first + count, dtype=np.int64)
        epochs = numbers // self.rows_per_epoch
        out = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            turn = numbers[here] - epoch * self.rows_per_epoch
            shift = derive(self.seed, int(epoch), 1) % self.shifts
            window = permute(turn, self.rows_per_epoch, derive(self.seed, int(epoch), 0))
            out[here] = window * self.context + shift
        return out


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch: rows ``first .. first+count-1`` of it, in microbatches of ``microbatch``."""

    first: int
    count: int
    microbatch: int


def share_of(global_batch: int, microbatch: int, rank: int, size: int) -> Share:
    """How ``size`` ranks share a global batch; ``microbatch`` 0 or above a rank's rows: all of them in one pass.

    Errors: ConfigError where they cannot share it evenly.
    """
    if global_batch % size:
        below = global_batch // size * size
        near = f"{below} or {below + size}" if below else f"{size}"
        fewer = next(n for n in range(min(size, global_batch), 0, -1) if global_batch % n == 0)
        raise ConfigError(
            f"train.global_batch={global_batch} sequences cannot be shared evenly by {size} ranks; "
            f"set train.global_batch={near}, or start {fewer} ranks"
        )
    count = global_batch // size
    microbatch = min(microbatch or count, count)
    if count % microbatch:
        raise ConfigError(
            f"train.microbatch={microbatch} does not divide the {count} sequences of each rank "
            f"(train.global_batch={global_batch} over {size} ranks)"
        )
    return Share(rank * count, count, microbatch)


def even_parts(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``0 .. count-1`` into ``parts`` contiguous runs, as even as can be: [(first, count), ...]."""
    return [(count * i // parts, count * (i + 1) // parts - count * i // parts) for i in range(parts)]
