"""Finding and opening the input: a fixed order, plain or compressed, and an error that names the file."""

import io
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from preparing import compressed, files_of, write

from data_prep.corpus import COMPRESSIONS, DEFAULT_GLOBS, InputFile, files_sha256, find_files, globs_of
from hvdtrain.errors import EXIT_BAD_DATA, ConfigError, DataError


def names(inputs: list[Path], globs=("*.txt",), exclude=()) -> list[str]:
    return [file.name for file in find_files(inputs, globs, exclude)]


# --- finding -----------------------------------------------------------------------------------------------------


def test_folders_are_searched_at_any_depth_in_the_order_of_names(tmp_path: Path):
    write(tmp_path, **{"b.txt": "b", "a/z.txt": "z", "a/b/c.txt": "c", "a.txt": "a", "note.md": "m", "B.txt": "B"})
    assert names([tmp_path]) == ["B.txt", "a.txt", "a/b/c.txt", "a/z.txt", "b.txt"]
    assert names([tmp_path], ["*.md"]) == ["note.md"]
    assert names([tmp_path], ["b*"]) == ["b.txt"]
    assert names([tmp_path], ["b*", "*.md", "*.txt"]) == names([tmp_path], ["*"])  # each file once
    assert names([tmp_path], ["*"]) == ["B.txt", "a.txt", "a/b/c.txt", "a/z.txt", "b.txt", "note.md"]
    assert names([tmp_path], ["a/*.txt"]) == ["a/z.txt"]
    assert names([tmp_path], ["a/*.txt", "note.*"]) == ["a/z.txt", "note.md"]


def test_without_a_pattern_text_and_jsonl_are_taken_plain_or_compressed(tmp_path: Path):
    kinds = [f"{suffix}{packed}" for suffix in (".txt", ".jsonl") for packed in ("", ".gz", ".zst", ".xz", ".bz2")]
    write(tmp_path, **{f"a{kind}": "x" for kind in [*kinds, ".md", ".json", ".gz", ".txt.lz4", ".tsv"]})
    assert names([tmp_path], DEFAULT_GLOBS) == sorted(f"a{kind}" for kind in kinds)
    assert globs_of(".tsv") == ["*.tsv", "*.tsv.gz", "*.tsv.zst", "*.tsv.xz", "*.tsv.bz2"]


def test_inputs_keep_the_order_in_which_they_are_given(tmp_path: Path):
    write(tmp_path, **{"b.txt": "b", "sub/a.txt": "a", "sub/c.txt": "c", "notes": "n"})
    assert names([tmp_path / "b.txt", tmp_path / "sub"]) == ["b.txt", "a.txt", "c.txt"]
    assert names([tmp_path / "sub", tmp_path / "notes"]) == ["a.txt", "c.txt", "notes"]  # a file needs no pattern


def test_exclude_is_by_name_of_file_or_folder_anywhere_below(tmp_path: Path):
    write(tmp_path / "test", **{"a.txt": "a", "x/test/b.txt": "b", "x/c.txt": "c", "testing.txt": "d", "d/c.txt": "c"})
    assert names([tmp_path / "test"], exclude=["test"]) == ["a.txt", "d/c.txt", "testing.txt", "x/c.txt"]
    assert names([tmp_path / "test"], exclude=["test", "c.txt"]) == ["a.txt", "testing.txt"]
    assert names([tmp_path / "test"], ["*/*.txt"], exclude=["test"]) == ["d/c.txt", "x/c.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "nowhere", "input {f}/nowhere does not exist"),
        (lambda f: write(f, **{"x.md": "m"}), "input folder {f} has no file that matches *.txt or *.jsonl (--glob)"),
        (lambda f: write(f / "empty", **{"x.txt": "", "y.txt": ""}), "the input is empty: 2 files, 0 bytes"),
        (lambda f: f, "input folder {f} has no file that matches *.txt or *.jsonl (--glob)"),
    ],
    ids=["missing", "no match", "all empty", "empty folder"],
)
def test_no_input_is_a_data_error(tmp_path: Path, make, message: str):
    with pytest.raises(DataError) as caught:
        find_files([make(tmp_path)], ["*.txt", "*.jsonl"])
    assert message.format(f=tmp_path) in str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_DATA


@pytest.mark.parametrize("glob", ["", "/etc/*", "..", "**", "a/../*", "["])
def test_an_odd_pattern_is_no_crash(tmp_path: Path, glob: str):
    write(tmp_path, **{"a.txt": "a"})
    try:
        assert set(names([tmp_path], [glob])) <= {"a.txt"}
    except ConfigError as error:
        assert repr(glob) in str(error)
    except DataError as error:
        assert f"matches {glob} (--glob)" in str(error)


