"""Finding the input: a fixed order, and nothing is left out without being counted."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launch import TRACE, launch
from preparing import texts_of, write

from data_prep import formats
from data_prep.__main__ import main
from data_prep.corpus import COMPRESSIONS, files_sha256
from data_prep.finding import LeftOut, Search
from data_prep.formats import endings_of
from hvdtrain.data.shards import read_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, EXIT_USAGE, ConfigError, DataError

TEXT = (".txt", ".jsonl")


def names(*inputs: Path, **search) -> list[str]:
    return [file.name for file in Search(**{"endings": TEXT, **search}).files(inputs)]


def said(*inputs: Path, **search) -> list[str]:
    """What a user is told of a search."""
    left_out = LeftOut()
    Search(**{"endings": TEXT, **search}, left_out=left_out).files(inputs)
    return list(left_out.sentences())


# --- by ending and by pattern ------------------------------------------------------------------------------------


def test_folders_are_searched_at_any_depth_in_the_order_of_names(tmp_path: Path):
    write(tmp_path, **{"b.txt": "b", "a/z.txt": "z", "a/b/c.txt": "c", "a.txt": "a", "note.md": "m", "B.txt": "B"})
    every = ["B.txt", "a.txt", "a/b/c.txt", "a/z.txt", "b.txt"]
    assert names(tmp_path) == every
    for globs, expected in {
        ("*.md",): ["note.md"],
        ("b*",): ["b.txt"],
        ("b*", "*.md", "*.txt"): [*every, "note.md"],  # each file once
        ("*",): [*every, "note.md"],
        ("a/*.txt",): ["a/z.txt"],
        ("a/*.txt", "note.*"): ["a/z.txt", "note.md"],
        ("a/**/*.txt",): ["a/b/c.txt", "a/z.txt"],
        ("**/c.txt",): ["a/b/c.txt"],
        ("[ab].txt",): ["a.txt", "b.txt"],  # an ending's case does not count, a pattern's does
    }.items():
        assert names(tmp_path, globs=globs) == expected, globs


def test_endings_are_found_in_capitals_and_compressed(tmp_path: Path):
    good = ["A.TXT", "B.Jsonl", "a.txt", "a.txt.bz2", "b.JSONL.GZ", "b.jsonl.xz", "c.txt.Zst"]
    write(tmp_path, **dict.fromkeys([*good, "a.md", "a.json", "a.gz", "a.txt.lz4", "a.tsv", "atxt", "a.txt~"], b"x"))
    for name in good:
        (tmp_path / name).write_bytes(b"x")
    assert names(tmp_path) == good
    assert set(good) <= set(names(tmp_path, endings=endings_of("text")))


def test_inputs_keep_the_order_in_which_they_are_given(tmp_path: Path):
    write(tmp_path, **{"b.txt": "b", "sub/a.txt": "a", "sub/c.txt": "c", "notes": "n"})
    assert names(tmp_path / "b.txt", tmp_path / "sub") == ["b.txt", "a.txt", "c.txt"]
    assert names(tmp_path / "sub", tmp_path / "notes") == ["a.txt", "c.txt", "notes"]  # a file needs no ending


@pytest.mark.parametrize("glob", ["", "/etc/*", "..", "a/../*"])
def test_a_pattern_that_leads_elsewhere_is_refused(tmp_path: Path, glob: str):
    with pytest.raises(ConfigError, match="is not a pattern for names below a folder"):
        names(write(tmp_path, **{"a.txt": "a"}), globs=[glob])


@pytest.mark.parametrize("glob", ["**", "[", "**/**", "a//b", "/"[1:] + "*/"])
def test_an_odd_pattern_is_no_crash(tmp_path: Path, glob: str):
    try:
        assert names(write(tmp_path, **{"a.txt": "a"}), globs=[glob]) == ["a.txt"]
    except DataError as error:
        assert f"no name matches {glob} (--glob)" in str(error)


def test_a_name_that_is_not_text(tmp_path: Path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"a")
    (file,) = Search(TEXT).files([tmp_path])
    assert file.read_all() == b"a"
    assert len(files_sha256([file])) == 64


# --- what is left out is told ------------------------------------------------------------------------------------


def test_files_of_other_endings_are_counted_by_them(tmp_path: Path):
    write(tmp_path, **{f"{n}/{n}.md": "m" for n in range(9)})
    write(tmp_path, **{"a.txt": "a", "b.PDF": "b", "c/d.pdf": "d", "README": "r", "x.tar.gz": b"x"})
    assert said(tmp_path) == [
        "13 files were not read: 9 .md, 2 .pdf, 1 without an ending, 1 .tar.gz; --glob names others"
    ]
    assert said(tmp_path, globs=["*.txt", "*.md"]) == ["4 files were not read: no --glob matches"]
    assert said(tmp_path / "a.txt") == []
    write(tmp_path, **{f"z.{letter}": "z" for letter in "abcd"})
    assert said(tmp_path) == [
        "17 files were not read: 9 .md, 2 .pdf, 1 without an ending, 1 .a, 1 .b, 3 others; --glob names others"
    ]


def test_what_is_hidden_is_left_out_unless_it_is_named(tmp_path: Path):
    hidden = [".ipynb_checkpoints/a.txt", ".git/objects/b.txt", "._a.txt", "sub/.DS_Store.txt"]
    write(tmp_path, **dict.fromkeys([*hidden, "a.txt", "sub/b.txt"], "x"))
    assert names(tmp_path) == names(tmp_path, globs=["*"]) == ["a.txt", "sub/b.txt"]
    assert said(tmp_path) == [
        "4 not read, hidden (give its name to --input, or a pattern that begins with a dot to --glob): "
        f"{tmp_path}/._a.txt, {tmp_path}/.git, {tmp_path}/.ipynb_checkpoints, ..."
    ]
    assert names(tmp_path / "._a.txt", tmp_path / ".git") == ["._a.txt", "objects/b.txt"]
    assert names(tmp_path, globs=["._*"]) == ["._a.txt"]
    assert names(tmp_path, globs=[".git/**/*.txt"]) == [".git/objects/b.txt"]
    write(tmp_path / ".cache", **{"c.txt": "c"})
    assert names(tmp_path / ".cache") == ["c.txt"]  # what is above the input does not matter


def test_exclude_is_by_name_of_file_or_folder_anywhere_below(tmp_path: Path):
    folder = write(
        tmp_path / "test", **{"a.txt": "a", "x/test/b.txt": "b", "x/c.txt": "c", "testing.txt": "d", "d/c.txt": "c"}
    )
    assert names(folder, exclude=["test"]) == ["a.txt", "d/c.txt", "testing.txt", "x/c.txt"]
    assert names(folder, exclude=["test", "c.txt"]) == ["a.txt", "testing.txt"]
    assert names(folder, globs=["*/*.txt"], exclude=["test"]) == ["d/c.txt", "x/c.txt"]
    assert said(folder, exclude=["test"]) == [f"1 not read, excluded: {folder}/x/test"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.md": "m"}, "no file that is read: none ends in .txt, .jsonl (1 file was not read: 1 .md; --glob names"),
        ({}, "no file that is read: none ends in .txt, .jsonl"),
        ({".a.txt": "x"}, "no file that is read: none ends in .txt, .jsonl (1 not read, hidden"),
        ({"x.txt": "", "y.txt": ""}, "the input is empty: 2 files, 0 bytes"),
    ],
)
def test_no_input_is_a_data_error(tmp_path: Path, files: dict[str, str], message: str):
    with pytest.raises(DataError) as caught:
        names(write(tmp_path, **files))
    assert message in str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_DATA


def test_what_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=f"input {tmp_path}/nowhere does not exist"):
        names(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(DataError, match=rf"input {tmp_path}/link is a link that leads nowhere \(gone\)"):
        names(tmp_path / "link")


# --- links -------------------------------------------------------------------------------------------------------


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    """As `find -L` and `rsync -L` do. Folders of links are how corpora are put together."""
    write(tmp_path, **{"in/a.txt": "a", "far/b.txt": "b", "far/deep/c.txt": "c", "one.txt": "1"})
    for name, target in {
        "in/linked": "../far",
        "in/one.txt": "../one.txt",
        "in/circle": ".",
        "far/back": "../in",
        "far/self": "self",
        "in/nowhere.txt": "gone.txt",
    }.items():
        (tmp_path / name).symlink_to(target)
    top = tmp_path / "in"
    assert names(top) == ["a.txt", "linked/b.txt", "linked/deep/c.txt", "one.txt"]
    assert said(top) == [
        f"2 not read, another name of what is read already: {top}/circle, {top}/linked/back",
        f"2 not read, a link that leads nowhere: {top}/linked/self -> self, {top}/nowhere.txt -> gone.txt",
    ]


def test_a_file_of_several_names_is_read_once(tmp_path: Path):
    write(tmp_path, **{"in/b.txt": "b", "in/sub/c.txt": "c", "far/x/d.txt": "d"})
    for name, target in {
        "a.txt": "b.txt",  # the file's own name counts, though the link's comes first
        "l1": "../far/x",
        "l2": "../far",  # holds x, which l1 was
        "l3": "sub",
        "m1.txt": "../far/x/d.txt",
    }.items():
        (tmp_path / "in" / name).symlink_to(target)
    top = tmp_path / "in"
    assert names(top) == ["b.txt", "l1/d.txt", "sub/c.txt"]
    assert said(top) == [f"4 not read, another name of what is read already: {top}/a.txt, {top}/l2/x, {top}/l3, ..."]
    # Where two folders are aligned file by file, each name has its place.
    assert names(top, every_name=True) == ["a.txt", "b.txt", "l1/d.txt", "m1.txt", "sub/c.txt"]
    os.link(top / "b.txt", top / "hard.txt")  # nobody can say which of these is a second name
    assert names(top) == ["b.txt", "hard.txt", "l1/d.txt", "sub/c.txt"]


@pytest.mark.parametrize("backwards", [False, True])
def test_of_several_links_the_first_by_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool):
    """A folder's entries come in another order on each file system."""
    scandir = os.scandir

    @contextmanager
    def in_order(folder: str) -> Iterator[list[os.DirEntry]]:
        with scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=backwards)

    write(tmp_path, **{"far/x.txt": "x", "in/a.txt": "a"})
    for letter in "bcd":
        (tmp_path / "in" / letter).symlink_to(tmp_path / "far")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", in_order)
        assert names(tmp_path / "in") == ["a.txt", "b/x.txt"]


