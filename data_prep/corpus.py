"""Finds the input files: named one by one, or folders searched by patterns; plain or compressed."""

import fnmatch
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from hvdtrain.errors import ConfigError, DataError

COMPRESSIONS = (".gz", ".zst", ".xz")
_ZSTD_BYTES = 1 << 15  # decompressed at a time, into whatever that gives


def globs_of(*suffixes: str) -> list[str]:
    """Patterns for files of these kinds, plain and compressed."""
    return [f"*{suffix}{packed}" for suffix in suffixes for packed in ("", *COMPRESSIONS)]


DEFAULT_GLOBS = tuple(globs_of(".txt", ".jsonl"))


@dataclass(frozen=True)
class InputFile:
    """A file of the corpus; ``name`` is its path relative to the input that led to it, and its place in the order.

    ``split``: where all of it goes, or None where that is decided document by document. ``partner``: the other side's
    file, where two are aligned line by line.
    """

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    split: str | None = None
    partner: "InputFile | None" = None

    @cached_property
    def compression(self) -> str:
        """``.gz``, ``.zst``, ``.xz`` or nothing. Such a file cannot be cut: it is read from its start."""
        return self.path.suffix if self.path.suffix in COMPRESSIONS else ""

    @cached_property
    def suffix(self) -> str:
        """What kind of file it is, without the compression: ``.jsonl`` of ``a.jsonl.gz``."""
        return Path(self.path.stem).suffix if self.compression else self.path.suffix

    def open(self) -> BinaryIO:
        """The file's bytes, decompressed. Errors: DataError naming it."""
        opened = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile, ".zst": _ZstdFile}.get(self.compression, open)
        try:
            return opened(self.path, "rb")  # type: ignore[operator, return-value]
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None

    def read(self, handle: BinaryIO, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end. Errors: DataError where the file is damaged."""
        parts, missing = [], size
        try:
            while missing and (part := handle.read(missing)):
                parts.append(part)
                missing -= len(part)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from None
        except Exception as error:  # zstandard has its own
            if type(error).__name__ != "ZstdError":
                raise
            raise DataError(f"cannot read {self.path}: {error}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_all(self) -> bytes:
        """The whole file, decompressed."""
        with self.open() as handle:
            return b"".join(iter(lambda: self.read(handle, 1 << 24), b""))


class _ZstdFile(io.RawIOBase):
    """A .zst file, decompressed. zstandard's own reader takes one that was cut off for one that has ended."""

    def __init__(self, path: Path, mode: str):
        import zstandard

        self._raw = open(path, mode)  # noqa: SIM115
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = None
        self._held = b""

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
            self._held = self._frame.decompress(compressed)
        part, self._held = self._held[:size], self._held[size:]
        return part

    def close(self) -> None:
        self._raw.close()
        super().close()


def find_files(
    inputs: Sequence[Path], globs: Sequence[str] = DEFAULT_GLOBS, exclude: Sequence[str] = (), split: str | None = None
) -> list[InputFile]:
    """All input files in a fixed order: the inputs as given, each folder's files by name.

    exclude: names of files or folders, anywhere below an input folder, that are left out.
    Errors: DataError where an input does not exist or cannot be read, a folder has no matching file, or all are empty.
    """
    found: list[InputFile] = []
    for path in inputs:
        if path.is_dir():
            names = _matching(path, globs, exclude)
            if not names:
                raise DataError(f"input folder {path} has no file that matches {' or '.join(globs)} (--glob)")
            found += [_input_file(path / name, name, split) for name in names]
        elif path.exists():
            found.append(_input_file(path, path.name, split))
        else:
            raise DataError(f"input {path} does not exist")
    if not any(file.bytes for file in found):
        raise DataError(f"the input is empty: {len(found)} files, 0 bytes")
    return found


def _matching(folder: Path, globs: Sequence[str], exclude: Sequence[str]) -> list[str]:
    names: set[str] = set()
    plain = [glob for glob in globs if glob and "/" not in glob]
    for glob in set(globs) - set(plain):
        try:
            files = [file.relative_to(folder) for file in folder.rglob(glob) if file.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"--glob {glob!r} is not a pattern for names below a folder: {error}") from None
        names.update(file.as_posix() for file in files if not set(file.parts) & set(exclude))
    if plain:
        matches = re.compile("|".join(fnmatch.translate(glob) for glob in plain)).match
        names.update(_walk(str(folder), "", matches, frozenset(exclude)))
    return sorted(names)


def _walk(folder: str, prefix: str, matches: Callable[[str], object], exclude: frozenset[str]) -> Iterator[str]:
    """Files below ``folder``, several times faster than pathlib: a corpus may be a million of them."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in exclude:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", matches, exclude)
                elif matches(entry.name) and entry.is_file():
                    yield prefix + entry.name
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None


def _input_file(path: Path, name: str, split: str | None) -> InputFile:
    try:
        status = path.stat()
        if not os.access(path, os.R_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return InputFile(path, name, status.st_size, status.st_mtime_ns, split)


def files_sha256(files: Sequence[InputFile], with_time: bool = False) -> str:
    """One digest over the files' names, sizes and splits (and times of change), not their contents."""
    digest = hashlib.sha256()
    for file in chain.from_iterable((file, file.partner) if file.partner else (file,) for file in files):
        time = file.mtime_ns if with_time else ""
        digest.update(f"{file.name}\0{file.bytes} {file.split} {time}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
