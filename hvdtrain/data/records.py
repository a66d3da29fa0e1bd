"""Documents of one split by their number: for pairs, labels and questions, whose rows have a length of their own.

A shard holds tokens and their offsets; beside them a value for each document (``column``: the label, the span of an
answer), or any number of values (``many_hot``), told apart by offsets of their own. ``shards.py`` has the layout.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hvdtrain.data.shards import TOKENS_OF, Manifest, ReadThrough, map_shard, offsets_of
from hvdtrain.data.stream import shards_of


class Records:
    """``len(records)`` documents. ``lengths``: int64 [documents, kinds of tokens], read from the offsets at the start.

    Tokens are mapped, not read. Safe under fork and threads; sent to another process, it maps the shards there anew.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str):
        self._opened_with = folder, manifest, split
        infos = shards_of(folder, manifest, split)
        self.names = TOKENS_OF[manifest.kind]
        self._shards = [map_shard(folder, info, manifest) for info in infos]
        self._ends = np.cumsum([info.documents for info in infos])
        self._firsts = self._ends - [info.documents for info in infos]
        self._offsets = {
            name: [
                shard[offsets_of(name)][: info.documents + 1] for shard, info in zip(self._shards, infos, strict=True)
            ]
            for name in self.names
        }
        columns = [np.concatenate([np.diff(offsets) for offsets in self._offsets[name]]) for name in self.names]
        self.lengths = np.stack(columns, axis=1)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple:
        return Records, self._opened_with

    @property
    def read_through(self) -> list[Path]:
        """The shards that are read through HDF5, because they cannot be mapped."""
        folder, manifest, split = self._opened_with
        return [
            folder / info.file
            for info, shard in zip(manifest.split(split), self._shards, strict=True)
            if any(isinstance(values, ReadThrough) for values in shard.values())
        ]

    def tokens(self, name: str, row: int) -> np.ndarray:
        """Tokens ``name`` of document ``row``."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        offsets = self._offsets[name][number]
        at = row - self._firsts[number]
        return self._shards[number][name][int(offsets[at]) : int(offsets[at + 1])]

    def padded(self, name: str, rows: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of many documents, filled up with 0 to the longest, or cut to ``width``.

        int64 [rows, T] and the lengths, int64 [rows].
        """
        lengths = self.lengths[rows, self.names.index(name)]
        if width is not None:
            lengths = np.minimum(lengths, width)
        out = np.zeros((len(rows), max(1, int(lengths.max(initial=1)))), np.int64)
        for place, row in enumerate(rows.tolist()):
            out[place, : lengths[place]] = self.tokens(name, row)[: lengths[place]]
        return out, lengths

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Dataset ``name``, one value a document: [rows, ...]."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        values = [self._shards[n][name][int(row - self._firsts[n])] for n, row in zip(numbers, rows, strict=True)]
        return np.array(values)

    def many_hot(self, rows: np.ndarray, classes: int) -> np.ndarray:
        """Which labels documents have that may have several: bool [rows, classes]."""
        out = np.zeros((len(rows), classes), bool)
        for place, row in enumerate(rows.tolist()):
            shard, at = self.place(row)
            first, end = map(int, shard["label_offsets"][at : at + 2])
            out[place, shard["labels"][first:end]] = True
        return out

    def place(self, row: int) -> tuple[Mapping[str, np.ndarray | ReadThrough], int]:
        """The shard of document ``row``, and its number there."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._shards[number], row - int(self._firsts[number])

    @property
    def shards(self) -> list[tuple[int, Mapping[str, np.ndarray | ReadThrough]]]:
        """Each shard, and the number of its first document."""
        return list(zip(map(int, self._firsts), self._shards, strict=True))
