"""JSON -> items: an object a line, an array of objects, or one object."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from data_prep.bad import leave_out
from data_prep.corpus import InputFile
from data_prep.formats import JSON_ARRAY, JSON_OBJECT
from data_prep.pieces import Piece, Places, chunks
from hvdtrain.data.cleaning import EXACT, BadItem, Cleaning, begin_file
from hvdtrain.errors import DataError

Rows = Iterable[tuple[int, bytes]]  # (byte where it begins, JSON)

_READ_BYTES = 1 << 20
_LONGEST = 1 << 28  # of an object
_LONGEST_SIGN = 16  # characters of JSON that make sense only together, but for strings
_BATCH_BYTES = 1 << 22
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class JsonItems:
    """``fields`` of each object, which must be text; of ``label`` a whole number will do, which is written as text."""

    fields: Sequence[str]
    label: str | None = None
    cleaning: Cleaning = EXACT
    skip_bad: bool = False

    def read(self, piece: Piece, counts: Counter) -> Iterator[list[tuple[bytes, ...]]]:
        """The items of a piece, some megabytes at a time."""
        path = piece.file.path
        if piece.file.how == JSON_ARRAY:
            rows = _elements(piece.file, counts)
            for batch in _batches(_at_places(rows, piece.places) if piece.places else rows):
                yield self._items(batch, path, "element", counts)
        elif piece.file.how == JSON_OBJECT:
            yield self._items([_whole(piece.file, counts)], path, "object", counts)
        else:
            for offset, raw in chunks(piece, "line"):
                try:
                    offset, raw = begin_file(raw, offset, path, counts, by_lines=True)
                except BadItem as bad:
                    leave_out(bad, self.skip_bad, counts)
                    continue
                items = self._quick(raw)
                yield self._items(_lines(raw, offset), path, "line", counts) if items is None else items

    def _quick(self, raw: bytes) -> list[tuple[bytes, ...]] | None:
        """What ``_items`` finds, in half the time; None where a line holds something odd."""
        if self.cleaning.nfc or b"\\u0000" in raw:
            return None
        try:
            lines = [line for line in raw.split(b"\n") if line and not line.isspace()]
            first, *others = self.fields
            if others:
                items = [tuple([row[name].encode() for name in self.fields]) for row in map(from_json, lines)]
            else:
                items = [(row[first].encode(),) for row in map(from_json, lines)]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        if self.label and not all(item[0] for item in items):
            return None
        return items if all(raw.count(key) == len(items) for _, key in self._keys) else None

    def _items(self, rows: Rows, path: Path, what: str, counts: Counter) -> list[tuple[bytes, ...]]:
        items = []
        for at, raw in rows:
            try:
                items.append(self._item(raw, path, at, what, counts))
            except BadItem as bad:
                leave_out(bad, self.skip_bad, counts)
        return items

    def _item(self, raw: bytes, path: Path, at: int, what: str, counts: Counter) -> tuple[bytes, ...]:
        try:
            row = from_json(raw)
        except ValueError as error:
            row = self._odd_json(raw, path, at, what, counts, str(error))
        if not isinstance(row, dict):
            raise BadItem("json", f"{path}: the {what} at byte {at} is not a JSON object")
        for name, key in self._keys:
            if raw.count(key) > 1:
                _refuse_twice(raw, name, path, at, what)
        clean = self.cleaning.clean_text
        return tuple([clean(self._value(row, name, path, at, what), path, at, counts) for name in self.fields])

    @cached_property
    def _keys(self) -> list[tuple[str, bytes]]:
        """Each field as it stands in JSON."""
        return [(name, json.dumps(name, ensure_ascii=False).encode()) for name in self.fields]

    def _odd_json(self, raw: bytes, path: Path, at: int, what: str, counts: Counter, error: str) -> Any:
        """What is not UTF-8, or holds half a surrogate pair; there ``cleaning`` decides."""
        try:
            return json.loads(replace(self.cleaning, nfc=False).clean(raw, path, at, counts))
        except (ValueError, RecursionError):
            raise BadItem("json", f"{path}: the {what} at byte {at} is not JSON: {error}") from None

    def _value(self, row: dict[str, Any], name: str, path: Path, at: int, what: str) -> str:
        value = row.get(name)
        is_label = name == self.label
        if isinstance(value, str):
            if is_label and not value:
                raise BadItem("label", f"{path}: field {name!r} of the {what} at byte {at} is empty")
            return value
        if is_label and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if name not in row:
            raise BadItem(
                "field",
                f"{path}: the {what} at byte {at} has no field {name!r}; it has: {_named(row)}; name one with a "
                f"--*-field option, or leave the file out with --exclude{_within(row)}",
            )
        kinds = "neither text nor a whole number" if is_label else "not text"
        raise BadItem("field", f"{path}: field {name!r} of the {what} at byte {at} is {_shown(value)}, {kinds}")


def _named(row: dict[str, Any]) -> str:
    return ", ".join(row) or "nothing"


def _within(row: dict[str, Any]) -> str:
    """Where the records may be that are looked for."""
    name = next((name for name, value in row.items() if isinstance(value, list)), None)
    return f"; if {name!r} holds the records: jq -c '.[{json.dumps(name)}][]' makes JSON lines of them" if name else ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _refuse_twice(raw: bytes, name: str, path: Path, at: int, what: str) -> None:
    pairs = json.loads(raw.decode("utf-8", "replace"), object_pairs_hook=list)
    if sum(key == name for key, _ in pairs) > 1:
        raise BadItem("field", f"{path}: the {what} at byte {at} has field {name!r} twice")


# --- where objects begin and end -------------------------------------------------------------------------------------


def _lines(raw: bytes, offset: int) -> Rows:
    """Lines that are not empty."""
    for line in raw.split(b"\n"):
        if line.strip():
            yield offset, line
        offset += len(line) + 1


def _whole(file: InputFile, counts: Counter) -> tuple[int, bytes]:
    with file.open() as handle:
        raw = file.read(handle, _LONGEST + 1)
    if len(raw) > _LONGEST:
        raise DataError(
            f"{file.path} is one JSON object of more than {_LONGEST >> 20} MiB; make JSON lines of it (jq -c)"
        )
    return begin_file(raw, 0, file.path, counts, by_lines=False)


def _elements(file: InputFile, counts: Counter) -> Rows:
    """The elements of an array, however long it is: each is parsed once to find its end.

    Bytes are read as Latin-1, where places in the text are places in the file; JSON's own signs are ASCII.
    Errors: DataError where it is no JSON: what comes after cannot be told apart.
    """
    scan = json.JSONDecoder(strict=False).raw_decode  # what stands within an element is looked at later
    with file.open() as handle:
        first, raw = begin_file(file.read(handle, _READ_BYTES), 0, file.path, counts, by_lines=False)
        held, start, at_end = raw.decode("latin-1"), first, False
        at = _SPACE.match(held).end() + 1  # type: ignore[union-attr]  # behind the bracket
        expected = "a value or ]"
        while True:
            at = _SPACE.match(held, at).end()  # type: ignore[union-attr]
            sign = held[at : at + 1]
            wrong, place, is_final = f"expected {expected}", at, bool(sign)
            if sign == "]" and expected != "a value":
                break
            if sign == "," and expected == ", or ]":
                at, expected = at + 1, "a value"
                continue
            if sign and expected != ", or ]":
                try:
                    end = scan(held, at)[1]
                    if end < len(held) or at_end:
                        yield start + at, held[at:end].encode("latin-1")
                        at, expected = end, ", or ]"
                        continue
                    is_final = False  # a number may go on
                except json.JSONDecodeError as error:
                    wrong, place = error.msg, error.pos
                    is_final = place < len(held) - _LONGEST_SIGN and not wrong.startswith("Unterminated")
                except RecursionError:
                    wrong = "nested too deep"
            if is_final or at_end or len(held) - at > _LONGEST:
                where = "ends too early" if place >= len(held) or wrong.startswith("Unterminated") else "is broken"
                raise DataError(f"{file.path}: the JSON array {where} at byte {start + place}: {wrong}")
            more = file.read(handle, max(_READ_BYTES, len(held) - at))
            held, start, at, at_end = held[at:] + more.decode("latin-1"), start + at, 0, not more
        rest = held[at + 1 :].encode("latin-1")
        while rest or (rest := file.read(handle, _READ_BYTES)):
            if rest.strip():
                raise DataError(f"{file.path}: more stands behind the JSON array that ends at byte {start + at}")
            rest = b""


def _at_places(rows: Rows, places: Places) -> Rows:
    for at, raw in rows:
        if at // places.step > max(places.numbers):
            return
        if at // places.step in places.numbers:
            yield at, raw


def _batches(rows: Rows) -> Iterator[Rows]:
    batch, size = [], 0
    for at, raw in rows:
        batch.append((at, raw))
        size += len(raw)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
