"""Checkpoints that are damaged or could not be written: named, skipped, never in the way of a whole one."""

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import slices_of, state_of, tensors_in
from not_here import small_disk
from safetensors import SafetensorError
from threads import on_ranks
from tiny import tiny_decoder
from torch import nn

from hvdtrain import files
from hvdtrain.checkpoint import valid, writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import load
from hvdtrain.checkpoint.retention import folder_of, set_aside, steps_saved
from hvdtrain.checkpoint.start import find_start
from hvdtrain.checkpoint.valid import newest_valid, read_progress
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.config import RunConfig
from hvdtrain.errors import EXIT_IO, CheckpointError, OutputError, RankError
from hvdtrain.files import fields_sha256
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import whole_slices

GROUP = LocalGroup()
PART = "part-00000-of-00001.safetensors"
IDENTITY = RunConfig().identity()


def save(run_dir: Path, step: int, keep_last: int = 0) -> nn.Module:
    model = tiny_decoder(seed=step)
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    writer.save(run_dir, state_of(model, optimizer), Progress(step=step), GROUP, CheckpointOptions(keep_last=keep_last))
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


def forge(folder: Path, text: str | None = None, **changes: Any) -> None:
    """A manifest that is not what hvdtrain wrote, but has the digest that belongs to it."""
    path = folder / "manifest.json"
    fields = json.loads(text if text is not None else path.read_text())
    fields.pop("manifest_sha256", None)
    fields |= changes
    try:
        seal = fields_sha256(fields)
    except RecursionError:
        seal = ""
    path.write_text(json.dumps({**fields, "manifest_sha256": seal}))


def rename_part(folder: Path, name: str) -> None:
    """The manifest finds its part under another name, where it really is."""
    (part,) = json.loads((folder / "manifest.json").read_text())["parts"]
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / PART, target)
    forge(folder, parts=[{**part, "file": name}])


def link(path: Path, target: Path) -> None:
    shutil.move(path, target)
    path.symlink_to(target)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def without(path: Path, key: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def parts_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "manifest.json").read_text())["parts"]


