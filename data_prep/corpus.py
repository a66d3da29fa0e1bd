"""Finds the input files: named one by one, or folders searched by patterns; plain or compressed."""

import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from data_prep.compressed import COMPRESSIONS, is_damage, open_compressed
from hvdtrain.errors import ConfigError, DataError

_WHOLE_BYTES = 1 << 30  # of a file that is read at once


def globs_of(*suffixes: str) -> list[str]:
    """Patterns for files of these kinds, plain and compressed."""
    return [f"*{suffix}{packed}" for suffix in suffixes for packed in ("", *COMPRESSIONS)]


DEFAULT_GLOBS = tuple(globs_of(".txt", ".jsonl"))


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
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def is_stream(self) -> bool:
        """Can it be read only from its start?"""
        return self.from_start or bool(self.compression)

    @cached_property
    def suffix(self) -> str:
        """What kind of file it is, in small letters and without the compression: ``.jsonl`` of ``a.JSONL.gz``."""
        return (Path(self.path.stem) if self.compression else self.path).suffix.lower()

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

    def read_all(self) -> bytes:
        """The whole file, decompressed. Errors: DataError where that is more than memory should hold at once."""
        with self.open() as handle:
            content = self.read(handle, _WHOLE_BYTES + 1)
        if len(content) > _WHOLE_BYTES:
            raise DataError(f"{self.path} holds more than {_WHOLE_BYTES >> 20} MiB, and such a file is read at once")
        return content


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
