"""Lines of text out of a file, plain or compressed, to be answered or compared."""

import codecs
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.data.compressed import COMPRESSIONS, is_damage, open_compressed
from hvdtrain.errors import DataError
from hvdtrain.files import again

_REPLACEMENT = "\ufffd"
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
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
        if raw.startswith(_WIDE):
            raise DataError(f"{path} is UTF-16 or UTF-32 text; convert it: iconv -t UTF-8")
        if raw.startswith(codecs.BOM_UTF8):
            raw = raw[len(codecs.BOM_UTF8) :]
            self.counts["byte order marks"] += 1
        if b"\n" not in raw and b"\r" in raw.strip(b"\r"):
            raise DataError(f"{path} ends its lines with \\r alone, not with \\n; convert it: tr '\\r' '\\n'")
        lines = raw.split(b"\n")
        if not lines[-1]:
            lines.pop()  # what a file ends with ends its last line
        texts = [self._decoded(line.removesuffix(b"\r"), path, number) for number, line in enumerate(lines, start=1)]
        if (path.with_suffix("") if compression else path).suffix.lower() not in _JSON:
            return texts
        return [_field(text, name, take, what, path, number) for number, text in enumerate(texts, start=1)]

    def _decoded(self, line: bytes, path: Path, number: int) -> str:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.invalid == "refuse":
                raise DataError(
                    f"{path}: line {number} is not UTF-8: its byte {error.start} is 0x{line[error.start]:02x}; convert "
                    "it (iconv -t UTF-8), or replace what is wrong (--invalid-utf8 replace)"
                ) from None
            text = line.decode("utf-8", "replace")
            self.counts["replaced characters"] += text.count(_REPLACEMENT) - line.count(_REPLACEMENT.encode())
        if "\0" in text:
            if self.invalid == "refuse":
                raise DataError(f"{path}: line {number} holds a zero byte; replace it with --invalid-utf8 replace")
            self.counts["replaced characters"] += text.count("\0")
            text = text.replace("\0", _REPLACEMENT)
        return text


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
