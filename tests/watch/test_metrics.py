"""What a run says of itself: whole lines, finite numbers, nothing of a killed run's future."""

import errno
import json
import math
import os
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hvdtrain import files
from hvdtrain.errors import EXIT_DIVERGED, DivergedError, OutputError
from hvdtrain.files import write_json
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.noise_scale import NoiseScale
from hvdtrain.optim.update import Agreed
from hvdtrain.watch.log_file import read_log
from hvdtrain.watch.metrics import Metrics, MetricsOptions, StepTimes

TIMES = StepTimes(data=0.1, compute=0.2, sync=0.3, total=0.6)
KEYS = [
    "kind", "step", "epoch", "tokens", "loss", "lr", "grad_norm", "tokens_per_s",
    "time_data_s", "time_compute_s", "time_sync_s", "time_optimizer_s", "time_other_s", "memory_peak_mib", "wall_s",
]  # fmt: skip


def sums(loss: float, weight: int = 60, grad_norm: float = 1.5) -> Agreed:
    numbers = (loss, weight, grad_norm, math.nan, math.nan, math.nan, 0)
    return Agreed(*(torch.tensor(value, dtype=torch.float64) for value in numbers))


@dataclass
class Student:
    """Who learns, in place of the engine."""

    tokens: Any
    flops: int = 0
    noise: NoiseScale = field(default_factory=lambda: NoiseScale(torch.device("cpu")))
    guard: Guard = field(default_factory=lambda: Guard(GuardOptions(), torch.device("cpu")))
    said: dict[str, float] = field(default_factory=dict)

    def report(self) -> dict[str, float]:
        return self.said


def metrics_of(
    run_dir: Path, steps: int = 20, every: int = 5, start: int = 0, tokens: int = 0, is_main: bool = True, board=False
) -> Metrics:
    options = MetricsOptions(every=every, tensorboard=board)
    return Metrics(run_dir, options, steps, is_main, start, Student(tokens))


def add(metrics: Metrics, step: int, epoch: int, agreed: Agreed, lr: float, times: Any, flops: int = 0) -> None:
    """A step of the student, and its line."""
    student = metrics._learner
    student.tokens, student.flops = student.tokens + agreed.weight, flops
    metrics.add(step, epoch, agreed, lr, times)