def test_the_order_is_that_of_names_whatever_is_a_link(tmp_path: Path):
    write(tmp_path, **{"plain/b/x.txt": "x", "plain/a.txt": "a", "plain/c.txt": "c"})
    write(tmp_path, **{"linked/a.txt": "a", "far/x.txt": "x", "far/c.txt": "c"})
    (tmp_path / "linked/b").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "far/c.txt").rename(tmp_path / "c.txt")
    (tmp_path / "linked/c.txt").symlink_to(tmp_path / "c.txt")
    one, other = (Search(TEXT).files([tmp_path / name]) for name in ("plain", "linked"))
    assert [file.name for file in one] == [file.name for file in other] == ["a.txt", "b/x.txt", "c.txt"]
    assert files_sha256(one) == files_sha256(other)


# --- what is ours ------------------------------------------------------------------------------------------------


def test_what_this_program_wrote_is_no_input(tmp_path: Path):
    every = ("*",)
    write(
        tmp_path,
        **{
            "a.json": "a",
            "shards/manifest.json": '{\n "vocab_size": 300,\n "tokenizer_sha256": "00"}',
            "shards/tokenizer.json": "{}",
            "shards/train-00000.h5": "x",
            "shards/train-00000_001.h5": "x",
            "shards/mine.json": "kept",
            "begun/.parts/identity.json": "{}",
            "begun/tokenizer.json": "{}",
            "begun/val-00003.h5": "x",
            "data/t.json": "{}",
            "data/t.record.json": '{"kind": "bpe", "asked_vocab_size": 3}',
            "run/config.yaml": "x",
            "run/metrics.jsonl": "{}",
            "run/notes.json": "{}",
            "theirs/manifest.json": '{"name": "of another program"}',
            "theirs/tokenizer.json": "{}",
            "theirs/b.record.json": "{}",
            "theirs/b.json": "{}",
        },
    )
    kept = ["a.json", "shards/mine.json", "theirs/b.json", "theirs/b.record.json"]
    kept += ["theirs/manifest.json", "theirs/tokenizer.json"]
    assert names(tmp_path, globs=every) == names(tmp_path, endings=[".json"]) == kept
    (told,) = [line for line in said(tmp_path, globs=every) if "of this program" in line]
    assert told == (
        f"10 not read, of this program (shards, tokenizers, runs): {tmp_path}/begun/.parts, "
        f"{tmp_path}/begun/tokenizer.json, {tmp_path}/begun/val-00003.h5, ..."
    )


