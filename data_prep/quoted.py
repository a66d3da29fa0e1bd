"""Cells in quotes, as Python's csv reads them: a tab, a comma or a line end within quotes is text.

A line end may stand within quotes anywhere, so such a file is read from its start, some megabytes at a time.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator

from data_prep.corpus import InputFile
from data_prep.pieces import line_blocks
from hvdtrain.data.cleaning import begin_file
from hvdtrain.errors import DataError

_LONGEST_CELL = 1 << 24  # characters; csv's own limit is 131,072
_BLOCK = 1 << 22
csv.field_size_limit(_LONGEST_CELL)


def quoted_rows(file: InputFile, delimiter: str, counts: Counter) -> Iterator[tuple[int, list[str]]]:
    """(number of the line on which it begins, cells) of each row that is not empty. Bytes that are not UTF-8 stand in
    the cells as surrogates.

    Errors: DataError where quotes are out of place, for after that nobody can tell where rows begin.
    """
    rows = csv.reader(_lines(file, counts), delimiter=delimiter, strict=True)
    while True:
        first = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(_explained(file, first, rows.line_num, str(error))) from None
        if cells:
            yield first, cells


def _lines(file: InputFile, counts: Counter) -> Iterator[str]:
    """With their ends."""
    for offset, raw in line_blocks(file, _BLOCK):
        raw = begin_file(raw, offset, file.path, counts, by_lines=True)[1]
        yield from io.StringIO(raw.decode("utf-8", "surrogateescape"), newline="\n")  # splitlines() would cut at more


def _explained(file: InputFile, first: int, last: int, error: str) -> str:
    """What is wrong with the row of lines ``first`` to ``last``."""
    if "unexpected end" in error or "field limit" in error:
        line = _open_quote(file, first, last)
        longest = f" within {_LONGEST_CELL >> 20} million characters" if "field limit" in error else ""
        return f"{file.path}: the quote that opens on line {line:,} never closes{longest}"
    return (
        f"{file.path}: line {last:,} of the row that begins on line {first:,}: {error}; "
        'a quote within a quoted cell is written twice ("")'
    )


def _open_quote(file: InputFile, first: int, last: int) -> int:
    """On which of these lines of a row does the quote open that is still open at their end?"""
    is_open, opened = False, first
    for number, line in enumerate(_lines(file, Counter()), 1):
        if number > last:
            break
        if number >= first and (quotes := line.replace('""', "").count('"')):
            is_open ^= bool(quotes % 2)
            opened = number if is_open else opened
    return opened