def train(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last + 1):
        add(metrics, step, step // 10, sums(loss=1 / step), lr=step * 1e-3, times=TIMES)


def lines_of(run_dir: Path) -> list[dict]:
    """Strictly: every line JSON as other languages read it, which know no NaN."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_nth_step_the_first_and_the_last_are_lines(tmp_path: Path):
    metrics = metrics_of(tmp_path, steps=12)
    train(metrics, 1, 12)
    metrics.close()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 5, 10, 12]
    assert [line["tokens"] for line in lines] == [60, 300, 600, 720]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 5e-3, 1e-2, 1.2e-2])
    assert [line["loss"] for line in lines] == [1.0, 1 / 5, 1 / 10, 1 / 12]
    assert all(list(line) == KEYS for line in lines)
    assert metrics.tokens == 720
    assert metrics.last_loss == 1 / 12


def test_times_are_means_over_the_interval_and_the_rate_leaves_out_the_start(tmp_path: Path):
    metrics = metrics_of(tmp_path, steps=10)
    slow = StepTimes(data=60.0, compute=0.0, sync=0.0, total=60.0)
    add(metrics, 1, 0, sums(2.0), 0.1, slow)
    train(metrics, 2, 10)
    metrics.close()
    first, second, third = lines_of(tmp_path)
    assert (first["time_data_s"], second["time_data_s"]) == (60.0, pytest.approx(0.1))
    assert (second["time_compute_s"], second["time_sync_s"]) == (pytest.approx(0.2), pytest.approx(0.3))
    assert [line["tokens_per_s"] for line in (first, second, third)] == [1.0, 100.0, 100.0]
    assert metrics.tokens_per_s == pytest.approx(100.0)


def test_what_no_lap_names_is_other(tmp_path: Path):
    metrics = metrics_of(tmp_path, steps=10)
    for step in range(1, 11):
        add(metrics, step, 0, sums(2.0), 0.1, StepTimes(data=0.1, compute=0.4, sync=0.2, optimizer=0.2, total=1.0))
    metrics.close()
    for line in lines_of(tmp_path):
        assert (line["time_optimizer_s"], line["time_other_s"]) == (pytest.approx(0.2), pytest.approx(0.1))
        assert 1 < line["memory_peak_mib"] < 1e6


def test_what_the_sync_reports_is_in_the_line_of_its_step(tmp_path: Path):
    metrics = metrics_of(tmp_path, steps=10)
    for step in range(1, 11):
        metrics._learner.said = {"sent_mib": float(step), "residual_norm": 0.5}
        train(metrics, step, step)
    metrics.close()
    lines = lines_of(tmp_path)
    assert [line["sent_mib"] for line in lines] == [1.0, 5.0, 10.0]
    assert list(lines[0]) == [*KEYS, "sent_mib", "residual_norm"]


def test_model_flops_and_their_share_of_the_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """3e9 FLOPs in a step of 0.6 s are 5e9 a second; the peak becomes known in the middle of the run."""
    metrics = metrics_of(tmp_path, steps=15)
    assert (metrics.flops_per_s, metrics.mfu) == (0.0, None)
    for step in range(1, 16):
        metrics.peak = 2e10 if step > 5 else None
        add(metrics, step, 0, sums(2.0), 0.1, TIMES, flops=3_000_000_000 if step > 1 else 0)
    metrics.close()
    first, second, third, last = lines_of(tmp_path)
    assert not {"model_tflops_per_s", "mfu"} & set(first)
    assert second["model_tflops_per_s"] == pytest.approx(0.005)
    assert "mfu" not in second
    assert (third["mfu"], last["mfu"]) == (0.25, 0.25)
    assert (metrics.flops_per_s, metrics.mfu) == (pytest.approx(5e9), pytest.approx(0.25))
    metrics.peak = None
    assert metrics.mfu is None
    texts = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [text.endswith("  25% MFU") for text in texts] == [False, False, True, True]


class Slow:
    """A step's times on a device that is behind: ready when the test says so."""

    def __init__(self, device: list[int], number: int):
        self.device, self.number = device, number

    def is_ready(self) -> bool:
        return self.number <= self.device[0]

    def read(self) -> StepTimes:
        if not self.is_ready():
            self.device[1] += 1  # this waited
        return StepTimes(data=self.number, total=self.number)


def test_times_of_a_device_are_read_when_they_are_there(tmp_path: Path):
    """In order, without waiting between the lines, and all of them at a line."""
    metrics = metrics_of(tmp_path, steps=12, every=10)
    device = [1, 0]
    add(metrics, 1, 0, sums(2.0), 0.1, Slow(device, 1))
    for step in range(2, 11):
        device[0] = step - 3
        add(metrics, step, 0, sums(2.0), 0.1, Slow(device, step))
        assert len(metrics._unread) == (0 if step == 10 else min(3, step - 1))
        assert device[1] == (3 if step == 10 else 0)
    metrics.close()
    first, second = lines_of(tmp_path)
    assert first["time_data_s"] == 1.0
    assert second["time_data_s"] == pytest.approx(sum(range(2, 11)) / 9)


@pytest.mark.parametrize("spec", ["x", "0", "0-3", "5-3", "1-", "-2", "1-2-3", "1 - 2", "1,2", "\u0663"])
def test_steps_to_profile_that_are_none(spec: str):
    with pytest.raises(ValidationError, match="FIRST-LAST, steps counted from 1"):
        MetricsOptions(profile=spec)


def test_steps_to_profile():
    assert (MetricsOptions().mfu, MetricsOptions().profile) == ("auto", "")
    assert [MetricsOptions(profile=spec).profile for spec in ("7", "10-12")] == ["7", "10-12"]


def scaled(scale: float, loss: float = 2.0, grad_norm: float = 1.5) -> Agreed:
    return replace(sums(loss, grad_norm=grad_norm), loss_scale=torch.tensor(scale))


def test_an_overflow_of_a_scaled_loss_is_no_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Until the scale has been lowered so often that it cannot be the scale's fault."""
    metrics = metrics_of(tmp_path, every=1)
    add(metrics, 1, 0, scaled(16.0), 0.1, TIMES)
    add(metrics, 2, 0, scaled(16.0, grad_norm=math.inf), 0.1, TIMES)
    add(metrics, 3, 0, scaled(8.0, grad_norm=math.nan), 0.1, TIMES)
    for sums_of_step in (scaled(2.0**-25, grad_norm=math.inf), scaled(16.0, loss=math.nan)):
        with pytest.raises(DivergedError):
            add(metrics, 4, 0, sums_of_step, 0.1, TIMES)
    metrics.close()
    assert [(line["grad_norm"], line["loss_scale"]) for line in lines_of(tmp_path)] == [
        (1.5, 16),
        (None, 16),
        (None, 8),
    ]
    assert ["grad overflow" in line for line in capsys.readouterr().out.splitlines()] == [False, True, True]


def test_evaluations_are_lines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metrics = metrics_of(tmp_path)
    metrics.add_evaluation(5, {"val_loss": 2.5, "perplexity": 12.2})
    metrics.close()
    (line,) = lines_of(tmp_path)
    assert line.pop("wall_s") >= 0
    assert line == {"kind": "eval", "step": 5, "val_loss": 2.5, "perplexity": 12.2}
    assert "val_loss 2.5000" in capsys.readouterr().out


def test_only_rank_0_writes_and_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metrics = metrics_of(tmp_path, is_main=False)
    train(metrics, 1, 20)
    metrics.add_evaluation(20, {"val_loss": 1.0})
    metrics.say("hello")
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert metrics.tokens == 1200


def test_a_resumed_run_forgets_what_was_written_after_its_checkpoint(tmp_path: Path):
    metrics = metrics_of(tmp_path)
    train(metrics, 1, 20)
    metrics.add_evaluation(10, {"val_loss": 2.0})
    metrics.add_evaluation(15, {"val_loss": 1.5})
    metrics.close()
    before = lines_of(tmp_path)
    metrics = metrics_of(tmp_path, start=10, tokens=600)
    assert lines_of(tmp_path) == [line for line in before if line["step"] <= 10]
    train(metrics, 11, 20)
    metrics.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 5, 10, 10, 11, 15, 20]
    assert lines_of(tmp_path)[-1]["tokens"] == 1200
    metrics_of(tmp_path).close()  # from the start again
    assert lines_of(tmp_path) == []


