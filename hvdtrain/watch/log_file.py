"""metrics.jsonl: a JSON object a line. Who only reads one loads nothing of what computes."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvdtrain.errors import OutputError
from hvdtrain.files import again, exists, write_text

STEP_PARTS = ("data", "compute", "sync", "optimizer", "other")  # of a step's time, as ``time_PART_s`` in a line


class LogFile:
    """metrics.jsonl, gone on with after ``start_step``; later lines, of a killed run, go. Errors: OutputError.

    A line that could not be written is written again, from where it began: never twice.
    """

    def __init__(self, path: Path, start_step: int):
        self._path, self._handle = path, None
        try:
            kept = [line for line in read_log(path) if line["step"] <= start_step] if exists(path) else []
        except OSError as error:
            raise OutputError(f"cannot read {path}: {error.strerror or error}") from error
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(path, text)
        self._size = len(text.encode())

    def append(self, line: dict[str, Any]) -> None:
        content = f"{json.dumps(line)}\n".encode()
        try:
            again(lambda: self._append(content), self._path)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error
        self._size += len(content)

    def _append(self, content: bytes) -> None:
        if self._handle is None:
            self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if os.fstat(self._handle).st_size > self._size:  # part of a line that failed
                os.ftruncate(self._handle, self._size)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except OSError:
            self.close()  # a handle that went stale stays so
            raise

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):  # as after each line: what a server loses later, nobody is told
                os.close(handle)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left half-written is dropped."""
    lines = []
    for text in again(lambda: path.read_text(encoding="utf-8", errors="replace"), path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
