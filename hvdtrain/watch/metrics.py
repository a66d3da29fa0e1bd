"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar or plain lines, summary.json.

Rank 0 writes. Numbers that live on the device are read only at the steps that are logged.
"""

import json
import math
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import field_validator

from hvdtrain.errors import DivergedError, OutputError, give_up_output
from hvdtrain.files import again, exists, note, optional, write_json, write_text
from hvdtrain.optim.guard import Guard
from hvdtrain.optim.noise_scale import NoiseScale
from hvdtrain.options import Options, option
from hvdtrain.sync.allreduce import StepSums
from hvdtrain.watch.bar import Bar, is_for_people
from hvdtrain.watch.meter import Laps, StepTimes, memory_peak_mib
from hvdtrain.watch.profiler import parse_steps

T = TypeVar("T")

# Of a sum over thousands of targets; fairseq gives up at 1e-4, of a mean (--min-loss-scale).
_LEAST_LOSS_SCALE = 2.0**-24


class MetricsOptions(Options):
    every: int = option(10, "steps between logged lines", ge=1)
    tensorboard: bool = option(True, "write RUN_DIR/tensorboard")
    mfu: Literal["auto", "measure", "off"] = option(
        "auto",
        "share of the device's peak; auto: of a GPU's data sheet, of a CPU's measured at the end of a run of over a "
        "minute; measure: of a CPU's measured at the start (0.3 s), so that it is in every line",
    )
    profile: str = option("", "steps to write a trace of to RUN_DIR/profile, like 10-12 (both included); empty: none")

    @field_validator("profile")
    @classmethod
    def _steps_can_be_read(cls, spec: str) -> str:
        parse_steps(spec)
        return spec


class Metrics:
    """Collects a run's numbers. All ranks make one and call ``add``; only rank 0 (``is_main``) writes.

    ``tokens``: non-padding target tokens since step 0, of all ranks. Times, FLOPs and memory are this rank's.
    ``peak``: FLOP/s that this rank's device could reach (see peaks.py), None: not known; may be set at any time.
    """

    def __init__(
        self,
        run_dir: Path,
        options: MetricsOptions,
        steps: int,
        is_main: bool,
        start_step: int,
        tokens: int,
        device: torch.device | None = None,
        peak: float | None = None,
    ):
        self._options, self._steps, self._is_main, self._run_dir = options, steps, is_main, run_dir
        self._device, self.peak = device or torch.device("cpu"), peak
        self.tokens: Any = tokens
        self.noise = NoiseScale(self._device)
        self._started = time.perf_counter()
        self._unread: deque[StepTimes | Laps] = deque()
        self._since = StepTimes()
        self.spent = StepTimes()  # of all steps of this process that could be read
        self._start_step, self._steps_since, self._tokens_at_log = start_step, 0, tokens
        self._flops_since = 0
        # Of all intervals but the first, which holds the start-up.
        self._rate_tokens, self._rate_flops, self._rate_s = 0, 0, 0.0
        self._intervals = 0
        self._log_file: _LogFile | None = None
        self._board: _Board | None = None
        self._board_start = start_step
        self._bar: Bar | None = None
        self.last_loss = math.nan
        self.skipped = 0  # steps, by a guard
        if is_main:
            self._log_file = _LogFile(run_dir / "metrics.jsonl", start_step)
            if is_for_people():
                self._bar = Bar(steps, start_step)

    @property
    def tokens_per_s(self) -> float:
        """Rate over this process's training, without its first logged interval, evaluation and saving."""
        return self._rate_tokens / self._rate_s if self._rate_s else 0.0

    @property
    def flops_per_s(self) -> float:
        """Model FLOPs of this rank, at the rate and over the intervals of ``tokens_per_s``."""
        return self._rate_flops / self._rate_s if self._rate_s else 0.0

    @property
    def mfu(self) -> float | None:
        """``flops_per_s`` as a share of ``peak``; None where either is not known."""
        return self.flops_per_s / self.peak if self.peak and self.flops_per_s else None

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._started

    def add(
        self,
        step: int,
        epoch: int,
        sums: StepSums,
        lr: float,
        times: StepTimes | Laps,
        flops: int | float = 0,
        guard: Guard | None = None,
    ) -> None:
        """Note one finished step; every ``metrics.every`` steps read it, check it and write it.

        flops: this rank's model FLOPs of the step (see models/flops.py); 0: not counted.
        Errors: DivergedError, on all ranks alike, where the loss or the gradient is not finite; with a guard where it
        says so.
        """
        self.tokens = self.tokens + sums.weight
        if sums.part_square is not None:
            self.noise.update(sums.part_square, sums.part_inverse, sums.grad_norm**2, sums.weight)
        self._flops_since += flops
        self._unread.append(times)
        self._read_times(only_ready=True)  # so that few wait, however seldom a line is written
        self._steps_since += 1
        if self._bar is not None:
            self._bar.step(sums.loss)
        if step % self._options.every == 0 or step in (self._start_step + 1, self._steps):
            self._log(step, epoch, sums, lr, guard)

    def _read_times(self, only_ready: bool) -> None:
        while self._unread and (not only_ready or self._unread[0].is_ready()):
            times = self._unread.popleft().read()
            self._since.add(times)
            self.spent.add(times)

    def _log(self, step: int, epoch: int, sums: StepSums, lr: float, guard: Guard | None) -> None:
        loss, grad_norm = sums.loss.item(), sums.grad_norm.item()
        loss_scale = None if sums.loss_scale is None else sums.loss_scale.item()
        self.tokens = int(self.tokens)
        # A scaled loss may overflow now and then: the step is left out and the scale lowered. Not for ever.
        overflowed = loss_scale is not None and loss_scale >= _LEAST_LOSS_SCALE and not math.isfinite(grad_norm)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if guard is not None:
            self.skipped, factor = guard.check(step)
            lr *= factor
        elif not (finite or (math.isfinite(loss) and overflowed)):
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; lower optim.lr or lengthen "
                "schedule.warmup_steps; the last checkpoint is from before"
            )
        if math.isfinite(loss):
            self.last_loss = loss
        self._read_times(only_ready=False)  # the device has come past them: it has just told the loss
        tokens, seconds, steps = self.tokens - self._tokens_at_log, self._since.total, self._steps_since
        rate = tokens / seconds if seconds else 0.0
        if self._intervals > 0:
            self._rate_tokens += tokens
            self._rate_flops += self._flops_since
            self._rate_s += seconds
        line = {
            "kind": "train",
            "step": step,
            "epoch": epoch,
            "tokens": self.tokens,
            "loss": loss if math.isfinite(loss) else None,  # JSON knows no infinity
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens_per_s": round(rate, 1),
            "time_data_s": round(self._since.data / steps, 6),
            "time_compute_s": round(self._since.compute / steps, 6),
            "time_sync_s": round(self._since.sync / steps, 6),
            "time_optimizer_s": round(self._since.optimizer / steps, 6),
            "time_other_s": round(self._since.other / steps, 6),
            "memory_peak_mib": round(memory_peak_mib(self._device), 1),
            "wall_s": round(self.wall_s, 3),
        }
        if loss_scale is not None:
            line["loss_scale"] = loss_scale
        if guard is not None:
            line["skipped_steps"] = self.skipped
        if (noise := self.noise.value()) is not None:
            line["noise_scale_tokens"] = round(noise, 1)
        grad = "overflow" if overflowed else f"{grad_norm:.2f}"
        if guard is not None and self.skipped:
            grad += f"  skipped {self.skipped}"
        text, speed = f"loss {loss:.4f}  lr {lr:.2e}  grad {grad}  ", f"{rate:,.0f} tokens/s"
        if self._flops_since and seconds:
            flops_per_s = self._flops_since / seconds
            line["model_tflops_per_s"] = round(flops_per_s / 1e12, 6)
            if self.peak:
                line["mfu"] = round(flops_per_s / self.peak, 4)
                speed += f"  {flops_per_s / self.peak:.0%} MFU"
        self._intervals += 1
        self._tokens_at_log, self._steps_since, self._since, self._flops_since = self.tokens, 0, StepTimes(), 0
        self._write(line, text + speed)
        if self._bar is not None:
            self._bar.log(loss, speed)

    def evaluating(self, batches: Iterable[T], count: int) -> Iterable[T]:
        """``batches`` of an evaluation, about ``count``; the bar moves with them."""
        return batches if self._bar is None else self._bar.evaluating(batches, count)

    def doing(self, what: str) -> None:
        """What the bar shows until the next step, like "saving"."""
        if self._bar is not None:
            self._bar.doing(what)

    def add_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Note the scores of the validation split. Errors: DivergedError, on all ranks alike."""
        if not all(math.isfinite(score) for score in scores.values()):
            raise DivergedError(
                f"step {step}: evaluation gave {scores}; lower optim.lr; the last checkpoint is from before"
            )
        words = (f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in scores.items())
        self._write({"kind": "eval", "step": step, **scores}, "  ".join(words))
        if self._bar is not None:
            self._bar.validated(scores["val_loss"])

    def say(self, message: str) -> None:
        """Print one line for the user, from rank 0."""
        if self._bar is not None:
            self._bar.say(message)
        elif self._is_main:
            try:
                sys.stdout.write(f"{message}\n")  # in one write, or launchers cut it where they add the rank
                sys.stdout.flush()
            except BrokenPipeError:  # `train | head` ends the run
                raise
            except OSError as error:
                give_up_output()
                note(f"cannot write to standard output: {error.strerror}; nothing more is printed there")

    def say_all(self, messages: Iterable[str]) -> None:
        for message in messages:
            self.say(message)

    def _write(self, line: dict[str, Any], text: str) -> None:
        if not self._is_main:
            return
        self._log_file.append(line)
        if self._options.tensorboard:
            optional(lambda: self._show(line), f"cannot write {self._run_dir}/tensorboard", None)
        if self._bar is None or line["kind"] != "train":
            width = len(str(self._steps))
            self.say(f"step {line['step']:>{width}}/{self._steps}  {text}")

    def _show(self, line: dict[str, Any]) -> None:
        """On the board. Where it fails, a new event file begins with the next line."""
        board, self._board = self._board, None
        board = board or _Board(self._run_dir / "tensorboard", self._board_start)
        self._board_start = line["step"]
        board.add(line)
        self._board = board

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log_file is not None:
            self._log_file.close()
        if self._board is not None:
            optional(self._board.close, f"cannot write {self._run_dir}/tensorboard", None)


class _Board:
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


class _LogFile:
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


def write_summary(run_dir: Path, fields: dict[str, Any]) -> None:
    write_json(run_dir / "summary.json", fields)
