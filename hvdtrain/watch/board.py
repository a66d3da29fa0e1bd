"""The run on TensorBoard."""

import os
import socket
import time
from pathlib import Path
from typing import Any


class Board:
    """A TensorBoard event file. Made at the first line, so that its imports do not delay the first step.

    Written here and now: TensorBoard's own writer fails on a thread, which prints a traceback. Errors: OSError.
    """

    def __init__(self, folder: Path, start_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._put(Event(wall_time=now, file_version="brain.Event:2"))
        # Tells TensorBoard to forget what an earlier, killed run wrote beyond the step that this one resumes from.
        self._put(Event(wall_time=now, step=start_step + 1, session_log=SessionLog(status=1)))

    def add(self, line: dict[str, Any]) -> None:
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        values = [
            self._summary.Value(tag=f"{line['kind']}/{key}", simple_value=value) for key, value in numbers.items()
        ]
        self._put(self._event(wall_time=time.time(), step=line["step"], summary=self._summary(value=values)))

    def _put(self, event: Any) -> None:
        try:
            self._records.write(event.SerializeToString())
        except OSError:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()
