"""Tables -> items: rows with named cells, of tabs or commas, in quotes or not; or the fields of JSON objects."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from data_prep.bad import KINDS, leave_out
from data_prep.corpus import InputFile
from data_prep.formats import CSV, QUOTED_TSV, TSV, resolve
from data_prep.json_items import JsonItems
from data_prep.pieces import PIECE_BYTES, Piece, chunks, cut_files
from data_prep.quoted import quoted_rows
from data_prep.readers import Item, clean_parts, split_lines
from hvdtrain.data.cleaning import EXACT, BadItem, Cleaning, begin_file
from hvdtrain.errors import DataError

_HEAD_BYTES = 1 << 16
_QUOTED_CELL = re.compile(rb'(?:^|\t)"[^\t\n]*"(?=\t|\r?$)', re.MULTILINE)
_BATCH_BYTES = 1 << 22


class _Columns(NamedTuple):
    names: Sequence[str]
    places: Sequence[int]  # of the fields that are wanted


@dataclass(frozen=True)
class TableReader:
    """Rows of tables with a header line, or with names given; or JSON objects.

    fields: the names wanted, in the item's order. label: the one of them that is a label, which is never empty.
    columns: names for files without a header line. quoted: cells between tabs may be in quotes, as those of .csv.
    """

    files: Sequence[InputFile]
    fields: Sequence[str]
    columns: Sequence[str] = ()
    cleaning: Cleaning = EXACT
    label: str | None = None
    quoted: bool = False
    skip_bad: bool = False

    can_begin_anywhere: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", resolve(self.files, "labels" if self.label else "pairs", self.quoted))

    def identity(self) -> dict[str, Any]:
        return {
            "fields": list(self.fields),
            "columns": list(self.columns),
            "quoted": self.quoted,
            "invalid_utf8": self.cleaning.invalid,
            "nfc": self.cleaning.nfc,
            "skip_bad": self.skip_bad,
        }

    def pieces(self, unit_bytes: int, tail_fraction: float = 0.0) -> list[Piece]:
        return cut_files(self.files, min(PIECE_BYTES, unit_bytes))

    def items(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        if piece.file.how == TSV:
            return self._plain(piece, counts)
        if piece.file.how in (CSV, QUOTED_TSV):
            return self._quoted(piece.file, counts)
        return JsonItems(self.fields, self.label, self.cleaning, self.skip_bad).read(piece, counts)

    # --- cells between tabs ------------------------------------------------------------------------------------------

    def _plain(self, piece: Piece, counts: Counter) -> Iterator[list[Item]]:
        path = piece.file.path
        columns = None
        for at, raw in chunks(piece, "line"):
            columns = columns or self._columns(path, self.columns or _header(piece.file))
            try:
                offset, raw = begin_file(raw, at, path, counts, by_lines=True)
            except BadItem as bad:
                leave_out(bad, self.skip_bad, counts)
                continue
            lines = clean_parts(split_lines, raw, offset, path, self.cleaning, self.skip_bad, counts)
            if at == 0 and lines:
                if not self.columns:
                    lines[0] = None
                elif lines[0] is not None:
                    self._refuse_header(path, lines[0].split(b"\t"), columns)
            items = []
            for number, line in enumerate(lines):
                if not line:
                    continue
                cells = line.split(b"\t")
                try:
                    items.append(self._row(cells, columns))
                except BadItem as bad:
                    begins = offset + sum(len(one) + 1 for one in raw.split(b"\n")[:number])
                    hint = "; are its cells in quotes? (--quoted)" if bad.kind == "cells" and b'"' in line else ""
                    message = f"{path}: the line at byte {begins} {bad}: {_start(line)}{hint}"
                    leave_out(BadItem(bad.kind, message), self.skip_bad, counts)
            if quoted := len(_QUOTED_CELL.findall(raw)) if b'"' in raw else 0:
                counts["quoted_cells"] += quoted
            yield items

    # --- cells in quotes ---------------------------------------------------------------------------------------------

    def _quoted(self, file: InputFile, counts: Counter) -> Iterator[list[Item]]:
        columns = self._columns(file.path, self.columns) if self.columns else None
        items: list[Item] = []
        size = 0
        for number, (line, texts) in enumerate(quoted_rows(file, "," if file.how == CSV else "\t", counts)):
            if columns is None:
                columns = self._columns(file.path, texts)
                continue
            try:
                cells = [self._cell(text, file.path, counts) for text in texts]
                if number == 0:
                    self._refuse_header(file.path, cells, columns)
                items.append(self._row(cells, columns))
            except BadItem as bad:
                message = f"{file.path}: the row on line {line:,} {bad}: {_start(texts[0].encode(errors='replace'))}"
                leave_out(BadItem(bad.kind, message), self.skip_bad, counts)
                continue
            size += sum(map(len, items[-1]))
            if size >= _BATCH_BYTES:
                yield items
                items, size = [], 0
        yield items

    def _cell(self, text: str, path: Path, counts: Counter) -> bytes:
        if text.isascii() and "\0" not in text:
            return text.encode()
        try:
            return self.cleaning.clean(text.encode("utf-8", "surrogateescape"), path, 0, counts)
        except BadItem as bad:
            raise BadItem(bad.kind, f"is {KINDS[bad.kind]} (--invalid-utf8 replace)") from None

    # --- rows --------------------------------------------------------------------------------------------------------

    def _columns(self, path: Path, names: Sequence[str]) -> _Columns:
        """Which columns hold the fields."""
        if missing := [name for name in self.fields if name not in names]:
            raise DataError(
                f"{path} has no column {', '.join(map(repr, missing))}; it has: {', '.join(map(repr, names))}; "
                "name those to use with the --*-field options, or all columns of a file without a header with --columns"
            )
        if twice := next((name for name in self.fields if names.count(name) > 1), None):
            raise DataError(f"{path} has {names.count(twice)} columns {twice!r}; which one is meant?")
        return _Columns(names, [names.index(name) for name in self.fields])

    def _row(self, cells: list[bytes], columns: _Columns) -> Item:
        """Errors: BadItem, whose message begins with the verb."""
        if len(cells) != len(columns.names):
            raise BadItem("cells", f"has {len(cells)} cells for {len(columns.names)} columns")
        item = tuple([cells[place] for place in columns.places])
        if self.label and not item[0]:
            raise BadItem("label", "has no label")
        return item

    def _refuse_header(self, path: Path, cells: list[bytes], columns: _Columns) -> None:
        """Errors: DataError where --columns names what has a header line: it would be a row, its words a label."""
        cells = [cell.lower() for cell in cells]
        label = {name.lower().encode() for name in (self.label, "label") if name and self.label}
        if cells == [name.lower().encode() for name in columns.names] or (
            len(cells) == len(columns.names) and cells[columns.places[0]] in label
        ):
            raise DataError(f"{path} begins with a header line ({_start(b' '.join(cells))}); leave out --columns")


def _header(file: InputFile) -> list[str]:
    with file.open() as handle:
        head = file.read(handle, _HEAD_BYTES)
    if len(head) == _HEAD_BYTES and b"\n" not in head:
        raise DataError(f"{file.path}: the first line, which names the columns, is longer than {_HEAD_BYTES >> 10} KiB")
    head = begin_file(head, 0, file.path, Counter(), by_lines=True)[1]
    return head.split(b"\n")[0].rstrip(b"\r").decode("utf-8", "replace").split("\t")


def _start(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
