"""Two files aligned line by line -> pairs.

The source is cut by bytes. The lines before a cut are counted, and the target is cut at the same line.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from data_prep.corpus import InputFile
from data_prep.formats import check_plain
from data_prep.pieces import PIECE_BYTES, Piece, cut_files, line_blocks, resolve
from data_prep.readers import Item, clean_parts, split_lines
from hvdtrain.data.cleaning import EXACT, Cleaning, begin_file, refuse_wide
from hvdtrain.errors import DataError

_BLOCK = 1 << 22  # bytes between two entries of a line index


class LineIndex:
    """Finds the line of a byte and the byte of a line; it keeps how many lines end before each block of the file.

    Errors: DataError where the file cannot be read.
    """

    def __init__(self, file: InputFile):
        self.file = file
        counts, last = [], b"\n"
        with file.open() as handle:
            while block := file.read(handle, _BLOCK):
                if not counts:
                    refuse_wide(block, file.path)  # its line ends, if it has any, are not these
                counts.append(block.count(b"\n"))
                last = block[-1:]
        self.before = np.cumsum([0, *counts])
        self.lines = int(self.before[-1]) + (last != b"\n")

    def line_at(self, byte: int) -> int:
        """The number of line ends before ``byte``."""
        block = byte // _BLOCK
        return int(self.before[block]) + self._read(block * _BLOCK, byte % _BLOCK).count(b"\n")

    def byte_of(self, line: int) -> int:
        """Where line ``line`` (from 0) begins; beyond the last: the file's size."""
        if line >= self.lines:
            return self.file.bytes
        if line == 0:
            return 0
        block = int(np.searchsorted(self.before, line)) - 1
        ends = np.flatnonzero(np.frombuffer(self._read(block * _BLOCK, _BLOCK), np.uint8) == ord("\n"))
        return block * _BLOCK + int(ends[line - self.before[block] - 1]) + 1

    def _read(self, offset: int, size: int) -> bytes:
        with self.file.open() as handle:
            handle.seek(offset)
            return self.file.read(handle, size)


@dataclass(frozen=True)
class AlignedReader:
    """``files`` and ``targets``: as many, each pair with as many lines. Empty lines keep their place.

    Errors: DataError that says both line counts where they differ.
    """

    files: Sequence[InputFile]
    targets: Sequence[InputFile]
    cleaning: Cleaning = EXACT
    skip_bad: bool = False

    can_begin_anywhere: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_plain([*self.files, *self.targets])
        files = [replace(file, partner=target) for file, target in zip(self.files, self.targets, strict=True)]
        indexes = {}
        for source, target in zip(files, self.targets, strict=True):
            if source.bytes and (source.compression or target.compression):
                continue  # counted while they are read
            pair = LineIndex(source), LineIndex(target)
            _check_lines(source, pair[0].lines, target, pair[1].lines)
            indexes[source] = pair
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "_indexes", indexes)

    def identity(self) -> dict[str, Any]:
        return {
            "invalid_utf8": self.cleaning.invalid,
            "nfc": self.cleaning.nfc,
            "skip_bad": self.skip_bad,
        }

    def pieces(self, unit_bytes: int, tail_fraction: float = 0.0) -> list[Piece]:
        pieces = []
        for file in self.files:
            whole = file not in self._indexes  # type: ignore[attr-defined]
            pieces += cut_files([file], file.bytes if whole else min(PIECE_BYTES, unit_bytes))
        return pieces

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        source, target = piece.file, piece.file.partner
        assert target is not None
        if source not in self._indexes:  # type: ignore[attr-defined]
            yield from self._stream(source, target, counts)
            return
        index, target_index = self._indexes[source]  # type: ignore[attr-defined]
        with source.open() as handle:

            def read(offset: int, size: int) -> bytes:
                handle.seek(offset)
                return source.read(handle, size)

            begin, end = resolve(read, piece, "line")
            if begin == end:
                return
            raw = read(begin, end - begin)
        target_begin, target_end = (target_index.byte_of(index.line_at(at)) for at in (begin, end))
        if end == source.bytes:
            target_end = target.bytes
        with target.open() as handle:
            handle.seek(target_begin)
            target_raw = target.read(handle, target_end - target_begin)
        sources = self._lines(raw, source, begin, counts)
        targets = self._lines(target_raw, target, target_begin, counts)
        if len(sources) != len(targets):
            raise DataError(f"{source.path} or {target.path} changed while they were read")
        yield _pairs(sources, targets)

    def _lines(self, raw: bytes, file: InputFile, offset: int, counts: Counter) -> list[bytes | None]:
        """The lines; None for one that is bad. It is left out, together with the line beside it."""
        offset, raw = begin_file(raw, offset, file.path, counts, by_lines=True)
        return clean_parts(split_lines, raw, offset, file.path, self.cleaning, self.skip_bad, counts)

    def _stream(self, source: InputFile, target: InputFile, counts: Counter) -> Iterator[list[Item]]:
        """Read both files from their starts, side by side; at least one of them is compressed."""
        held: list[list[bytes | None]] = [[], []]
        seen = [0, 0]
        parts = [self._line_parts(file, counts) for file in (source, target)]
        at_end = [False, False]
        while not all(at_end):
            side = 0 if (len(held[0]) <= len(held[1]) and not at_end[0]) or at_end[1] else 1
            lines = next(parts[side], None)
            if lines is None:
                at_end[side] = True
                continue
            seen[side] += len(lines)
            held[side] += lines
            if at_end[1 - side] and not held[1 - side]:
                held[side] = []  # only counted from here on, for the message
                continue
            ready = min(map(len, held))
            yield _pairs(held[0][:ready], held[1][:ready])
            held = [held[0][ready:], held[1][ready:]]
        _check_lines(source, seen[0], target, seen[1])

    def _line_parts(self, file: InputFile, counts: Counter) -> Iterator[list[bytes | None]]:
        for offset, raw in line_blocks(file, _BLOCK):
            yield self._lines(raw, file, offset, counts)


def _pairs(sources: list[bytes | None], targets: list[bytes | None]) -> list[Item]:
    return [pair for pair in zip(sources, targets, strict=True) if None not in pair]  # type: ignore[misc]


def _check_lines(source: InputFile, source_lines: int, target: InputFile, target_lines: int) -> None:
    if source_lines != target_lines:
        raise DataError(
            f"{source.path} has {source_lines:,} lines but {target.path} has {target_lines:,}: "
            "pairs must be aligned line by line"
        )
