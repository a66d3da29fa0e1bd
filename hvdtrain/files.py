"""Use files on file systems that fail for a moment, as NFS and Lustre do. Each use of a file is one of four:

    input                   ``again``, ``read_text``; where it fails for good, the caller's own typed error
    write that matters      ``write``, ``again``: then OutputError, exit 74
    optional look           ``optional``, ``seen``: no error ever
    write not worth a run   ``optional``

``again`` tries five times within 7 seconds. What had to be tried again, or failed and was not needed, is counted, and
said once.
"""

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from hvdtrain.errors import DataError, HvdtrainError, OutputError, say

T = TypeVar("T")

BLOCK_BYTES = 1 << 24  # of a shard: damage is named block by block
PAUSES_S = (0.1, 0.4, 1.5, 5.0)
# What a server that restarts, a lost lock or an expired ticket gives; ESHUTDOWN is Lustre's for an evicted client.
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EINTR", "EAGAIN", "EBUSY", "ETIMEDOUT", "EACCES", "ENOLCK", "EREMOTEIO"),
        *("ESHUTDOWN", "ENOTCONN", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH"),
    )
)
_ABSENT = (FileNotFoundError, NotADirectoryError)

_troubles: Counter[str] = Counter()  # of this process, which has one view of its file systems


def troubles() -> dict[str, int]:
    """What had to be tried again so far, or failed and was not needed; and how often."""
    return dict(_troubles)


def again(work: Callable[[], T], what: Path | str, also: Collection[int] = ()) -> T:
    """``work()``, tried again where it fails by an error that may pass. It must be safe to do twice.

    also: more such error numbers, like ENOENT for a file that another node has just written.
    Errors: OSError, the last one, after 7 s; any other at once.
    """
    for pause_s in PAUSES_S:
        try:
            return work()
        except OSError as error:
            if error.errno not in PASSING and error.errno not in also:
                raise
            note(f"{what}: {error.strerror}; tried again")
        sleep(pause_s)
    return work()


def optional(work: Callable[[], T], what: str, otherwise: T) -> T:
    """``work()``, or ``otherwise`` where the file system fails: the run goes on without it.

    Where a run does it often, ``work`` must not use ``again``, which may wait for seconds.
    what: the message's beginning, like "cannot look for X".
    """
    try:
        return work()
    except (OSError, HvdtrainError) as error:
        reason = getattr(error, "strerror", None) or error
        note(f"{what}: {reason}; went on without")
        return otherwise


def note(trouble: str) -> None:
    """Count a trouble, and say it the first time."""
    _troubles[trouble] += 1
    if _troubles[trouble] == 1:
        say(f"note: {trouble}")


# --- looking -----------------------------------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Is there such a file? Tried again. Errors: OutputError (exit 74) where that cannot be told."""
    try:
        return again(lambda: is_there(path), path)
    except OSError as error:
        raise OutputError(f"cannot look at {path}: {error.strerror}") from error


def seen(path: Path) -> bool:
    """Is there such a file? An optional look: False also where that cannot be told."""
    return optional(lambda: is_there(path), f"cannot look for {path}", False)


def is_there(path: Path) -> bool:
    """Is there such a file? Errors: OSError where that cannot be told, which ``Path.exists`` may take for no."""
    try:
        path.stat()
    except _ABSENT:
        return False
    return True


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds under names that match ``pattern``, sorted; nothing where there is no such folder.

    Tried again. Errors: OSError where it cannot be read, which ``Path.glob`` may take for empty.
    """
    try:
        names = again(lambda: os.listdir(folder), folder)
    except _ABSENT:
        return []
    return [folder / name for name in sorted(names) if fnmatchcase(name, pattern)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Errors: DataError naming it."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value


def read_text(path: Path) -> str:
    """UTF-8. Errors: OSError, UnicodeDecodeError."""
    return again(lambda: path.read_text(encoding="utf-8"), path)


# --- digests -----------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal. Tried again. Errors: OSError."""

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return again(digest, path)


def file_blocks(path: Path) -> tuple[str, ...]:
    """SHA-256 of each BLOCK_BYTES of the file, in order."""
    with open(path, "rb") as file:
        return tuple(hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK_BYTES), b""))


def read_block(path: Path, number: int) -> bytes:
    """The bytes of one block; fewer only at the file's end. Errors: OSError."""

    def read() -> bytes:
        with open(path, "rb") as file:  # buffered: a read gives less than is asked for only at the end
            file.seek(number * BLOCK_BYTES)
            return file.read(BLOCK_BYTES)

    return again(read, path)


def fields_sha256(fields: Mapping[str, Any]) -> str:
    """Digest of a manifest's fields, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# --- writing -----------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """``write`` of JSON. Errors: OutputError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """``write`` of UTF-8. Errors: OutputError."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """``write`` of what they are. Errors: OutputError."""
    write(path, lambda temporary: temporary.write_bytes(data))


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file that is whole or not there: ``fill`` writes it under a name beside ``path``, then it is renamed.

    Each try calls ``fill`` anew. What an fsync could not write is lost, and a second fsync would report success.
    Errors: OutputError (exit 74) with the path and the system's reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def attempt() -> None:
        temporary.unlink(missing_ok=True)
        fill(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)

    try:
        again(attempt, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # such as a parent that is no folder; the error on its way says so
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are not there. Errors: OSError."""
    again(lambda: path.mkdir(parents=True, exist_ok=True), path)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder to a name that nothing has, and flush that to disk. Errors: OSError."""

    def move() -> None:
        if is_there(source) or not is_there(target):  # else the try before has moved it, and failed all the same
            os.replace(source, target)
        sync_folder(target.parent)

    again(move, source)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut, where its file system can do that. Errors: OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        note(f"{folder}: folders cannot be flushed to disk there ({error.strerror}); went on without")
    finally:
        os.close(handle)
