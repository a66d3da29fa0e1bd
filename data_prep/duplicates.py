"""Exact duplicates over the whole corpus, in bounded memory, the same for every number of ranks.

Each item's 128-bit digest is written down unit by unit. Then the digests are taken in turns by their first bits, so
many at once as fit into memory, and of equal ones all but the first are noted down as (unit, number in the unit).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_prep.pieces import Unit
from hvdtrain.comm.ranks import Ranks
from hvdtrain.data.shards import writing

_AT_ONCE = 1 << 23  # digests sorted in memory at a time


class Dropped:
    """Which items are left out: int64 [items, 2], unit and number in it."""

    def __init__(self, pairs: np.ndarray):
        self._pairs = pairs

    def of_unit(self, number: int) -> frozenset[int]:
        return frozenset(self._pairs[self._pairs[:, 0] == number, 1].tolist())


NONE = Dropped(np.empty((0, 2), np.int64))


def find(
    hashes_of: Callable[[Unit], np.ndarray], units: Sequence[Unit], mine: Sequence[int], folder: Path, ranks: Ranks
) -> Dropped:
    """All later copies of an item (collective). hashes_of: uint64 [items, 2] of a unit; folder: for notes, shared."""
    for number in mine:
        path = _hash_file(folder, units[number])
        if not path.exists():
            _save(path, hashes_of(units[number]))
    ranks.barrier()
    columns = [np.load(_hash_file(folder, unit), mmap_mode="r") for unit in units]
    bits = max(0, (sum(map(len, columns)) - 1) // _AT_ONCE).bit_length()
    for part in range(ranks.rank, 1 << bits, ranks.size):
        _save(folder / f"duplicates-{part}.npy", _later_copies(columns, part, bits))
    ranks.barrier()
    return Dropped(np.concatenate([np.load(folder / f"duplicates-{part}.npy") for part in range(1 << bits)]))


def _later_copies(columns: Sequence[np.ndarray], part: int, bits: int) -> np.ndarray:
    chosen = [
        np.flatnonzero(column[:, 0] >> np.uint64(64 - bits) == part) if bits else np.arange(len(column))
        for column in columns
    ]
    hashes = np.concatenate([column[rows] for column, rows in zip(columns, chosen, strict=True)])
    unit = np.repeat(np.arange(len(columns)), [len(rows) for rows in chosen])
    row = np.concatenate(chosen)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first stays first
    is_copy = np.zeros(len(order), bool)
    is_copy[1:] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    copies = order[is_copy]
    return np.stack([unit[copies], row[copies]], axis=1)


def _hash_file(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.number:05d}-{unit.stamp}.hashes.npy"


def _save(path: Path, values: np.ndarray) -> None:
    with writing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)
