"""All tokens of one split as one long line, mapped from its shards."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from hvdtrain.data.shards import SPLITS, Manifest, ReadThrough, ShardInfo, map_shard
from hvdtrain.errors import ConfigError, DataError


def shards_of(folder: Path, manifest: Manifest, split: str) -> tuple[ShardInfo, ...]:
    """Errors: ConfigError for an unknown split, DataError where the folder has no shards of it."""
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}; there are: {', '.join(SPLITS)}")
    infos = manifest.split(split)
    if not infos:
        present = sorted({shard.split for shard in manifest.shards}) or ["none"]
        raise DataError(f"{folder} has no {split} shards; it has: {', '.join(present)}")
    return infos


def read_through_note(shards: Collection[Path]) -> list[str]:
    """What to tell the user of shards that cannot be mapped: one sentence, or none where there are none."""
    if not shards:
        return []
    others = f" and {len(shards) - 1} others" if len(shards) > 1 else ""
    return [
        f"shards that are chunked or compressed are not mapped but read through HDF5, which is slower: "
        f"{min(shards)}{others}; prepare them again"
    ]


class TokenStream:
    """``len(stream)`` tokens in one line. Opening it opens no shard: each is mapped when its tokens are first wanted.

    corpora: folders with their manifests, one after another in the line (``bases``: where each begins). Safe under
    fork and threads; sent to another process, it maps the shards there anew.
    """

    def __init__(self, corpora: Sequence[tuple[Path, Manifest]], split: str):
        self._corpora, self._split = corpora, split
        self._infos = [
            (folder, info, manifest) for folder, manifest in corpora for info in shards_of(folder, manifest, split)
        ]
        counts = [info.tokens for _, info, _ in self._infos]
        self._ends = np.cumsum(counts)
        self._firsts = self._ends - counts
        self._shards: list[np.ndarray | ReadThrough | None] = [None] * len(counts)
        self._views: dict[tuple[int, int], np.ndarray] = {}
        self.dtype = np.dtype(
            max((manifest.dtype for _, manifest in corpora), key=lambda name: np.dtype(name).itemsize)
        )
        sizes = [sum(i.tokens for i in manifest.split(split)) for _, manifest in corpora]
        self.bases = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple:
        return TokenStream, (self._corpora, self._split)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """``out[i] = stream[starts[i] : starts[i] + length]``: [len(starts), length] of the shard dtype.

        One vectorised gather per shard; only windows that cross a shard's end are put together piece by piece.
        """
        if len(self._ends) == 1 and isinstance(self._shard(0), np.ndarray):
            return self._view(0, length)[starts]
        out = np.empty((len(starts), length), self.dtype)
        shard_of = np.searchsorted(self._ends, starts, side="right")
        ends_in = np.searchsorted(self._ends, starts + (length - 1), side="right")
        whole = shard_of == ends_in
        for number in np.unique(shard_of[whole]):
            if isinstance(self._shard(number), ReadThrough):
                whole &= shard_of != number
                continue
            rows = np.flatnonzero(whole & (shard_of == number))
            out[rows] = self._view(number, length)[starts[rows] - self._firsts[number]]
        for row in np.flatnonzero(~whole):
            out[row] = self.slice(int(starts[row]), length)
        return out

    def slice(self, start: int, length: int) -> np.ndarray:
        """``stream[start : start + length]``, across shards."""
        pieces = []
        for number in range(int(np.searchsorted(self._ends, start, side="right")), len(self._ends)):
            first = self._firsts[number]
            if first >= start + length:
                break
            pieces.append(self._shard(number)[max(0, start - first) : start + length - first])
        return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]

    @property
    def read_through(self) -> list[Path]:
        """Those shards that are read through HDF5, because they cannot be mapped: of all that were opened so far, and
        of the first of each folder, which is opened for this.
        """
        for base in self.bases[:-1]:
            if base < len(self):
                self._shard(int(np.searchsorted(self._ends, base, side="right")))
        return [
            folder / info.file
            for (folder, info, _), shard in zip(self._infos, self._shards, strict=True)
            if isinstance(shard, ReadThrough)
        ]

    def _shard(self, number: int) -> np.ndarray | ReadThrough:
        if (shard := self._shards[number]) is None:
            shard = self._shards[number] = map_shard(*self._infos[number])["tokens"]
        return shard

    def _view(self, number: int, length: int) -> np.ndarray:
        """All windows of one shard, [tokens - length + 1, length], no copy; kept, for numpy is slow to make it."""
        if (number, length) not in self._views:
            view = np.lib.stride_tricks.sliding_window_view(self._shard(number), length)
            self._views[number, length] = view
        return self._views[number, length]
