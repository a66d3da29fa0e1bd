"""Exact duplicates over the whole corpus, in bounded memory, the same for every number of ranks.

Each item's 128-bit digest is written into a file, one for each unit. Then the digests are compared in groups that begin
with the same bits and fit into memory. Of equal ones all but the first are noted as (unit, number in the unit).
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.pieces import Unit
from hvdtrain.comm.ranks import Ranks
from hvdtrain.files import exists, write

_AT_ONCE = 1 << 23  # digests sorted in memory at a time


class Dropped:
    """Which items are left out: int64 [items, 2], unit and number in it."""

    def __init__(self, pairs: np.ndarray):
        self._pairs = pairs

    def of_unit(self, number: int) -> frozenset[int]:
        return frozenset(self._pairs[self._pairs[:, 0] == number, 1].tolist())


NONE = Dropped(np.empty((0, 2), np.int64))


def find(
    hashes_of: Callable[[Unit], Iterable[bytes]], units: Sequence[Unit], mine: Sequence[int], folder: Path, ranks: Ranks
) -> Dropped:
    """All later copies of an item (collective). hashes_of: of a unit's items, 16 bytes each, some at a time;
    folder: for notes, shared by all ranks.
    """
    for number in mine:
        path = _hash_file(folder, units[number])
        if not exists(path):
            _save(path, lambda file, unit=units[number]: file.writelines(hashes_of(unit)))
    ranks.barrier()
    columns = [_mapped(_hash_file(folder, unit)) for unit in units]
    bits = max(0, (sum(map(len, columns)) - 1) // _AT_ONCE).bit_length()
    for part in range(ranks.rank, 1 << bits, ranks.size):
        copies = _later_copies(columns, part, bits)
        _save(folder / f"duplicates-{part}.npy", lambda file, copies=copies: np.save(file, copies))
    ranks.barrier()
    return Dropped(np.concatenate([np.load(folder / f"duplicates-{part}.npy") for part in range(1 << bits)]))


def _later_copies(columns: Sequence[np.ndarray], part: int, bits: int) -> np.ndarray:
    chosen = [_of_part(column, part, bits) if bits else np.arange(len(column)) for column in columns]
    hashes = np.concatenate([column[rows] for column, rows in zip(columns, chosen, strict=True)])
    unit = np.repeat(np.arange(len(columns)), [len(rows) for rows in chosen])
    row = np.concatenate(chosen)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first stays first
    is_copy = np.zeros(len(order), bool)
    is_copy[1:] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    copies = order[is_copy]
    return np.stack([unit[copies], row[copies]], axis=1)


def _of_part(column: np.ndarray, part: int, bits: int) -> np.ndarray:
    """The rows of digests that begin with the bits of ``part``. It looks at some at a time: a unit may have many."""
    found = [np.empty(0, np.int64)]
    for first in range(0, len(column), _AT_ONCE):
        heads = column[first : first + _AT_ONCE, 0]
        found.append(first + np.flatnonzero(heads >> np.uint64(64 - bits) == part))
    return np.concatenate(found)


def _mapped(path: Path) -> np.ndarray:
    """uint64 [items, 2]"""
    size = path.stat().st_size
    return np.memmap(path, np.uint64, "r", shape=(size // 16, 2)) if size else np.empty((0, 2), np.uint64)


def _hash_file(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.number:05d}-{unit.stamp}.hashes"


def _save(path: Path, put: Callable[[BinaryIO], object]) -> None:
    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            put(file)

    write(path, fill)
