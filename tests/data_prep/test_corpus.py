"""Finding and reading the input: a fixed order, whole files, and an error that names file and byte."""

from pathlib import Path

import pytest

from data_prep.corpus import corpus_sha256, documents, find_files, read_text
from hvdtrain.errors import EXIT_BAD_DATA, ConfigError, DataError


def write(folder: Path, **files: str) -> Path:
    """``write(folder, **{"a/b.txt": "text"})``"""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def names(inputs: list[Path], glob: str = "*.txt", exclude=()) -> list[str]:
    return [file.name for file in find_files(inputs, glob, list(exclude))]


def test_folders_are_searched_at_any_depth_in_the_order_of_names(tmp_path: Path):
    write(tmp_path, **{"b.txt": "b", "a/z.txt": "z", "a/b/c.txt": "c", "a.txt": "a", "note.md": "m", "B.txt": "B"})
    assert names([tmp_path]) == ["B.txt", "a.txt", "a/b/c.txt", "a/z.txt", "b.txt"]
    assert names([tmp_path], "*.md") == ["note.md"]
    assert names([tmp_path], "b*") == ["b.txt"]
    assert names([tmp_path], "*") == ["B.txt", "a.txt", "a/b/c.txt", "a/z.txt", "b.txt", "note.md"]


def test_inputs_keep_the_order_in_which_they_are_given(tmp_path: Path):
    write(tmp_path, **{"b.txt": "b", "sub/a.txt": "a", "sub/c.txt": "c", "notes": "n"})
    assert names([tmp_path / "b.txt", tmp_path / "sub"]) == ["b.txt", "a.txt", "c.txt"]
    assert names([tmp_path / "sub", tmp_path / "notes"]) == ["a.txt", "c.txt", "notes"]  # a file needs no pattern


def test_exclude_is_by_name_of_file_or_folder_anywhere_below(tmp_path: Path):
    write(tmp_path / "test", **{"a.txt": "a", "x/test/b.txt": "b", "x/c.txt": "c", "testing.txt": "d", "d/c.txt": "c"})
    assert names([tmp_path / "test"], exclude=["test"]) == ["a.txt", "d/c.txt", "testing.txt", "x/c.txt"]
    assert names([tmp_path / "test"], exclude=["test", "c.txt"]) == ["a.txt", "testing.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "nowhere", "input {f}/nowhere does not exist"),
        (lambda f: write(f, **{"x.md": "m"}), "input folder {f} has no file that matches '*.txt'"),
        (lambda f: write(f / "empty", **{"x.txt": "", "y.txt": ""}), "the input is empty: 2 files, 0 bytes"),
        (lambda f: f, "input folder {f} has no file that matches '*.txt'"),
    ],
    ids=["missing", "no match", "all empty", "empty folder"],
)
def test_no_input_is_a_data_error(tmp_path: Path, make, message: str):
    with pytest.raises(DataError) as caught:
        find_files([make(tmp_path)], "*.txt", [])
    assert message.format(f=tmp_path) in str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_DATA


@pytest.mark.parametrize("glob", ["", "/etc/*", "..", "**", "a/../*", "["])
def test_an_odd_pattern_is_no_crash(tmp_path: Path, glob: str):
    write(tmp_path, **{"a.txt": "a"})
    try:
        assert set(names([tmp_path], glob)) <= {"a.txt"}
    except (ConfigError, DataError) as error:
        assert repr(glob) in str(error)


def test_every_byte_is_kept(tmp_path: Path):
    text = "\ufeffline\r\nwindows\rmac\n\tzero\u200bwidth e\u0301 \U0001f468\u200d\U0001f469 漢字\u3000\n\n"
    write(tmp_path, **{"a.txt": text, "b.txt": "", "c.txt": " "})
    raw = read_text(tmp_path / "a.txt")
    assert (raw if isinstance(raw, bytes) else raw.encode()) == text.encode()
    assert list(documents(find_files([tmp_path], "*.txt", []))) == [text, " "]  # an empty file is no document


def test_a_binary_file_is_named_with_the_byte(tmp_path: Path):
    (tmp_path / "x.txt").write_bytes(b"abc\0def")
    with pytest.raises(DataError, match=r"x\.txt is a binary file: zero byte at byte 3"):
        read_text(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"caf\xe9 au lait", "byte 3 is 0xe9"),
        ("日本".encode()[:-1], "byte 3 is 0xe6"),
        (b"\xed\xa0\x80", "byte 0 is 0xed"),
        ("x".encode("utf-16"), "zero byte at byte 3"),
    ],
    ids=["latin-1", "cut short", "a surrogate", "UTF-16"],
)
def test_what_is_not_utf8_is_named_with_the_byte(tmp_path: Path, raw: bytes, message: str):
    (tmp_path / "x.txt").write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_text(tmp_path / "x.txt")
    assert str(tmp_path / "x.txt") in str(caught.value)


def test_a_file_that_vanishes_is_named(tmp_path: Path):
    files = find_files([write(tmp_path, **{"a.txt": "a"})], "*.txt", [])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file"):
        list(documents(files))
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file"):
        corpus_sha256(files)


def test_a_corpus_is_known_again(tmp_path: Path):
    def digest(name: str, **files: str) -> str:
        return corpus_sha256(find_files([write(tmp_path / name, **files)], "*.txt", []))

    first = digest("1", **{"a.txt": "x", "b.txt": "y"})
    assert digest("2", **{"a.txt": "x", "b.txt": "y"}) == first  # wherever it lies
    others = [{"a.txt": "xy", "b.txt": ""}, {"a.txt": "y", "b.txt": "x"}, {"a.txt": "x"}, {"a.txt": "x", "c.txt": "y"}]
    digests = [digest(f"o{n}", **files) for n, files in enumerate(others)]
    assert len({first, *digests}) == 5