def test_what_the_command_itself_writes_is_no_input(tmp_path: Path):
    write(tmp_path, **{"in/a.json": "a", "in/out.json": "o", "in/sub/out.json": "kept", "other/x.json": "x"})
    (tmp_path / "by-link").symlink_to(tmp_path / "in")
    own = [tmp_path / "by-link" / "out.json"]
    assert names(tmp_path / "in", endings=[".json"], own=own) == ["a.json", "sub/out.json"]


# --- what is no file ---------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.txt")
    return tmp_path / "pipe.txt"


@pytest.fixture
def no_files(tmp_path: Path, pipe: Path):
    """A pipe, a socket, and a pipe by number, as <(zcat x) gives one."""
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "s.txt"))
        yield {f"/dev/fd/{reading}": "a pipe", pipe: "a pipe", tmp_path / "s.txt": "a socket", "/dev/null": "a device"}
    os.close(reading)
    os.close(writing)


def test_what_is_no_file_is_refused(no_files: dict, tmp_path: Path):
    for path, what in [*no_files.items(), ("-", "standard input"), ("/proc/version", "a file that does not tell its")]:
        with pytest.raises(ConfigError, match=rf"input {path} is {what}.*: write it to a file first") as caught:
            names(Path(path))
        assert caught.value.exit_code == EXIT_USAGE


