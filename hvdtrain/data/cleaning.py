"""Check that text is UTF-8 before it is tokenised, and normalise it where that is asked for.

For corpora of any size (data_prep) and for lines to be answered (lines.py).
"""

import codecs
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import DataError

_REPLACEMENT = "\ufffd"
_AT_ONCE = 1 << 17  # bytes
_LOOK_AT = 1 << 12  # bytes that tell UTF-16 without a byte order mark
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class BadItem(DataError):
    """One item (a document, a line, a row, a question) that cannot be used. The message says file, place and reason.

    kind: of ``data_prep.bad.KINDS``. at: the first byte of the item that is wrong, where one is.
    """

    def __init__(self, kind: str, message: str, at: int = 0):
        super().__init__(message)
        self.kind, self.at = kind, at


@dataclass(frozen=True)
class Cleaning:
    """``invalid``: refuse text that is not UTF-8 or holds a zero byte, or replace what is wrong by U+FFFD, which is
    counted.

    ``nfc``: compose characters (Unicode Normalization Form C). Otherwise every byte is kept.
    """

    invalid: str = "refuse"
    nfc: bool = False

    def clean(self, raw: bytes, path: Path, offset: int, counts: Counter) -> bytes:
        """``raw`` as UTF-8. path, offset: where it comes from, for the message.

        Errors: BadItem naming file and byte where it is not UTF-8, or holds a zero byte, which text does not. UTF-16
        is not replaced either: nothing would be left of it.
        """
        zero = raw.find(b"\0")
        if zero >= 0:
            if wide := _wide_without_mark(raw):
                raise _wide_item(path, wide)
            if self.invalid == "refuse":
                raise BadItem(
                    "zero",
                    f"{path} is a binary file: zero byte at byte {offset + zero}; leave it out with --glob or "
                    "--exclude, or replace such bytes (--invalid-utf8 replace)",
                )
        if zero < 0 and (raw.isascii() or (_is_utf8(raw) and not self.nfc)):
            return raw
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.invalid == "refuse":
                raise BadItem(
                    "utf8",
                    f"{path} is not UTF-8 text: byte {offset + error.start} is 0x{raw[error.start]:02x}; convert it "
                    "(iconv -t UTF-8), replace what is wrong (--invalid-utf8 replace), or leave it out with --glob or "
                    "--exclude",
                    error.start,
                ) from None
            text = raw.decode("utf-8", "replace")
            counts["replaced_characters"] += text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())
        if zero >= 0:
            counts["replaced_characters"] += text.count("\0")
            text = text.replace("\0", _REPLACEMENT)
        return (unicodedata.normalize("NFC", text) if self.nfc else text).encode()

    def clean_text(self, text: str, path: Path, offset: int, counts: Counter) -> bytes:
        """The same for text out of JSON, which may hold half a surrogate pair and zero characters."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            if self.invalid == "refuse":
                raise BadItem(
                    "surrogate",
                    f"{path}: the JSON object at byte {offset} holds half a surrogate pair, which is no character; "
                    "replace it with --invalid-utf8 replace",
                ) from None
            counts["replaced_characters"] += sum(0xD800 <= ord(c) < 0xE000 for c in error.object)
            text = "".join(_REPLACEMENT if 0xD800 <= ord(c) < 0xE000 else c for c in text)
            raw = text.encode()
        if b"\0" in raw:
            if self.invalid == "refuse":
                raise BadItem(
                    "zero",
                    f"{path}: the JSON object at byte {offset} holds a zero character; replace it with "
                    "--invalid-utf8 replace",
                )
            counts["replaced_characters"] += raw.count(b"\0")
            text = text.replace("\0", _REPLACEMENT)
            raw = text.encode()
        return unicodedata.normalize("NFC", text).encode() if self.nfc and not raw.isascii() else raw


EXACT = Cleaning()


def begin_file(raw: bytes, offset: int, path: Path, counts: Counter, by_lines: bool) -> tuple[int, bytes]:
    """(offset, bytes) without a byte order mark, which is counted, if these are the first bytes of a file.

    by_lines: the file is read by lines. Only \\n ends a line: where \\r does in its place, all would be one line.
    Errors: BadItem for UTF-16 and UTF-32; DataError for line ends of \\r alone.
    """
    if offset:
        return offset, raw
    refuse_wide(raw, path)
    if by_lines and b"\n" not in raw and b"\r" in raw.strip(b"\r"):  # the first bytes reach to a line end, if any
        raise DataError(f"{path} ends its lines with \\r alone, not with \\n; convert it: tr '\\r' '\\n'")
    if raw.startswith(codecs.BOM_UTF8):
        counts["byte_order_marks"] += 1
        return len(codecs.BOM_UTF8), raw[len(codecs.BOM_UTF8) :]
    return offset, raw


def refuse_wide(raw: bytes, path: Path) -> None:
    """Errors: BadItem where a file that begins so is UTF-16 or UTF-32."""
    wide = next((name for mark, name in _WIDE_MARKS.items() if raw.startswith(mark)), "")
    if wide := wide or _wide_without_mark(raw):
        raise _wide_item(path, wide)


def _wide_without_mark(raw: bytes) -> str:
    """UTF-16 of mostly Latin letters has zeros for every second byte, and hardly any between."""
    head = raw[:_LOOK_AT]
    if b"\0" not in head:
        return ""
    even, odd = (head[start::2].count(0) for start in (0, 1))
    most, least = max(even, odd), min(even, odd)
    return ("UTF-16BE", "UTF-16LE")[odd > even] if most > 1 and 4 * most >= len(head) and 16 * least <= most else ""


def _wide_item(path: Path, name: str) -> BadItem:
    return BadItem("utf16", f"{path} is {name} text; convert it: iconv -f {name} -t UTF-8")


def _is_utf8(raw: bytes) -> bool:
    """Small parts are decoded in turn: they stay in the processor's cache, which is faster than all at once."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(raw)
    try:
        for start in range(0, len(raw), _AT_ONCE):
            decoder.decode(view[start : start + _AT_ONCE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
