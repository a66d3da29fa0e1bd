"""Lines of text out of a file, plain or compressed, to be answered or compared."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.data.cleaning import BadItem, Cleaning, begin_file
from hvdtrain.data.compressed import COMPRESSIONS, is_damage, open_compressed
from hvdtrain.errors import DataError
from hvdtrain.files import again

_JSON = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class LineReader:
    """invalid: ``refuse`` or ``replace`` (by U+FFFD, counted) what is not UTF-8, and zero bytes.

    counts: what was mended, over all files.
    """

    invalid: str = "refuse"
    counts: Counter[str] = field(default_factory=Counter)

    def texts(self, path: Path, name: str) -> list[str]:
        """The lines; of JSON lines (.jsonl, .ndjson) the text under ``name``.

        Errors: DataError naming file and line.
        """

        def text_of(value: Any) -> str | None:
            return value if isinstance(value, str) else None

        return self._lines(path, name, text_of, "a text")

    def references(self, path: Path, name: str) -> list[list[str]]:
        """For each line a list with it alone; of JSON lines the text or the list of texts under ``name``."""

        def list_of(value: Any) -> list[str] | None:
            values = [value] if isinstance(value, str) else value
            is_list = isinstance(values, list) and values and all(isinstance(one, str) for one in values)
            return values if is_list else None

        lines = self._lines(path, name, list_of, "a text or a list of texts")
        return [[line] if isinstance(line, str) else line for line in lines]

    def _lines(self, path: Path, name: str, take: Callable[[Any], Any], what: str) -> list[Any]:
        compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
        raw = _read(path, compression)
        try:
            _, raw = begin_file(raw, 0, path, self.counts, by_lines=True)
        except BadItem as wide:
            raise DataError(str(wide)) from None
        lines = raw.split(b"\n")
        if not lines[-1]:
            lines.pop()  # what a file ends with ends its last line
        texts = [self._decoded(line.removesuffix(b"\r"), path, number) for number, line in enumerate(lines, start=1)]
        if (path.with_suffix("") if compression else path).suffix.lower() not in _JSON:
            return texts
        return [_field(text, name, take, what, path, number) for number, text in enumerate(texts, start=1)]

    def _decoded(self, line: bytes, path: Path, number: int) -> str:
        try:
            return Cleaning(self.invalid).clean(line, path, 0, self.counts).decode()
        except BadItem as bad:
            if bad.kind != "utf8":
                raise DataError(
                    f"{path}: line {number} holds a zero byte; replace it with --invalid-utf8 replace"
                ) from None
            raise DataError(
                f"{path}: line {number} is not UTF-8: its byte {bad.at} is 0x{line[bad.at]:02x}; convert it "
                "(iconv -t UTF-8), or replace what is wrong (--invalid-utf8 replace)"
            ) from None


def _read(path: Path, compression: str) -> bytes:
    def read() -> bytes:
        with open_compressed(path, compression) if compression else open(path, "rb") as file:
            parts = []
            while part := file.read(1 << 20):
                parts.append(part)
            return b"".join(parts)

    try:
        return again(read, path)
    except Exception as error:
        if not is_damage(error):
            raise
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _field(text: str, name: str, take: Callable[[Any], Any], what: str, path: Path, number: int) -> Any:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number} is no JSON: {error}") from None
    value = take(fields.get(name)) if isinstance(fields, dict) else None
    if value is None:
        there = f"; there: {', '.join(fields)}" if isinstance(fields, dict) else ""
        raise DataError(f"{path}: line {number} has no field {name!r} with {what}{there}")
    if any(0xD800 <= ord(char) < 0xE000 for char in "".join(value)):
        raise DataError(f"{path}: line {number} holds half a surrogate pair, which is no character")
    return value
