"""Checkpoints that are damaged or forged load to what they hold, or are refused; nothing leads out of their folder."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from fuzzing import REFUSED, RIGHT, judge_checkpoint, judged, mutate_checkpoint, write_sound_run
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.checkpoint.retention import folder_of


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_sound_run(folder)
    return folder


def test_a_sound_one_is_right(sound: Path, tmp_path: Path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    for is_sealed in (False, True):
        assert judged(judge_checkpoint, sound, tmp_path, is_sealed) == RIGHT


@settings(max_examples=120)
@given(st.integers(0, 1 << 32))
def test_mutants(sound: Path, tmp_path: Path, seed: int):
    """`make bench BENCH=fuzz` makes a thousand."""
    run_dir = tmp_path / "mutant"
    is_sealed = mutate_checkpoint(random.Random(seed), sound, run_dir)
    assert judged(judge_checkpoint, sound, run_dir, is_sealed) in (RIGHT, REFUSED)
    shutil.rmtree(run_dir)


def test_the_judge_sees_other_numbers_and_crashes(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("hvdtrain.checkpoint.reader._copy", lambda saved, name, piece, target: None)
    part = folder_of(tmp_path, 7) / "part-00000-of-00002.safetensors"
    assert judged(judge_checkpoint, sound, tmp_path, False).startswith("wrong: other numbers in ")
    monkeypatch.setattr("hvdtrain.checkpoint.reader._copy", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert judged(judge_checkpoint, sound, tmp_path, False) == "wrong: died of signal 9"
    part.unlink()
    assert judged(judge_checkpoint, sound, tmp_path, False) == REFUSED
