"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar or plain lines, summary.json.

Rank 0 writes. Numbers that live on the device are read only at the steps that are logged.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import field_validator

from hvdtrain.errors import give_up_output
from hvdtrain.files import note, optional
from hvdtrain.optim.guard import Guard, is_overflow
from hvdtrain.optim.noise_scale import NoiseScale
from hvdtrain.optim.update import Agreed
from hvdtrain.options import Options, option
from hvdtrain.watch.bar import Bar, is_for_people
from hvdtrain.watch.board import Board
from hvdtrain.watch.log_file import STEP_PARTS, LogFile
from hvdtrain.watch.meter import Laps, StepTimes, memory_peak_mib
from hvdtrain.watch.profiler import parse_steps

T = TypeVar("T")


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


class Learner(Protocol):
    """What a line says of who learns. tokens: non-padding target tokens since step 0, of all replicas; a tensor where
    they are on the device. flops: this rank's model FLOPs of the last step (see models/flops.py); 0: not counted.
    """

    tokens: Any
    noise: NoiseScale

    @property
    def flops(self) -> int: ...

    @property
    def guard(self) -> Guard: ...

    def report(self) -> Mapping[str, float]:
        """What there is to say of how the replicas agree (asks the device)."""


class Metrics:
    """Writes down a run's numbers. All ranks make one and call ``add``; only rank 0 (``is_main``) writes.

    start_step: what the run has behind it. Times, FLOPs and memory are this rank's. ``peak``: FLOP/s that this rank's
    device could reach (see machine/peaks.py), None: not known; may be set at any time.
    """

    def __init__(
        self,
        run_dir: Path,
        options: MetricsOptions,
        steps: int,
        is_main: bool,
        start_step: int,
        learner: Learner,
        device: torch.device | None = None,
    ):
        self._options, self._steps, self._is_main, self._run_dir = options, steps, is_main, run_dir
        self._learner = learner
        self._device = device or torch.device("cpu")
        self.peak: float | None = None
        self.reports = [learner.report]  # of what else a line tells
        self.tokens = int(learner.tokens)  # as of the last line
        self._started = time.perf_counter()
        self._unread: deque[StepTimes | Laps] = deque()
        self._since = StepTimes()
        self.spent = StepTimes()  # of all steps of this process that could be read
        self._start_step, self._steps_since = start_step, 0
        self._flops_since = 0
        # Of all intervals but the first, which holds the start-up.
        self._rate_tokens, self._rate_flops, self._rate_s = 0, 0, 0.0
        self._intervals = 0
        self._log_file: LogFile | None = None
        self._board: Board | None = None
        self._board_start = start_step
        self._bar: Bar | None = None
        self.last_loss = math.nan
        self.skipped = 0  # steps, by a guard
        if is_main:
            self._log_file = LogFile(run_dir / "metrics.jsonl", start_step)
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

    def add(self, step: int, epoch: int, agreed: Agreed, lr: float, times: StepTimes | Laps) -> None:
        """Note one finished step; every ``metrics.every`` steps read it, check it and write it.

        Errors: DivergedError, on all ranks alike, where the guard says so.
        """
        self._note(times)
        if self._bar is not None:
            self._bar.step(agreed.loss)
        if self.is_due(step):
            self._log(step, epoch, agreed, lr)

    def pass_by(self, times: StepTimes | Laps) -> None:
        """Note a finished step of which nothing is known but its times."""
        self._note(times)
        if self._bar is not None:
            self._bar.pass_by()

    def is_due(self, step: int) -> bool:
        """Is a line of this step to be written?"""
        return step % self._options.every == 0 or step in (self._start_step + 1, self._steps)

    def _note(self, times: StepTimes | Laps) -> None:
        self._flops_since += self._learner.flops
        self._unread.append(times)
        self._read_times(only_ready=True)  # so that few wait, however seldom a line is written
        self._steps_since += 1

    def _read_times(self, only_ready: bool) -> None:
        while self._unread and (not only_ready or self._unread[0].is_ready()):
            times = self._unread.popleft().read()
            self._since.add(times)
            self.spent.add(times)

    def _log(self, step: int, epoch: int, agreed: Agreed, lr: float) -> None:
        loss, grad_norm = agreed.loss.item(), agreed.grad_norm.item()
        loss_scale = None if agreed.loss_scale is None else agreed.loss_scale.item()
        self.skipped, factor = self._learner.guard.check_step(step, loss, grad_norm, loss_scale)
        if math.isfinite(loss):
            self.last_loss = loss
        self._read_times(only_ready=False)  # the device has come past them: it has just told the loss
        tokens, self.tokens = self.tokens, int(self._learner.tokens)
        rate = self._note_rate(self.tokens - tokens)
        line = {
            "kind": "train",
            "step": step,
            "epoch": epoch,
            "tokens": self.tokens,
            "loss": loss if math.isfinite(loss) else None,  # JSON knows no infinity
            "lr": lr * factor,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens_per_s": round(rate, 1),
            **self._times_of_a_step(),
            "memory_peak_mib": round(memory_peak_mib(self._device), 1),
            "wall_s": round(self.wall_s, 3),
        }
        grad = "overflow" if is_overflow(grad_norm, loss_scale) else f"{grad_norm:.2f}"
        if loss_scale is not None:
            line["loss_scale"] = loss_scale
        if self._learner.guard.skip is not None:
            line["skipped_steps"] = self.skipped
            grad += f"  skipped {self.skipped}" if self.skipped else ""
        if (noise := self._learner.noise.value()) is not None:
            line["noise_scale_tokens"] = round(noise, 1)
        for report in self.reports:
            line |= report()
        speed = f"{rate:,.0f} tokens/s"
        if self._flops_since and self._since.total:
            flops_per_s = self._flops_since / self._since.total
            line["model_tflops_per_s"] = round(flops_per_s / 1e12, 6)
            if self.peak:
                line["mfu"] = round(flops_per_s / self.peak, 4)
                speed += f"  {flops_per_s / self.peak:.0%} MFU"
        self._steps_since, self._since, self._flops_since = 0, StepTimes(), 0
        self._write(line, f"loss {loss:.4f}  lr {line['lr']:.2e}  grad {grad}  {speed}")
        if self._bar is not None:
            self._bar.log(loss, speed)

    def _note_rate(self, tokens: int) -> float:
        """Tokens/s of the interval that ends now."""
        if self._intervals > 0:
            self._rate_tokens += tokens
            self._rate_flops += self._flops_since
            self._rate_s += self._since.total
        self._intervals += 1
        return tokens / self._since.total if self._since.total else 0.0

    def _times_of_a_step(self) -> dict[str, float]:
        return {f"time_{part}_s": round(getattr(self._since, part) / self._steps_since, 6) for part in STEP_PARTS}

    def evaluating(self, batches: Iterable[T], count: int) -> Iterable[T]:
        """``batches`` of an evaluation, about ``count``; the bar moves with them."""
        return batches if self._bar is None else self._bar.evaluating(batches, count)

    def doing(self, what: str) -> None:
        """What the bar shows until the next step, like "saving"."""
        if self._bar is not None:
            self._bar.doing(what)

    def add_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Note the scores of the validation split. Errors: DivergedError, on all ranks alike."""
        self._learner.guard.check_scores(step, scores)
        words = (f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in scores.items())
        line = {"kind": "eval", "step": step, **scores, "wall_s": round(self.wall_s, 3)}
        self._write(line, f"{'  '.join(words)}  wall_s {self.wall_s:.1f}")
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
        board = board or Board(self._run_dir / "tensorboard", self._board_start)
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
