"""Checkpoints that are damaged or could not be written: named, skipped, never in the way of a whole one."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_decoder
from torch import nn

from hvdtrain import checkpoint
from hvdtrain.checkpoint import CheckpointOptions, Progress, folder_of, newest_valid, read_progress, steps_saved
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import EXIT_IO, CheckpointError, RankError
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer

GROUP = LocalGroup()
PART = "part-00000-of-00001.safetensors"


def save(run_dir: Path, step: int, keep_last: int = 0) -> nn.Module:
    model = tiny_decoder(seed=step)
    optimizer = make_optimizer(model, OptimOptions())
    checkpoint.save(run_dir, model, optimizer, Progress(step=step), GROUP, CheckpointOptions(keep_last=keep_last))
    return model


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def flip(path: Path, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path: Path, key: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


DAMAGE = {
    "flipped bit": (lambda f: flip(f / PART), f"{PART} does not match its digest"),
    "truncated": (lambda f: os.truncate(f / PART, 100), f"{PART} has 100 bytes instead of"),
    "empty": (lambda f: os.truncate(f / PART, 0), f"{PART} has 0 bytes instead of"),
    "no part": (lambda f: (f / PART).unlink(), f"{PART} is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
    "broken manifest": (lambda f: (f / "manifest.json").write_text('{"format": 1'), "manifest.json is damaged"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json is damaged"),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json is damaged"),
    "a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is damaged"),
    "newer format": (lambda f: edit(f / "manifest.json", format=2), "manifest.json was written by another version"),
    "no parts": (lambda f: without(f / "manifest.json", "parts"), "manifest.json is damaged"),
    "strange field": (lambda f: edit(f / "manifest.json", colour="red"), "manifest.json is damaged"),
    "word for step": (lambda f: edit(f / "manifest.json", step="two"), "manifest.json"),
    "other step": (lambda f: edit(f / "manifest.json", step=1), "manifest.json"),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "manifest.json: No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(run_dir: Path, damage: str):
    break_it, message = DAMAGE[damage]
    broken = folder_of(run_dir, 2)
    break_it(broken)
    with pytest.raises(CheckpointError) as caught:
        read_progress(broken)
    folder, progress, damaged = newest_valid(run_dir, GROUP)
    assert (folder, progress.step, damaged) == (folder_of(run_dir, 1), 1, [str(caught.value)])
    assert message in damaged[0]
    assert str(broken) in damaged[0]
    assert broken.exists()  # looking deletes nothing


def test_all_damaged_or_none_there(run_dir: Path, tmp_path: Path):
    for step in (1, 2):
        flip(folder_of(run_dir, step) / PART)
    assert newest_valid(run_dir, GROUP) is None
    assert newest_valid(tmp_path / "nowhere", GROUP) is None


def test_each_rank_digests_its_share(run_dir: Path):
    """A part is read by one rank, not by all 512; whoever finds it damaged tells the others."""
    flip(folder_of(run_dir, 2) / PART)
    with pytest.raises(CheckpointError):
        read_progress(folder_of(run_dir, 2), rank=0, size=2)
    assert read_progress(folder_of(run_dir, 2), rank=1, size=2).step == 2

    class Second(LocalGroup):
        rank, size = 1, 2

        def all_gather_object(self, value):
            if isinstance(value, list):
                return [value, value]
            try:
                read_progress(folder_of(run_dir, 2 if not self.skipped else 1), 0, 2)
                return [None, value]
            except CheckpointError as error:
                self.skipped = True
                return [str(error), value]

        skipped = False

    folder, _, damaged = newest_valid(run_dir, Second())
    assert folder == folder_of(run_dir, 1)
    assert "does not match its digest" in damaged[0]


def test_an_unfinished_one_is_written_again(run_dir: Path):
    (folder_of(run_dir, 2) / "manifest.json").unlink()
    save(run_dir, 2)
    assert newest_valid(run_dir, GROUP)[1].step == 2
    assert "damaged-step-00000002-0" in names(run_dir)


# --- a save that fails -------------------------------------------------------------------------------------------


def no_space(*_args, **_named) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(*_args, **_named) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def half_a_file(_tensors, path: Path) -> None:
    path.write_bytes(b"half")
    no_space()


FAILURES = {
    "part": ("hvdtrain.checkpoint.save_file", no_space),
    "part, halfway": ("hvdtrain.checkpoint.save_file", half_a_file),
    "part, in safetensors": ("hvdtrain.checkpoint.save_file", no_space_in_rust),
    "digest": ("hvdtrain.checkpoint.file_sha256", no_space),
    "manifest": ("pathlib.Path.write_text", no_space),
    "flush": ("hvdtrain.checkpoint.sync_folder", no_space),
    "folder": ("pathlib.Path.mkdir", no_space),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_save_that_fails_leaves_what_was_there(run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[what])
        with pytest.raises(RankError, match=r"OutputError: cannot (save|write) .*No space left") as caught:
            save(run_dir, 3, keep_last=1)
    assert caught.value.exit_code == EXIT_IO
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert names(run_dir) == {"step-00000001", "step-00000002"}
    save(run_dir, 3)  # with space again
    assert newest_valid(run_dir, GROUP)[1].step == 3


def test_deleting_the_old_that_fails_is_an_output_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """The new one is whole by then."""
    replace = os.replace

    def fail_for_old(source, target) -> None:
        if str(target).endswith(".old"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_old)
    with pytest.raises(RankError, match="OutputError") as caught:
        save(run_dir, 3, keep_last=1)
    assert caught.value.exit_code == EXIT_IO
    assert newest_valid(run_dir, GROUP)[1].step == 3


def test_what_a_killed_save_left_is_replaced(run_dir: Path):
    """Killed between two lines: a partial folder with anything in it."""
    partial = run_dir / "checkpoints" / ".step-00000003.partial"
    shutil.copytree(folder_of(run_dir, 2), partial)
    (partial / "part-00007-of-00008.safetensors").write_bytes(b"stale")
    assert steps_saved(run_dir) == [2, 1]
    model = save(run_dir, 3)
    assert {path.name for path in folder_of(run_dir, 3).iterdir()} == {"manifest.json", PART}
    other = tiny_decoder(seed=50)
    checkpoint.load(folder_of(run_dir, 3), other)
    assert torch.equal(model.embedding.weight, other.embedding.weight)
    assert not partial.exists()
