"""Finds and reads the input: files named one by one, or folders searched by a pattern. One document a file."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class InputFile:
    """A file of the corpus; ``name`` is its path relative to the input that led to it, and its place in the order."""

    path: Path
    name: str
    bytes: int


def find_files(inputs: Sequence[Path], glob: str, exclude: Sequence[str]) -> list[InputFile]:
    """All input files in a fixed order: the inputs as given, each folder's files by name.

    exclude: names of files or folders, anywhere below an input folder, that are left out.
    Errors: DataError where an input does not exist, a folder has no matching file, or all are empty.
    """
    found: list[InputFile] = []
    for path in inputs:
        if path.is_dir():
            try:
                matching = list(path.rglob(glob))
            except (ValueError, NotImplementedError) as error:
                raise ConfigError(f"--glob {glob!r} is not a pattern for names below a folder: {error}") from None
            names = sorted(
                file.relative_to(path).as_posix()
                for file in matching
                if file.is_file() and not set(file.relative_to(path).parts) & set(exclude)
            )
            if not names:
                raise DataError(f"input folder {path} has no file that matches {glob!r} (--glob)")
            found += [InputFile(path / name, name, (path / name).stat().st_size) for name in names]
        elif path.exists():
            found.append(InputFile(path, path.name, path.stat().st_size))
        else:
            raise DataError(f"input {path} does not exist")
    if not any(file.bytes for file in found):
        raise DataError(f"the input is empty: {len(found)} files, 0 bytes")
    return found


def read_text(path: Path) -> bytes:
    """The file's text as UTF-8, checked; every byte is kept, line ends too.

    Errors: DataError naming file and byte where it is not UTF-8 or holds a zero byte, which text does not.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if (zero := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} is a binary file: zero byte at byte {zero}; leave it out with --glob or --exclude")
    try:
        raw.decode("utf-8")
        return raw
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}; "
            "convert it (iconv -t UTF-8), or leave it out with --glob or --exclude"
        ) from None


def documents(files: Sequence[InputFile]) -> Iterator[str]:
    """The text of each file in turn; empty files are passed over."""
    for file in files:
        if text := read_text(file.path):
            yield text.decode()


def corpus_sha256(files: Sequence[InputFile]) -> str:
    """One digest over names and contents, to know a corpus again."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with open(file.path, "rb") as handle:
                content = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {file.path}: {error.strerror}") from None
        digest.update(f"{file.name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
