"""Encoded documents of one unit, gathered until they are a shard of each split.

Most units make one shard of a split. A unit whose files cannot be cut may hold any amount of text, so it makes another
shard whenever it has gathered enough; which documents are in which follows from the text alone.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.pieces import Unit
from hvdtrain.data.shards import SPLITS, ShardInfo, write_shard


class Gathering:
    """``add`` what is encoded, ``write`` in the end; ``shards`` is what was written. dtype: of tokens in a shard.

    shard_tokens: a unit with compressed files writes a shard as soon as it has so many.
    """

    def __init__(self, folder: Path, unit: Unit, dtype: np.dtype, shard_tokens: int):
        self.shards: list[ShardInfo] = []
        self._folder, self._number, self._dtype = folder, unit.number, dtype
        self._most = shard_tokens if any(piece.is_stream for piece in unit.pieces) else None
        self._part = 0
        self._begin()

    def _begin(self) -> None:
        self._tokens = 0
        self._held: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in SPLITS}

    def add(self, split: str, datasets: Mapping[str, np.ndarray]) -> None:
        """datasets: as in a shard, but the lengths of documents in place of their offsets."""
        if not any(len(values) for values in datasets.values()):
            return
        narrow = {key: values.astype(self._dtype) for key, values in datasets.items() if key.endswith("tokens")}
        self._held[split].append({**datasets, **narrow})
        self._tokens += max(map(len, narrow.values()))

    def write_if_full(self) -> None:
        if self._most is not None and self._tokens >= self._most:
            self.write()

    def write(self) -> None:
        """What is held, as a shard of each split that has any."""
        for split, parts in self._held.items():
            if parts:
                self.shards.append(write_shard(self._folder, split, self._number, _joined(parts), self._part))
        self._part += 1
        self._begin()


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One dataset of each name; lengths, under the names of offsets, become offsets."""
    joined = {}
    for key in list(parts[0]):  # each part is let go when it is joined
        whole = np.concatenate([part.pop(key) for part in parts])
        joined[key] = np.concatenate([[0], np.cumsum(whole)]) if key.endswith("offsets") else whole
    return joined
