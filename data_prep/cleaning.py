"""What is done to text before it is tokenised: is it UTF-8, and shall it be normalised?"""

import codecs
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import DataError

_REPLACEMENT = "\ufffd"
_AT_ONCE = 1 << 17  # bytes


@dataclass(frozen=True)
class Cleaning:
    """``invalid``: refuse text that is not UTF-8, or replace what is not by U+FFFD, which is counted.

    ``nfc``: compose characters (Unicode Normalization Form C). Otherwise every byte is kept.
    """

    invalid: str = "refuse"
    nfc: bool = False

    def clean(self, raw: bytes, path: Path, offset: int, counts: Counter) -> bytes:
        """``raw`` as UTF-8. path, offset: where it comes from, for the message.

        Errors: DataError naming file and byte where it is not UTF-8, or holds a zero byte, which text does not.
        """
        if (zero := raw.find(b"\0")) >= 0:
            raise DataError(
                f"{path} is a binary file: zero byte at byte {offset + zero}; leave it out with --glob or --exclude"
            )
        if raw.isascii() or (_is_utf8(raw) and not self.nfc):
            return raw
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.invalid == "refuse":
                raise DataError(
                    f"{path} is not UTF-8 text: byte {offset + error.start} is 0x{raw[error.start]:02x}; convert it "
                    "(iconv -t UTF-8), replace what is wrong (--invalid-utf8 replace), or leave it out with --glob or "
                    "--exclude"
                ) from None
            text = raw.decode("utf-8", "replace")
            counts["replaced_characters"] += text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())
            raw = text.encode()
        return unicodedata.normalize("NFC", text).encode() if self.nfc else raw

    def clean_text(self, text: str, path: Path, offset: int, counts: Counter) -> bytes:
        """The same for text out of JSON, which may hold half a surrogate pair and zero characters."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            if self.invalid == "refuse":
                raise DataError(
                    f"{path}: the JSON line at byte {offset} holds half a surrogate pair, which is no character; "
                    "replace it with --invalid-utf8 replace"
                ) from None
            counts["replaced_characters"] += sum(0xD800 <= ord(c) < 0xE000 for c in error.object)
            text = "".join(_REPLACEMENT if 0xD800 <= ord(c) < 0xE000 else c for c in text)
            raw = text.encode()
        return unicodedata.normalize("NFC", text).encode() if self.nfc and not raw.isascii() else raw


EXACT = Cleaning()


def _is_utf8(raw: bytes) -> bool:
    """Decoded bit by bit and thrown away: what stays in the cache is decoded faster than all at once."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(raw)
    try:
        for start in range(0, len(raw), _AT_ONCE):
            decoder.decode(view[start : start + _AT_ONCE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
