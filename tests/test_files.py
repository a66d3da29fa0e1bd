"""A file system that fails for a moment: what is tried again, what is done without, and what is an error after all."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvdtrain import files
from hvdtrain.errors import CheckpointError, OutputError


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting, and nothing noted by tests before; the pauses that would have been."""
    waited: list[float] = []
    monkeypatch.setattr(files, "sleep", waited.append)
    monkeypatch.setattr(files, "_troubles", files.Counter())
    return waited


def failing(numbers: list[int], work: Callable = lambda *_: "done") -> Callable:
    """``work``, which first fails with each of these numbers in turn."""
    left = list(numbers)

    def fails(*args, **named):
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return work(*args, **named)

    return fails


def test_what_may_pass_is_tried_for_seven_seconds(pauses: list[float], capsys: pytest.CaptureFixture[str]):
    assert files.again(failing([errno.ESTALE, errno.EIO, errno.ESTALE, errno.ESHUTDOWN]), "x") == "done"
    assert sum(pauses) == pytest.approx(7.0)
    assert pauses == sorted(pauses)
    assert files.troubles() == {
        "x: Stale file handle; tried again": 2,
        "x: Input/output error; tried again": 1,
        "x: Cannot send after transport endpoint shutdown; tried again": 1,
    }
    assert capsys.readouterr().err.count("Stale file handle") == 1  # said once, however often
    with pytest.raises(OSError, match="Stale file handle"):
        files.again(failing([errno.ESTALE] * 5), "x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.EPERM])
def test_what_stays_is_an_error_at_once(pauses: list[float], number: int):
    with pytest.raises(OSError) as caught:
        files.again(failing([number]), "x")
    assert (caught.value.errno, pauses, files.troubles()) == (number, [], {})
    assert files.again(failing([number]), "x", also=(number,)) == "done"


def test_a_look_is_not_worth_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Path.exists raises ESTALE and EIO: a stop file that could not be looked for once ended the run with exit 70."""
    (tmp_path / "stop").touch()
    assert files.seen(tmp_path / "stop")
    assert not files.seen(tmp_path / "go")
    assert not files.seen(tmp_path / "stop" / "file")
    assert files.troubles() == {}
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", failing([errno.ESTALE, errno.EIO, errno.EACCES], stat))
    assert [files.seen(tmp_path / "stop") for _ in range(4)] == [False, False, False, True]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"hvdtrain: note: cannot look for {tmp_path}/stop: Stale file handle; went on without"
    assert len(said) == len(files.troubles()) == 3
    for error in (OutputError("no disk"), CheckpointError("no list")):

        def fails(error: Exception = error) -> None:
            raise error

        assert files.optional(fails, "cannot", 5) == 5
    assert files.troubles()["cannot: no disk; went on without"] == 1


def test_a_look_that_must_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Absence decides: a manifest that is taken for missing has its shards made anew."""
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", failing([errno.EIO] * 4, stat))
    assert files.exists(tmp_path)
    monkeypatch.setattr(Path, "stat", failing([errno.EIO] * 5, stat))
    with pytest.raises(OutputError, match=r"cannot look at .*: Input/output error"):
        files.exists(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Path.glob takes one that it may not read for empty: a run whose checkpoints it did not see began at step 0."""
    for name in ("b-2", "b-10", "a-1"):
        (tmp_path / name).touch()
    assert [path.name for path in files.listed(tmp_path, "b-*")] == ["b-10", "b-2"]
    assert files.listed(tmp_path / "nowhere") == []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", failing([errno.EACCES], listdir))
    assert len(files.listed(tmp_path)) == 3
    monkeypatch.setattr(os, "listdir", failing([errno.EACCES] * 5, listdir))
    with pytest.raises(PermissionError):
        files.listed(tmp_path)


@pytest.fixture(params=["write_text", "open", "fsync", "replace", "sync_folder"])
def troubled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[int]], None]]:
    """Has each thing that ``write`` does fail in turn."""
    place = {
        "write_text": (Path, "write_text"),
        "open": (os, "open"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "sync_folder": (files, "sync_folder"),
    }[request.param]
    before = getattr(*place)

    def fail_with(numbers: list[int]) -> None:
        monkeypatch.setattr(*place, failing(numbers, before))

    return fail_with


def test_a_write_is_done_again_from_its_beginning(tmp_path: Path, troubled: Callable):
    """An fsync that failed once says the next time that all is well, and has lost what it could not write."""
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    filled = []

    def fill(temporary: Path) -> None:
        assert not temporary.exists()
        filled.append(temporary)
        temporary.write_text("whole", encoding="utf-8")

    troubled([errno.EIO])
    files.write(path, fill)
    assert len(filled) == 2
    assert path.read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert len(files.troubles()) == 1
    troubled([errno.ESTALE] * 5)
    with pytest.raises(OutputError, match=r"cannot write .*x\.json: Stale file handle"):
        files.write(path, lambda temporary: temporary.write_text("other", encoding="utf-8"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    troubled([errno.ENOSPC])
    with pytest.raises(OutputError, match=r"cannot write .*x\.json: No space left"):
        files.write(path, lambda temporary: temporary.write_text("other", encoding="utf-8"))


def test_a_rename_that_took_place_and_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As over NFS, whose server has done what the client asks for once more."""
    replace = os.replace

    def done_but(source: Path, target: Path) -> None:
        replace(source, target)
        monkeypatch.setattr(os, "replace", replace)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    (tmp_path / "partial").mkdir()
    monkeypatch.setattr(os, "replace", done_but)
    files.move_folder(tmp_path / "partial", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    with pytest.raises(FileNotFoundError):
        files.move_folder(tmp_path / "partial", tmp_path / "other")


def test_a_file_system_that_flushes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", failing([errno.EINVAL], os.fsync))
    files.sync_folder(tmp_path)
    assert len(files.troubles()) == 1
    monkeypatch.setattr(os, "fsync", failing([errno.EIO], os.fsync))
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(tmp_path)