def replace_text(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    fields = json.loads(path.read_text())
    fields.pop("manifest_sha256")
    found = f'"manifest_sha256": "{json.loads(text)["manifest_sha256"]}"'
    path.write_text(path.read_text().replace(found, f'"manifest_sha256": "{fields_sha256(fields)}"'))


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
    "newer format": (lambda f: edit(f / "manifest.json", format=3), "manifest.json was written by another version"),
    "no parts": (lambda f: without(f / "manifest.json", "parts"), "manifest.json is damaged"),
    "strange field": (lambda f: edit(f / "manifest.json", colour="red"), "manifest.json is damaged"),
    "word for step": (lambda f: edit(f / "manifest.json", step="two"), "manifest.json"),
    "other step": (lambda f: edit(f / "manifest.json", step=1), "manifest.json"),
    "part elsewhere": (lambda f: rename_part(f, f"../{PART}"), f"names a part outside its folder: '../{PART}'"),
    "absolute part": (lambda f: rename_part(f, str(f.parent / "x")), "names a part outside its folder: '/"),
    "strange name": (lambda f: rename_part(f, "weights.safetensors"), "does not name one part of each rank"),
    "name twice": (lambda f: forge(f, parts=2 * parts_of(f)), "does not name one part of each rank"),
    "empty parts": (lambda f: forge(f, parts=[]), "does not name one part of each rank"),
    "no name": (lambda f: forge(f, parts=[{"bytes": 1, "sha256": "0" * 64}]), "manifest.json is damaged"),
    "negative bytes": (lambda f: forge(f, parts=[{**parts_of(f)[0], "bytes": -1}]), "manifest.json is damaged"),
    "linked part": (lambda f: link(f / PART, f.parent / "x"), f"{PART} is not a regular file of its own"),
    "linked manifest": (lambda f: link(f / "manifest.json", f / "x"), "manifest.json is not a regular file of its own"),
    "dangling part": (
        lambda f: ((f / PART).unlink(), (f / PART).symlink_to("nowhere")),
        f"{PART} is not a regular file of its own",
    ),
    "pipe": (
        lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")),
        "manifest.json is not a regular file of its own",
    ),
    "folder": (lambda f: ((f / PART).unlink(), (f / PART).mkdir()), f"{PART} is not a regular file of its own"),
    "a part too many": (
        lambda f: shutil.copy(f / PART, f / "part-00001-of-00002.safetensors"),
        "part-00001-of-00002.safetensors is not in the manifest",
    ),
    "deep": (lambda f: (f / "manifest.json").write_text(nested(100_000)), "manifest.json is damaged (RecursionError"),
    "deep inside": (
        lambda f: (f / "manifest.json").write_text('{"format": 1, "identity": ' + nested(5000) + "}"),
        "manifest.json is damaged",
    ),
    "deep and sealed": (lambda f: forge(f, identity=json.loads(nested(400))), "manifest.json is damaged"),
    "long number": (lambda f: (f / "manifest.json").write_text('{"format": ' + "9" * 5000 + "}"), "is damaged"),
    "huge rows": (lambda f: forge(f, rows_consumed=10**30), "manifest.json is damaged"),
    "negative rows": (lambda f: forge(f, rows_consumed=-1), "manifest.json is damaged"),
    "true rows": (lambda f: forge(f, rows_consumed=True), "manifest.json is damaged"),
    "no ranks": (lambda f: forge(f, world_size=0), "manifest.json is damaged"),
    "nan": (lambda f: forge(f, best_val_loss=float("nan")), "NaN is no number"),
    "infinite": (lambda f: replace_text(f, '"best_val_loss": null', '"best_val_loss": 1e999'), "is damaged"),
    "negative scale": (lambda f: forge(f, loss_scale=[-1.0, 1]), "manifest.json is damaged"),
    "short guard": (lambda f: forge(f, guard=[1.0]), "manifest.json is damaged"),
    "strange fingerprint": (lambda f: forge(f, fingerprint="-1"), "manifest.json is damaged"),
    "not UTF-8 inside": (lambda f: replace_text(f, '"identity": null', '"identity": {"a": "\\ud800"}'), "is damaged"),
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

    for folder, _, damaged in on_ranks(2, lambda group: newest_valid(run_dir, group)):
        assert folder == folder_of(run_dir, 1)
        assert "does not match its digest" in damaged[0]


def test_one_that_was_dropped_while_it_was_read_is_no_damage(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """The run goes on, and keeps one checkpoint; whoever reads it meanwhile finds the new one."""

    def read_late(folder: Path, *rank: int) -> Progress:
        if folder == folder_of(run_dir, 2):
            save(run_dir, 3, keep_last=1)
        return read_progress(folder, *rank)

    monkeypatch.setattr(valid, "read_progress", read_late)
    folder, _, damaged = newest_valid(run_dir, GROUP)
    assert (folder, damaged) == (folder_of(run_dir, 3), [])


def test_what_could_not_be_read_once_is_not_set_aside(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system may fail for a while. The second look finds the checkpoint whole, and the run goes on from it."""
    failures = [CheckpointError("cannot read it: Input/output error")]

    def read_first(folder: Path, *rank: int) -> Progress:
        if failures and folder == folder_of(run_dir, 2):
            raise failures.pop()
        return read_progress(folder, *rank)

    monkeypatch.setattr(valid, "read_progress", read_first)
    progress, folder, notes = find_start(run_dir, "auto", IDENTITY, GROUP, defaults=IDENTITY)
    assert not failures
    assert (progress.step, folder, notes) == (2, folder_of(run_dir, 2), [])
    assert not any("damaged" in name for name in names(run_dir))


@pytest.mark.parametrize("what", ["part", "manifest", "folder"])
def test_a_file_system_that_does_not_answer_is_no_damage(run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    """Not within the 7 seconds either: the run ends with 74, and its newest checkpoint stays the newest."""

    def stale(*_args, **_named) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(files, "sleep", lambda seconds: None)
    place = {
        "part": "hvdtrain.checkpoint.valid.file_sha256",
        "manifest": "pathlib.Path.read_text",
        "folder": "os.listdir",
    }
    with monkeypatch.context() as patch:
        patch.setattr(place[what], stale)
        with pytest.raises(OutputError, match=r"cannot read .*: Stale file handle"):
            find_start(run_dir, "auto", IDENTITY, GROUP, defaults=IDENTITY)
    assert names(run_dir) == {"step-00000001", "step-00000002"}
    assert find_start(run_dir, "auto", IDENTITY, GROUP, defaults=IDENTITY)[0].step == 2


def test_only_the_owner_sets_aside(run_dir: Path):
    flip(folder_of(run_dir, 2) / PART)
    before = names(run_dir)
    _, folder, notes = find_start(run_dir, "auto", IDENTITY, GROUP, is_owner=False, defaults=IDENTITY)
    assert (folder, len(notes), names(run_dir)) == (folder_of(run_dir, 1), 1, before)
    find_start(run_dir, "auto", IDENTITY, GROUP, defaults=IDENTITY)
    assert names(run_dir) != before


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
    "part": ("hvdtrain.checkpoint.writer.save_file", no_space),
    "part, halfway": ("hvdtrain.checkpoint.writer.save_file", half_a_file),
    "part, in safetensors": ("hvdtrain.checkpoint.writer.save_file", no_space_in_rust),
    "digest": ("hvdtrain.checkpoint.writer.file_sha256", no_space),
    "manifest": ("pathlib.Path.write_text", no_space),
    "flush": ("hvdtrain.checkpoint.writer.sync_folder", no_space),
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


def test_what_is_too_old_and_cannot_be_deleted_stays(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The new one is whole by then, and training goes on."""
    replace = os.replace

    def fail_for_old(source, target) -> None:
        if str(target).endswith(".old"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_for_old)
        save(run_dir, 3, keep_last=1)
    assert "old checkpoints stay until the next is saved: cannot delete" in capsys.readouterr().err
    assert newest_valid(run_dir, GROUP)[1].step == 3
    assert steps_saved(run_dir) == [3, 2, 1]
    save(run_dir, 4, keep_last=1)
    assert steps_saved(run_dir) == [4]


def test_what_a_killed_save_left_is_replaced(run_dir: Path):
    """Killed between two lines: a partial folder with anything in it."""
    partial = run_dir / "checkpoints" / ".step-00000003.partial"
    shutil.copytree(folder_of(run_dir, 2), partial)
    (partial / "part-00007-of-00008.safetensors").write_bytes(b"stale")
    assert steps_saved(run_dir) == [2, 1]
    model = save(run_dir, 3)
    assert {path.name for path in folder_of(run_dir, 3).iterdir()} == {"manifest.json", PART}
    other = tiny_decoder(seed=50)
    load(folder_of(run_dir, 3), whole_slices(other, GROUP))
    assert torch.equal(model.embedding.weight, other.embedding.weight)
    assert not partial.exists()


def test_what_killed_runs_left_is_removed(run_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """Of any step; and a link goes, not what it leads to."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").touch()
    folder = run_dir / "checkpoints"
    for name in (".step-00000001.partial", ".step-00000099.partial", ".step-00000000.old"):
        (folder / name).mkdir()
        (folder / name / PART).write_bytes(b"stale")
    (folder / ".step-00000098.partial").symlink_to(elsewhere)
    (folder / ".step-00000003.partial").write_bytes(b"a file")
    for file in (folder / ".best.json.123.tmp", run_dir / ".summary.json.123.tmp", run_dir / ".report.html.123.tmp"):
        file.touch()
    (folder / "damaged-step-00000007-0").mkdir()
    save(run_dir, 3)
    assert [path.name for path in run_dir.glob(".*.tmp")] == [".report.html.123.tmp"]  # another command may write it
    assert names(run_dir) == {f"step-0000000{n}" for n in (1, 2, 3)} | {"damaged-step-00000007-0"}
    assert (elsewhere / "precious").exists()


def test_nothing_is_named_before_it_is_on_disk(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """The order that a power cut respects: parts, manifest, the folder they lie in, its name; deletions last."""
    events, fsync, replace = [], os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        events.append(("on disk", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def note_replace(source: Path, target: Path) -> None:
        events.append(("named", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save(run_dir, 3, keep_last=2)
    partial, manifest = ".step-00000003.partial", f".manifest.json.{os.getpid()}.tmp"
    assert events == [
        ("on disk", PART),
        ("on disk", manifest),
        ("named", "manifest.json"),
        ("on disk", partial),
        ("on disk", partial),
        ("named", "step-00000003"),
        ("on disk", "checkpoints"),
        ("named", ".step-00000001.old"),
    ]


# --- real limits -------------------------------------------------------------------------------------------------


def assert_save_fails(run_dir: Path, step: int, reason: str) -> None:
    """With one message and exit 74; what was there is there, nothing else is."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(RankError) as caught:
        save(run_dir, step, keep_last=1)
    assert str(caught.value) == f"OutputError: cannot save {folder_of(run_dir, step)}: {reason}"
    assert caught.value.exit_code == EXIT_IO
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert newest_valid(run_dir, GROUP)[1].step == 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "128k") as folder:
        yield folder


def test_a_full_disk(disk: Path):
    save(disk, 1)
    save(disk, 2)
    left = os.statvfs(disk)
    (disk / "other").write_bytes(bytes(left.f_bavail * left.f_frsize - 16384))
    assert_save_fails(disk, 3, "No space left on device")
    (disk / "other").unlink()
    save(disk, 3)
    assert newest_valid(disk, GROUP)[1].step == 3


def test_a_disk_that_became_read_only(disk: Path):
    """As file systems do after an error of the device."""
    save(disk, 1)
    save(disk, 2)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert_save_fails(disk, 3, "Read-only file system")
    with pytest.raises(OutputError, match=r"cannot set aside the damaged .*Read-only file system"):
        set_aside(folder_of(disk, 2))


def test_a_limit_on_the_size_of_files(run_dir: Path):
    """As with a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert_save_fails(run_dir, 3, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(run_dir, 3)


# --- tensors that do not fit -------------------------------------------------------------------------------------


def bend(folder: Path, **changes: torch.Tensor | None) -> None:
    """Other tensors in a checkpoint that is whole otherwise; None: without."""
    tensors = tensors_in(folder) | changes
    progress = read_progress(folder)
    shutil.rmtree(folder)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    writer.save(folder.parent.parent, slices_of(kept), progress, GROUP, CheckpointOptions(keep_last=0))


BENT = {
    "type": ({"model.norm.weight": torch.zeros(16).half()}, "norm.weight needs torch.float32, found torch.float16"),
    "state": ({"optimizer.exp_avg.norm.weight": torch.zeros(3)}, r"exp_avg.norm.weight needs shape \(16,\) or one"),
    "state's type": ({"optimizer.step.norm.weight": torch.zeros((), dtype=torch.bool)}, "found torch.bool"),
    "no state": ({"optimizer.exp_avg_sq.norm.weight": None}, "optimizer's exp_avg_sq of norm.weight is missing"),
    "average": ({"ema.norm.weight": torch.zeros(2)}, r"norm.weight needs shape \(16,\), found shape \(2,\)"),
    "beginning": ({"ema_began": torch.zeros(4)}, "ema_began needs one int64"),
}


@pytest.mark.parametrize("what", BENT)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, what: str):
    """Before torch meets them in the middle of a step."""
    changes, message = BENT[what]
    model = tiny_decoder()
    optimizer, ema = (
        make_optimizer(model.parameters(), OptimOptions()),
        Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9)),
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = writer.save(tmp_path, state_of(model, optimizer, ema), Progress(step=1), GROUP, CheckpointOptions())
    bend(folder)
    load(folder, whole_slices(model, GROUP), optimizer, ema)
    bend(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder, whole_slices(model, GROUP), optimizer, ema)


def test_a_tensor_in_two_parts_is_refused(run_dir: Path):
    folder = folder_of(run_dir, 2)
    (part,) = parts_of(folder)
    names = [f"part-0000{rank}-of-00002.safetensors" for rank in range(2)]
    for name in names:
        shutil.copy(folder / PART, folder / name)
    (folder / PART).unlink()
    forge(folder, parts=[{**part, "file": name} for name in names])
    with pytest.raises(CheckpointError, match="which another part holds too"):
        tensors_in(folder, "model.")
