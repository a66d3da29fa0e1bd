"""How far a preparation is: a bar where somebody looks, lines where a log is kept; and nothing from other ranks."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import environment
from preparing import files_of, run, text_kind, write

from data_prep import progress as progress_module
from data_prep.corpus import InputFile
from data_prep.pieces import Piece, Unit
from data_prep.progress import ProgressBar
from hvdtrain.comm.ranks import OneRank

MB = 10**6


class Clock:
    """Stands still until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        fake = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda seconds: self.wait(seconds))
        monkeypatch.setattr(progress_module, "time", fake)
        self.waited = 0

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.waited += 1
        assert self.waited < 1000, "waits for ever"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(progress_module, "_LOOK_EVERY_S", 1.0)
    return Clock(monkeypatch)


def units(count: int = 3, size: int = 100 * MB) -> list[Unit]:
    file = InputFile(Path("a"), "a", count * size, 0)
    return [Unit(n, (Piece(file, n * size, (n + 1) * size, None),)) for n in range(count)]


def ranks(rank: int, size: int) -> OneRank:
    one = OneRank()
    one.rank, one.size = rank, size
    return one


def test_a_line_every_half_minute_in_a_log(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture):
    with ProgressBar(units(), tmp_path, OneRank()) as progress:
        clock.wait(10)
        progress.advance(0, 20 * MB)
        assert capsys.readouterr().err == ""
        clock.wait(20)
        progress.advance(0, 40 * MB)
        assert capsys.readouterr().err == "hvdtrain: 20 %: 60 of 300 MB, 2.0 MB/s, 2:00 left\n"
        clock.wait(20)
        progress.unit_done(0)
        assert capsys.readouterr().err == ""
        clock.wait(10)
        progress.advance(1, 20 * MB)
        assert capsys.readouterr().err == "hvdtrain: 40 %: 120 of 300 MB, 2.0 MB/s, 1:30 left\n"


def test_a_compressed_file_that_holds_more_than_was_guessed(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture
):
    """The bar would run ahead, and back when the next unit begins."""
    with ProgressBar(units(), tmp_path, OneRank()) as progress:
        clock.wait(40)
        progress.advance(0, 900 * MB)
        assert capsys.readouterr().err.startswith("hvdtrain: 33 %: 100 of 300 MB")


def test_others_are_seen_by_their_records(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture):
    with ProgressBar(units(), tmp_path, ranks(0, 2)) as progress:
        clock.wait(40)
        (tmp_path / "00002.json").touch()
        progress.unit_done(0)
        assert capsys.readouterr().err == "hvdtrain: 67 %: 200 of 300 MB, 5.0 MB/s, 0:20 left\n"
        (tmp_path / "00001.json").touch()
        progress.wait_for_others()
    assert clock.waited < 10


@pytest.mark.parametrize("after_s", [0.02, 0.5, 8.0])
def test_the_end_of_the_others_is_soon_noticed(tmp_path: Path, clock: Clock, after_s: float):
    """It was looked for once a second, by which two ranks were slower wherever all the work took few."""
    end, wait = clock.now + after_s, clock.wait

    def wait_and_finish(seconds: float) -> None:
        wait(seconds)
        if clock.now >= end:
            (tmp_path / "00000.json").touch()

    clock.wait = wait_and_finish
    with ProgressBar(units(1), tmp_path, ranks(0, 2)) as progress:
        progress.wait_for_others()
    assert end <= clock.now < end + 0.01 + after_s / 10


def test_what_was_there_at_the_start_makes_no_speed(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture):
    for name in ("00000.json", "00001.json"):
        (tmp_path / name).touch()
    with ProgressBar(units(), tmp_path, OneRank()) as progress:
        progress.unit_done(0)
        progress.unit_done(1)
        clock.wait(50)
        progress.advance(2, 50 * MB)
    assert capsys.readouterr().err == "hvdtrain: 83 %: 250 of 300 MB, 1.0 MB/s, 0:50 left\n"


def test_other_ranks_are_silent_and_do_not_wait(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture):
    with ProgressBar(units(), tmp_path, ranks(1, 2)) as progress:
        for number in range(3):
            clock.wait(100)
            progress.advance(number, 100 * MB)
            progress.unit_done(number)
        waited = clock.waited
        progress.wait_for_others()
    assert (clock.waited, capsys.readouterr().err) == (waited, "")


def test_a_whole_preparation_in_a_log(
    tmp_path: Path, byte: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(progress_module, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(progress_module, "_LINE_EVERY_S", 0.0)
    files = files_of(write(tmp_path / "in", **{"a.txt": "one line of text\n" * 200}))
    run(lambda: text_kind(files, "line"), byte, tmp_path / "out", shard_tokens=200)
    lines = capfd.readouterr().err.split("\n")
    assert lines.pop() == ""
    assert len(lines) > 10
    assert all(re.fullmatch(r"hvdtrain: \d+ %: 0 of 0 MB, \d+\.\d MB/s, \d+:\d\d left", line) for line in lines)
    percents = [int(line.split()[1]) for line in lines]
    assert percents == sorted(percents)
    assert percents[-1] == 100


_LOOK_AT_ONCE = """
import sys
from data_prep import __main__, prepare, progress
progress._LOOK_EVERY_S, prepare._BATCH_BYTES = 0.0, 100_000
sys.exit(__main__.main())
"""


def test_a_bar_on_a_terminal(tmp_path: Path, bpe: Path):
    write(tmp_path / "in", **{"a.txt": "one line of text, and another\n" * 200_000})
    words = ["text", "--input", tmp_path / "in", "--tokenizer", bpe, "--out", tmp_path / "out", "--documents", "line"]
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", _LOOK_AT_ONCE, *map(str, words), "--shard-tokens", "200000"],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=environment(),
    )
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([screen], [], [], 1)[0]:
                try:
                    part = os.read(screen, 1 << 16)
                except OSError:  # the other end was closed
                    break
                shown += part
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(screen)
    bars = [bar for bar in shown.decode().split("\r") if bar.startswith("tokenising:")]
    assert re.search(r"tokenising: +\d+%\|.*\| \d.*k?M?/6\.00M \[00:\d\d<\d\d:\d\d, +[\d.]+[kMG]?B/s\]", bars[-1]), bars
    assert "100%" in bars[-1]
    assert len({bar.split("%")[0] for bar in bars}) > 3  # it moved
    assert "hvdtrain:" not in shown.decode()
