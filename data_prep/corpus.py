"""The files of the corpus: opened and read, plain or compressed, and recognised at a later start."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from hvdtrain.data.compressed import COMPRESSIONS, is_damage, open_compressed
from hvdtrain.errors import DataError

_WHOLE_BYTES = 1 << 30  # of a file that is read at once


@dataclass(frozen=True)
class InputFile:
    """A file of the corpus; ``name`` is its path relative to the input that led to it, and its place in the order.

    ``split``: where all of it goes, or None where that is decided document by document. ``partner``: the other side's
    file, where two are aligned line by line. ``how`` it is read (formats.py), and whether, as a compressed one, only
    ``from_start``.
    """

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    split: str | None = None
    partner: "InputFile | None" = None
    how: str = ""
    from_start: bool = False

    @cached_property
    def compression(self) -> str:
        """``.gz``, ``.zst``, ``.xz``, ``.bz2`` or nothing. Such a file cannot be cut: it is read from its start."""
        ending = ending_of(self.name)
        return ending if ending in COMPRESSIONS else ""

    @property
    def is_stream(self) -> bool:
        """Can it be read only from its start?"""
        return self.from_start or bool(self.compression)

    @cached_property
    def suffix(self) -> str:
        """What kind of file it is, in small letters and without the compression: ``.jsonl`` of ``a.JSONL.gz``."""
        return ending_of(self.name[: len(self.name) - len(self.compression)])

    def read_as(self, how: str, from_start: bool) -> "InputFile":
        """The same file, with how it is read. ``dataclasses.replace`` would take several times as long, and a corpus
        may be a million files.
        """
        file = object.__new__(InputFile)
        file.__dict__.update(self.__dict__, how=how, from_start=from_start)
        return file

    def open(self) -> BinaryIO:
        """The file's bytes, decompressed. Errors: DataError naming it."""
        try:
            return open_compressed(self.path, self.compression) if self.compression else open(self.path, "rb")
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None

    def read(self, handle: BinaryIO, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end. Errors: DataError where the file is damaged."""
        parts, missing = [], size
        try:
            while missing and (part := handle.read(missing)):
                parts.append(part)
                missing -= len(part)
        except Exception as error:
            if not is_damage(error):
                raise
            raise DataError(f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def first_bytes(self, size: int) -> bytes:
        """The first ``size`` bytes of a plain file, fewer only where it has no more, by the system's own three calls:
        Python's file objects make seven, and a corpus may be a million files. Errors: DataError naming it.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                content = os.read(handle, size)
                while len(content) < size and (more := os.read(handle, size - len(content))):
                    content += more
            finally:
                os.close(handle)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None
        return content

    def read_all(self) -> bytes:
        """The whole file, decompressed. Errors: DataError where that is more than memory should hold at once."""
        with self.open() as handle:
            content = self.read(handle, _WHOLE_BYTES + 1)
        if len(content) > _WHOLE_BYTES:
            raise DataError(f"{self.path} holds more than {_WHOLE_BYTES >> 20} MiB, and such a file is read at once")
        return content


def ending_of(name: str) -> str:
    """``.gz`` of ``folder/a.JSONL.GZ``; nothing of ``.gz`` and ``a.``. Like pathlib's, but several times faster."""
    name = name.rpartition("/")[2]
    at = name.rfind(".")
    return name[at:].lower() if 0 < at < len(name) - 1 else ""


def files_sha256(files: Sequence[InputFile], with_time: bool = False) -> str:
    """One digest over the files' names, sizes and splits (and times of change), not their contents."""
    digest = hashlib.sha256()
    for file in chain.from_iterable((file, file.partner) if file.partner else (file,) for file in files):
        time = file.mtime_ns if with_time else ""
        digest.update(f"{file.name}\0{file.bytes} {file.split} {time}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