def test_in_a_folder_it_is_counted(no_files: dict, tmp_path: Path):
    write(tmp_path, **{"a.txt": "a"})
    (tmp_path / "null.txt").symlink_to("/dev/null")
    assert names(tmp_path) == ["a.txt"]
    assert said(tmp_path) == [
        f"3 not read, a pipe, a socket or a device: {tmp_path}/null.txt, {tmp_path}/pipe.txt, {tmp_path}/s.txt"
    ]


# --- from the command line ---------------------------------------------------------------------------------------


def test_a_folder_that_holds_all_of_this(tmp_path: Path, byte: Path, capfd: pytest.CaptureFixture[str]):
    """The tokenizer and the shards are made within the folder that is read: twice the same, and all is said once."""
    folder = write(
        tmp_path / "all", **{"A.TXT": "a", "b.txt.gz": "b", "note.md": "m", ".hidden.txt": "h", "x/shards/c.txt": "c"}
    )
    (folder / "nowhere").symlink_to("gone")
    (folder / "hf.json").write_bytes(byte.read_bytes())  # somebody else's, without a record beside it
    make = ["tokenizer", "--input", folder, "--exclude", "hf.json", "--kind", "byte", "--out", folder / "t.json"]
    text = ["text", "--input", folder, "--tokenizer", folder / "hf.json", "--out", folder / "x/shards"]
    text += ["--val-fraction", "0"]
    for words in (make, make, text, text):
        assert main([str(word) for word in words]) == EXIT_OK
    assert [info.documents for info in read_manifest(folder / "x/shards").shards] == [3]
    told = capfd.readouterr()
    assert f"{folder}/t.json: kept, byte" in told.out
    assert f"{folder}/x/shards: already prepared from this input, kept" in told.out
    assert told.err.count("1 file was not read: 1 .md; --glob names others") == 4
    for line in (
        f"hidden (give its name to --input, or a pattern that begins with a dot to --glob): {folder}/.hidden.txt",
        f"1 not read, a link that leads nowhere: {folder}/nowhere -> gone",
        f"runs): {folder}/t.json, {folder}/t.record.json\n",
        f"7 not read, of this program (shards, tokenizers, runs): {folder}/hf.json, {folder}/t.json, "
        f"{folder}/t.record.json, ...",
    ):
        assert line in told.err


def test_aligned_folders_keep_a_name_of_each_file(tmp_path: Path, byte: Path):
    """Left out, the second name of a source would move all later ones to another target."""
    write(tmp_path, **{f"{side}/{name}.txt": f"{side} {name}\n" for side in ("src", "tgt") for name in "abc"})
    (tmp_path / "src/b.txt").unlink()
    (tmp_path / "src/b.txt").symlink_to("a.txt")
    words = f"pairs --source {tmp_path}/src --target {tmp_path}/tgt --tokenizer {byte} --out {tmp_path}/out"
    assert main([*words.split(), "--val-fraction", "0"]) == EXIT_OK
    assert texts_of(tmp_path / "out", "train", "source_") == ["src a", "src a", "src c"]
    assert texts_of(tmp_path / "out", "train", "target_") == ["tgt a", "tgt b", "tgt c"]


@pytest.mark.parametrize("command", ["tokenizer", "text", "pairs", "labels"])
def test_help_tells_how_each_file_is_read(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(formats.FORMATS, ".odd", {command: "odd numbers only"})  # made from the readers' own table
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    for ending in formats.endings_of(command):
        assert any(line.split() == [ending, *formats.FORMATS[ending][command].split()] for line in lines), ending
    assert "  .odd    odd numbers only" in lines
    assert f"  each also in upper case, and compressed: {' '.join(COMPRESSIONS)}" in lines
    prose = " ".join(" ".join(lines).split())
    for word in ("hidden", "Links", "order", "pipes", "--long=31", "--glob", "this program wrote"):
        assert word in prose


@pytest.mark.parametrize("command", ["text", "tokenizer"])
def test_a_pipe_is_refused_in_one_sentence(tmp_path: Path, byte: Path, command: str):
    """It was read as empty: its size is 0."""
    tokenizer = "" if command == "tokenizer" else f"--tokenizer {byte}"
    words = f"{sys.executable} -m data_prep {command} --input /dev/stdin {tokenizer} --out {tmp_path}/out"
    done = launch(program=("sh", "-c", f"echo text | {words}"))
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (EXIT_USAGE, 1, False), done
    assert "input /dev/stdin is a pipe; input is read more than once" in done.messages[0]
