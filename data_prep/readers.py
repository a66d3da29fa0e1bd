"""Readers: pieces of the input -> items. An item is a tuple of texts (UTF-8 bytes) that belong together:

text      (document,)
pairs     (source, target)
labels    (label, text) or (label, text, second text)

Only \\n ends a line; a \\r before it goes with it. A byte order mark at a file's beginning is no text.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from data_prep.bad import leave_out
from data_prep.corpus import InputFile
from data_prep.formats import TEXT, resolve
from data_prep.json_items import JsonItems
from data_prep.pieces import BLANK_LINES, PIECE_BYTES, Piece, chunks, cut_files
from hvdtrain.data.cleaning import EXACT, BadItem, Cleaning, begin_file
from hvdtrain.errors import ConfigError

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
    """Plain text, one document a file, a line, or between blank lines; of JSON ``field`` of each object."""

    files: Sequence[InputFile]
    documents: str = "file"
    field: str = "text"
    cleaning: Cleaning = EXACT
    skip_bad: bool = False

    can_begin_anywhere: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", resolve(self.files, "text"))

    def identity(self) -> dict[str, Any]:
        return {
            "one_document_a": self.documents,
            "field": self.field,
            "invalid_utf8": self.cleaning.invalid,
            "nfc": self.cleaning.nfc,
            "skip_bad": self.skip_bad,
        }

    def pieces(self, unit_bytes: int, tail_fraction: float = 0.0) -> list[Piece]:
        if tail_fraction and (file := next((file for file in self.files if file.is_stream and not file.split), None)):
            raise ConfigError(
                f"--val-split tail cuts files by their sizes, and {file.path} cannot be cut; use --val-split hash"
            )
        size = PIECE_BYTES if self.documents == "file" else min(PIECE_BYTES, unit_bytes)
        return cut_files(self.files, size, tail_fraction)

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        if piece.file.how != TEXT:
            for items in JsonItems([self.field], None, self.cleaning, self.skip_bad).read(piece, counts):
                full = [item for item in items if item[0]]
                if empty := len(items) - len(full):
                    counts["empty_documents"] += empty
                yield full
            return
        is_whole = self.documents == "file"  # and may be white space alone
        for offset, raw in chunks(piece, self.documents):
            texts = self._documents(raw, offset, piece.file.path, counts)
            yield [(text,) for text in texts if text and (is_whole or not text.isspace())]

    def _documents(self, raw: bytes, offset: int, path: Path, counts: Counter) -> list[bytes | None]:
        try:
            offset, raw = begin_file(raw, offset, path, counts, by_lines=self.documents != "file")
            if self.documents == "file":
                return [self.cleaning.clean(raw, path, offset, counts)]
        except BadItem as bad:
            leave_out(bad, self.skip_bad, counts)
            return []
        split = split_lines if self.documents == "line" else split_paragraphs
        return clean_parts(split, raw, offset, path, self.cleaning, self.skip_bad, counts)


def clean_parts(
    split: Callable[[bytes], list[bytes]],
    raw: bytes,
    offset: int,
    path: Path,
    cleaning: Cleaning,
    skip_bad: bool,
    counts: Counter,
) -> list[bytes | None]:
    """``split`` of the cleaned text; with ``skip_bad`` None stands for each part that cannot be used.

    Errors: DataError for the first of these without ``skip_bad``.
    """
    try:
        return split(cleaning.clean(raw, path, offset, counts))  # type: ignore[return-value]
    except BadItem as bad:
        if not skip_bad or bad.kind == "utf16":  # no line end of it is one byte
            leave_out(bad, skip_bad, counts)
            return [None] * len(split(raw))
    parts: list[bytes | None] = []
    at = 0
    for part in split(raw):
        at = raw.index(part, at)
        try:
            parts.append(cleaning.clean(part, path, offset + at, counts))
        except BadItem as bad:
            leave_out(bad, skip_bad, counts)
            parts.append(None)
        at += len(part)
    return parts


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