@pytest.mark.parametrize(
    "tail", ['{"kind": "train", "step": 6, "lo', "\0\0\0\0", '{"kind": "train"}\n[1]\n', "\n\n", "\xff"]
)
def test_a_half_written_line_is_passed_over(tmp_path: Path, tail: str):
    metrics = metrics_of(tmp_path)
    train(metrics, 1, 5)
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail.encode("latin-1"))
    assert [line["step"] for line in read_log(path)] == [1, 5]
    metrics = metrics_of(tmp_path, start=5, tokens=300)
    train(metrics, 6, 10)
    metrics.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 5, 6, 10]


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_number_that_is_none_ends_the_run_on_every_rank(tmp_path: Path, is_main: bool, loss: float, grad_norm: float):
    metrics = metrics_of(tmp_path, is_main=is_main)
    train(metrics, 1, 4)
    with pytest.raises(DivergedError, match=r"step 5: loss .*optim\.lr") as caught:
        add(metrics, 5, 0, sums(loss, grad_norm=grad_norm), 0.1, TIMES)
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (EXIT_DIVERGED, True)
    metrics.close()
    if is_main:
        assert [line["step"] for line in lines_of(tmp_path)] == [1]


def test_an_evaluation_that_is_no_number_writes_no_nan(tmp_path: Path):
    with closing(metrics_of(tmp_path)) as metrics, pytest.raises(DivergedError):
        metrics.add_evaluation(5, {"val_loss": math.nan, "perplexity": math.nan})
    assert lines_of(tmp_path) == []


def test_a_full_disk_is_an_output_error(tmp_path: Path):
    with closing(metrics_of(tmp_path)) as metrics:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(OutputError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            train(metrics, 1, 5)
    with pytest.raises(OutputError, match=r"nowhere/metrics\.jsonl"):
        metrics_of(tmp_path / "nowhere")


def test_a_line_of_which_half_was_written_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As when a file server goes away: the rest of the line goes where the whole of it should be."""
    write, written = os.write, []

    def half_of_the_second(handle: int, content: memoryview) -> int:
        written.append(handle)
        if len(written) != 2:
            return write(handle, content)
        write(handle, content[: len(content) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "write", half_of_the_second)
    with closing(metrics_of(tmp_path)) as metrics:
        train(metrics, 1, 20)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 5, 10, 15, 20]


def test_tensorboard_reads_what_was_written(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = metrics_of(tmp_path, board=True)
    metrics.peak = 1e9
    for step in range(1, 21):
        add(metrics, step, 0, sums(loss=1 / step), 1e-3, TIMES, flops=300_000_000)
    metrics.add_evaluation(20, {"val_loss": 2.5})
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    numbers = {f"train/{key}" for key in KEYS if key not in ("kind", "step")}
    numbers |= {"train/model_tflops_per_s", "train/mfu"}
    assert set(board.Tags()["scalars"]) == numbers | {"eval/val_loss", "eval/wall_s"}
    loss = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert loss == [(step, pytest.approx(1 / step)) for step in (1, 5, 10, 15, 20)]
    assert [event.value for event in board.Scalars("train/mfu")] == [0.5] * 5
    assert [event.value for event in board.Scalars("eval/val_loss")] == [2.5]


def test_tensorboard_forgets_the_future_of_a_killed_run(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, start in ((1, 0), (11, 10)):
        metrics = metrics_of(tmp_path, start=start, board=True)
        train(metrics, first, 20)
        metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 5, 10, 11, 15, 20]


def test_the_summary_of_a_run(tmp_path: Path):
    write_json(tmp_path / "summary.json", {"status": "finished"})
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
