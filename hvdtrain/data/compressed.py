"""Compressed files as streams: they can be read only from their start.

They take the memory of a window and a block, however much text a few bytes stand for.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# A block of zstd, 128 KiB of text at most, takes 4 bytes at least: so 64 MiB come out of these at once, not gigabytes.
_ZSTD_BYTES = 1 << 11
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` asks for, the format's longest; memory is taken as it is filled


class _ZstdFile(io.RawIOBase):
    """A .zst file, decompressed. zstandard's own reader does not notice that a file was cut off."""

    def __init__(self, path: Path, mode: str):
        import zstandard

        self._raw = open(path, mode)  # noqa: SIM115
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
        self._frame = None
        self._held = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        while not self._held:
            between_frames = self._frame is None or self._frame.eof
            left = self._frame.unused_data if self._frame and between_frames else b""
            compressed = left or self._raw.read(_ZSTD_BYTES)
            if not compressed:
                if between_frames:
                    return b""
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if between_frames:
                self._frame = self._new_frame()
            self._held = memoryview(self._frame.decompress(compressed))
        part, self._held = self._held[:size], self._held[size:]
        return bytes(part)

    def close(self) -> None:
        self._raw.close()
        super().close()


_OPENERS: dict[str, Callable[..., BinaryIO]] = {
    ".gz": gzip.GzipFile,
    ".zst": _ZstdFile,
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}  # type: ignore[dict-item]
COMPRESSIONS = tuple(_OPENERS)


def open_compressed(path: Path, compression: str) -> BinaryIO:
    """The decompressed bytes; several streams in a row are one. Errors: OSError, and of ``read`` those below."""
    return _OPENERS[compression](path, "rb")


def is_damage(error: Exception) -> bool:
    """Is this the error of a compressed file that is damaged or cut off?"""
    # zstandard, whose own error is not known without loading it
    return isinstance(error, OSError | EOFError | lzma.LZMAError | zlib.error) or type(error).__name__ == "ZstdError"
