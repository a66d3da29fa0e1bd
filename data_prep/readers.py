"""Readers: pieces of the input -> items. An item is a tuple of texts (UTF-8 bytes) that belong together:

text      (document,)
pairs     (source, target)
labels    (label, text) or (label, text, second text)
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic_core import from_json

from data_prep.cleaning import EXACT, Cleaning
from data_prep.corpus import InputFile
from data_prep.pieces import BLANK_LINES, PIECE_BYTES, Piece, chunks, cut_files
from hvdtrain.errors import ConfigError, DataError

Item = tuple[bytes, ...]
_BLANK_HEAD = re.compile(rb"(?:[ \t\r]*\n)*")


class Reader(Protocol):
    """Where items come from. ``can_begin_anywhere``: a piece may begin at any byte of a file."""

    files: Sequence[InputFile]
    can_begin_anywhere: bool

    def pieces(self, unit_bytes: int, tail_fraction: float) -> list[Piece]:
        """The whole input in order, for units of ``unit_bytes``."""

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        """The items of a piece, some megabytes at a time; what was left out or mended is added to ``counts``."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide what the items are."""


@dataclass(frozen=True)
class TextReader:
    """Plain text, one document a file, a line, or between blank lines; ``.jsonl`` files: ``field`` of each line."""

    files: Sequence[InputFile]
    documents: str = "file"
    field: str = "text"
    cleaning: Cleaning = EXACT

    can_begin_anywhere: ClassVar[bool] = True

    def identity(self) -> dict[str, Any]:
        return {
            "one_document_a": self.documents,
            "field": self.field,
            "invalid_utf8": self.cleaning.invalid,
            "nfc": self.cleaning.nfc,
        }

    def pieces(self, unit_bytes: int, tail_fraction: float = 0.0) -> list[Piece]:
        if tail_fraction and any(file.compression for file in self.files if file.split is None):
            raise ConfigError("--val-split tail needs sizes, which compressed files do not tell; use --val-split hash")
        size = PIECE_BYTES if self.documents == "file" else min(PIECE_BYTES, unit_bytes)
        return cut_files(self.files, size, tail_fraction)

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        path = piece.file.path
        if piece.file.suffix == ".jsonl":
            for offset, raw in chunks(piece, "line"):
                rows = read_json_lines(raw, path, offset, self.cleaning, counts)
                yield [
                    (text,)
                    for at, row in rows
                    if (text := self.cleaning.clean_text(_field(row, self.field, path, at), path, at, counts))
                ]
            return
        for offset, raw in chunks(piece, self.documents):
            text = self.cleaning.clean(raw, path, offset, counts)
            if self.documents == "file":
                yield [(text,)] if text else []
            elif self.documents == "line":
                yield [(line,) for line in split_lines(text) if line.strip()]
            else:
                yield [(paragraph,) for paragraph in split_paragraphs(text) if paragraph.strip()]


@dataclass(frozen=True)
class TableReader:
    """Rows with named fields: ``.jsonl``, or tab-separated columns with a header line or with names given.

    fields: the names wanted, in the item's order.
    """

    files: Sequence[InputFile]
    fields: Sequence[str]
    columns: Sequence[str] = ()
    cleaning: Cleaning = EXACT

    can_begin_anywhere: ClassVar[bool] = True

    def identity(self) -> dict[str, Any]:
        return {
            "fields": list(self.fields),
            "columns": list(self.columns),
            "invalid_utf8": self.cleaning.invalid,
            "nfc": self.cleaning.nfc,
        }

    def pieces(self, unit_bytes: int, tail_fraction: float = 0.0) -> list[Piece]:
        return cut_files(self.files, min(PIECE_BYTES, unit_bytes))

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        path = piece.file.path
        places = None if piece.file.suffix == ".jsonl" else self._places(piece.file)
        for offset, raw in chunks(piece, "line"):
            if places is None:
                yield [
                    tuple(
                        self.cleaning.clean_text(_field(row, name, path, at), path, at, counts) for name in self.fields
                    )
                    for at, row in read_json_lines(raw, path, offset, self.cleaning, counts)
                ]
                continue
            lines = split_lines(self.cleaning.clean(raw, path, offset, counts))
            if offset == 0 and not self.columns:
                lines = lines[1:]
            yield [self._row(line, places, path) for line in lines if line]

    def _places(self, file: InputFile) -> list[int]:
        """Which columns hold the fields."""
        names = list(self.columns)
        if not names:
            with file.open() as handle:
                head = file.read(handle, 1 << 16).split(b"\n")[0].rstrip(b"\r")
            names = head.decode("utf-8", "replace").removeprefix("\ufeff").split("\t")
        missing = [name for name in self.fields if name not in names]
        if missing:
            raise DataError(
                f"{file.path} has no column {', '.join(map(repr, missing))}; it has: {', '.join(map(repr, names))}; "
                "name those to use with the --*-field options, or all columns of a file without a header with --columns"
            )
        return [names.index(name) for name in self.fields]

    def _row(self, line: bytes, places: list[int], path: Path) -> Item:
        cells = line.split(b"\t")
        try:
            return tuple(cells[place] for place in places)
        except IndexError:
            start = line[:60].decode("utf-8", "replace")
            raise DataError(
                f"{path}: a line has {len(cells)} columns, column {max(places) + 1} is needed: {start!r}"
            ) from None


def split_lines(text: bytes) -> list[bytes]:
    """Lines without their ends (LF or CR LF); the last may have none."""
    lines = text.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line[:-1] if line.endswith(b"\r") else line for line in lines] if b"\r" in text else lines


def split_paragraphs(text: bytes) -> list[bytes]:
    """What stands between blank lines (of white space), without the line ends around it."""
    begin = _BLANK_HEAD.match(text).end()  # type: ignore[union-attr]
    end = text.find(b"\n", len(text.rstrip(b" \t\r\n")))
    return [part.strip(b"\r\n") for part in BLANK_LINES.split(text[begin : end if end >= 0 else None])]


def read_json_lines(
    raw: bytes, path: Path, offset: int, cleaning: Cleaning, counts: Counter
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte of the line's start, object) of each line that is not empty. Errors: DataError with file and byte."""
    at = offset
    for line in raw.split(b"\n"):
        if line.strip():
            try:
                row = from_json(line)
            except ValueError as error:
                row = _read_odd_json(line, path, at, cleaning, counts, str(error))
            if not isinstance(row, dict):
                raise DataError(f"{path}: the line at byte {at} is not a JSON object")
            yield at, row
        at += len(line) + 1


def _read_odd_json(line: bytes, path: Path, at: int, cleaning: Cleaning, counts: Counter, error: str) -> Any:
    """What begins with a byte order mark, is not UTF-8, or holds half a surrogate pair; there ``cleaning`` decides."""
    try:
        return json.loads(replace(cleaning, nfc=False).clean(line, path, at, counts))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: the line at byte {at} is not JSON: {error}") from None


def _field(row: dict[str, Any], name: str, path: Path, at: int) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):  # a label, mostly
        return str(value)
    if name not in row:
        raise DataError(f"{path}: the line at byte {at} has no field {name!r}; it has: {', '.join(row) or 'nothing'}")
    raise DataError(f"{path}: field {name!r} of the line at byte {at} is not text")