def test_links_lead_to_files_but_not_in_circles(tmp_path: Path):
    write(tmp_path, **{"in/a.txt": "a", "elsewhere/b.txt": "b"})
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "nowhere.txt").symlink_to(tmp_path / "gone.txt")
    assert names([tmp_path / "in"]) == ["a.txt", "b.txt"]


def test_a_name_that_is_not_text(tmp_path: Path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"a")
    (file,) = find_files([tmp_path])
    assert file.read_all() == b"a"
    assert len(files_sha256([file])) == 64


# --- opening -----------------------------------------------------------------------------------------------------


def test_suffix_and_compression():
    kinds = {name: InputFile(Path(name), name, 1, 0) for name in ("a.jsonl", "a.jsonl.gz", "a.b.txt.xz", "a", "a.zst")}
    assert [(file.suffix, file.compression) for file in kinds.values()] == [
        (".jsonl", ""), (".jsonl", ".gz"), (".txt", ".xz"), ("", ""), ("", ".zst"),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["", *COMPRESSIONS])
def test_every_byte_is_kept(tmp_path: Path, suffix: str):
    text = "\ufeffline\r\nwindows\rmac\n\tzero\u200bwidth e\u0301 \U0001f468\u200d\U0001f469 漢字\u3000\n\n" * 3000
    (file,) = files_of(write(tmp_path, **{f"a.txt{suffix}": text}))
    assert file.read_all() == text.encode()
    with file.open() as handle:  # in odd parts
        assert b"".join(iter(lambda: file.read(handle, 777), b"")) == text.encode()
        assert file.read(handle, 5) == b""  # and nothing after the end


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_several_streams_in_one_file_are_one_text(tmp_path: Path, suffix: str):
    """`cat a.gz b.gz`, and what pigz, pzstd and bgzip write; an empty one too."""
    (tmp_path / f"a.txt{suffix}").write_bytes(b"".join(compressed(part, suffix) for part in (b"one ", b"", b"two")))
    (file,) = files_of(tmp_path)
    assert file.read_all() == b"one two"


def test_a_frame_of_unknown_length_and_one_to_be_skipped(tmp_path: Path):
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:
        writer.write(b"text")
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    (tmp_path / "a.txt.zst").write_bytes(skipped + stream.getvalue() + skipped)
    assert files_of(tmp_path)[0].read_all() == b"text"


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut", "last byte", "flipped", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, damage: str):
    """zstandard's own reader takes a file that was cut off for one that ended: half a corpus, and nobody told."""
    whole = compressed(random.Random(1).randbytes(3000).hex().encode(), suffix)
    damaged = {
        "cut": whole[: len(whole) // 2],
        "last byte": whole[:-1],
        "flipped": whole[:40] + bytes(255 - byte for byte in whole[40:60]) + whole[60:],
        "not compressed": b"This is text, in spite of its name.\n",
    }[damage]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damaged)
    (file,) = files_of(path)
    with pytest.raises(DataError, match=f"cannot read {path}: "):
        file.read_all()


def test_a_file_that_vanishes_is_named(tmp_path: Path):
    for suffix in ("", *COMPRESSIONS):
        (file,) = files_of(write(tmp_path, **{f"a.txt{suffix}": "a"}) / f"a.txt{suffix}")
        file.path.unlink()
        with pytest.raises(DataError, match=rf"cannot read {file.path}: No such file"):
            file.read_all()


# --- knowing again -----------------------------------------------------------------------------------------------


def test_a_corpus_is_known_again(tmp_path: Path):
    def digest(name: str, **files: str) -> str:
        return files_sha256(find_files([write(tmp_path / name, **files)]))

    first = digest("1", **{"a.txt": "x", "b.txt": "y"})
    assert digest("2", **{"a.txt": "x", "b.txt": "y"}) == first  # wherever it lies, and whenever it was written
    others = [{"a.txt": "xy", "b.txt": ""}, {"a.txt": "x"}, {"a.txt": "x", "c.txt": "y"}, {"a.txt": "x", "b.txt": "yz"}]
    digests = [digest(f"o{n}", **files) for n, files in enumerate(others)]
    assert len({first, *digests}) == 5


def test_split_time_and_partner_tell_files_apart(tmp_path: Path):
    (file,) = files_of(write(tmp_path, **{"a.txt": "x"}) / "a.txt")
    others = [
        file,
        replace(file, split="val"),
        replace(file, partner=file),
        replace(file, partner=replace(file, bytes=9)),
    ]
    assert len({files_sha256([one]) for one in others}) == 4
    later = replace(file, mtime_ns=file.mtime_ns + 1)
    assert files_sha256([later]) == files_sha256([file])
    assert files_sha256([later], with_time=True) != files_sha256([file], with_time=True)
    pair, later_pair = replace(file, partner=file), replace(file, partner=later)
    assert files_sha256([later_pair], with_time=True) != files_sha256([pair], with_time=True)
