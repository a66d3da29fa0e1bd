"""A full disk, files that may not be read or written, options that cannot be: an exit code and one message."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import DATA_PREP, TRACE, Done, launch, succeed
from not_here import not_here, small_disk
from preparing import snapshot, write

from data_prep.__main__ import main


def fails(exit_code: int, *words: Any, **how: Any) -> str:
    """The one message of a command that must end with ``exit_code``."""
    done: Done = launch(*words, program=how.pop("program", DATA_PREP), timeout_s=50, **how)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (exit_code, 1, False), done
    return done.messages[0]


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "2m") as folder:
        yield folder


def test_a_full_disk_ends_the_work_which_is_gone_on_with(disk: Path, tmp_path: Path, byte: Path):
    """1.5 million tokens of 2 bytes do not fit into 2 MB; what was finished before is kept."""
    write(tmp_path / "in", **{"a.txt": "one line of text\n" * 90_000})
    words = ["text", "--input", tmp_path / "in", "--documents", "line", "--tokenizer", byte, "--val-fraction", 0]
    words += ["--shard-tokens", 100_000, "--out"]
    out = disk / "out"
    for how, ranks in (("none", 1), ("mpirun", 2)):
        done = launch(*words, out, program=DATA_PREP, how=how, ranks=ranks, timeout_s=50)
        messages = [message for message in done.messages if "going on with" not in message]
        assert (done.exit_code, TRACE in done.text) == (74, False), done
        assert 1 <= len(messages) <= ranks  # both may meet it at once
        assert all(f"OutputError: cannot write {out}/" in message for message in messages)
        assert all("No space left on device" in message for message in messages)
        assert not list(out.glob("*manifest*"))
        assert not list(out.glob("**/.*.tmp"))
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.h5")}
    assert len(kept) >= 5
    assert {f"{name[-8:-3]}.json" for name in kept} == {path.name for path in out.glob(".parts/[0-9]*.json")}
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True, timeout=10)
    succeed(*words, out, program=DATA_PREP)
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in kept} == kept
    succeed(*words, tmp_path / "whole", program=DATA_PREP)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_disk_without_any_room(disk: Path, tmp_path: Path, byte: Path):
    write(tmp_path / "in", **{"a.txt": "text"})
    with open(disk / "fill", "wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    message = fails(74, "text", "--input", tmp_path / "in", "--tokenizer", byte, "--out", disk / "out")
    assert "OutputError: cannot write" in message
    assert "No space left on device" in message


# --- what may not be read or written -----------------------------------------------------------------------------


@pytest.fixture
def as_user() -> tuple[Any, ...]:
    """The program without the rights that let root read and write everything."""
    if os.geteuid():
        return DATA_PREP
    if not shutil.which("setpriv"):
        not_here("root may read everything, and there is no setpriv to take that from it")
    rights = "-dac_override,-dac_read_search"
    return ("setpriv", "--inh-caps", rights, "--bounding-set", rights, *DATA_PREP)


@pytest.mark.parametrize(
    ("closed", "exit_code", "message"),
    [
        ("in/b.txt", 65, "DataError: cannot read {f}/in/b.txt: Permission denied"),
        ("in/sub", 65, "DataError: cannot read {f}/in/sub: Permission denied"),  # not passed over in silence
        ("in", 65, "DataError: cannot read {f}/in: Permission denied"),
        ("tokenizer.json", 65, "DataError: cannot read tokenizer {f}/tokenizer.json: Permission denied"),
        ("out", 74, "OutputError: cannot write to {f}/out: Permission denied"),
    ],
)
def test_what_is_closed_is_named(
    tmp_path: Path, byte: Path, as_user: tuple[Any, ...], closed: str, exit_code: int, message: str
):
    write(tmp_path, **{"in/a.txt": "a", "in/b.txt": "b", "in/sub/c.txt": "c"})
    shutil.copy(byte, tmp_path / "tokenizer.json")
    (tmp_path / "out").mkdir()
    mode = (tmp_path / closed).stat().st_mode
    (tmp_path / closed).chmod(0)
    words = ["text", "--input", tmp_path / "in", "--tokenizer", tmp_path / "tokenizer.json", "--out", tmp_path / "out"]
    try:
        assert message.format(f=tmp_path) in fails(exit_code, *words, program=as_user)
    finally:
        (tmp_path / closed).chmod(mode)


# --- what the words say ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # main() sets it where it is not


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        ("text --input {a} --tokenizer {t} --out {o} --val-split tail", 2, "use --val-split hash"),
        ("text --input {a} --tokenizer {t} --out {o} --documents lines", 2, "invalid choice"),
        ("text --input {a} --tokenizer {t} --out {o} --shard-tokens 0", 2, "--shard-tokens: invalid positive number"),
        (
            "pairs --tokenizer {t} --out {o}",
            2,
            "give either --source and --target, or --input with tables or JSON lines",
        ),
        ("pairs --source {b} --target {b} --input {c} --tokenizer {t} --out {o}", 2, "give either --source and"),
        ("pairs --source {b} --tokenizer {t} --out {o}", 2, "--source names 1 files but --target 0"),
        ("pairs --source {b} --target {b} --val-source {b} --tokenizer {t} --out {o}", 2, "--val-source names 1 files"),
        ("labels --input {c} {d} --tokenizer {t} --out {o}", 2, "SQuAD .json and labelled tables in one folder"),
        ("labels --input {c} --tokenizer {t} --out {o} --max-tokens 3", 2, "--max-tokens 3 leaves no room for text"),
        ("labels --input {d} --tokenizer {t} --out {o} --max-tokens 60", 2, "--max-tokens 60 leaves no room for text"),
        ("labels --input {c} --tokenizer {t} --out {o} --text-field body", 2, "unrecognized arguments: --text-field"),
        (
            "labels --input {c} --tokenizer {t} --out {o} --field body",
            65,
            "has no column 'body'; it has: 'label', 'text'",
        ),
        ("text --input {e} --tokenizer {t} --out {o}", 65, "e.txt.gz: Compressed file ended before the end-of-stream"),
        ("verify {o}", 65, "there is no such folder"),
        ("verify", 2, "the following arguments are required: DIR"),
        ("count", 2, "invalid choice"),
    ],
)
def test_wrong_words(
    tmp_path: Path, byte: Path, capfd: pytest.CaptureFixture, words: str, exit_code: int, message: str
):
    write(
        tmp_path,
        **{
            "a.txt.gz": "text",
            "b": "line\n",
            "c.tsv": "label\ttext\n1\tx\n",
            "d.json": '{"data": []}',
            "e.txt.gz": "e",
        },
    )
    os.truncate(tmp_path / "e.txt.gz", 15)
    names = {path.name[0]: path for path in tmp_path.iterdir()}
    assert main(words.format_map({**names, "t": byte, "o": tmp_path / "out"}).split()) == exit_code
    output = capfd.readouterr()
    assert (output.out, output.err.count("hvdtrain: "), TRACE in output.err) == ("", 1, False)
    assert message in output.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_files_of_a_folder_may_be_chosen_for_labels_too(tmp_path: Path, byte: Path, capfd: pytest.CaptureFixture):
    """--glob was once overruled there."""
    write(
        tmp_path / "in",
        **{"a.tsv": "label\ttext\n1\tx\n", "b.txt": "label\ttext\n2\ty\n", "c.tsv.gz": "label\ttext\n3\tz\n"},
    )
    words = f"labels --input {tmp_path}/in --tokenizer {byte} --val-fraction 0 --out {tmp_path}".split()
    assert main([*words[:-1], f"{words[-1]}/o1"]) == 0
    assert "2 labels: 1, 3\n" in capfd.readouterr().out
    assert main([*words[:-1], f"{words[-1]}/o2", "--glob", "*.txt"]) == 0
    assert "1 labels: 2\n" in capfd.readouterr().out
