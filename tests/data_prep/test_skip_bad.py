"""What cannot be used is refused, or with --skip-bad left out, counted and named; the same for any number of ranks.

And what stands at a file's beginning: a byte order mark is no text, UTF-16 has a name.
"""

import codecs
import csv
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preparing import compressed, files_of, items_of, run, small_pieces, snapshot, write

from data_prep.__main__ import main
from data_prep.aligned import AlignedReader
from data_prep.bad import NAMED, Counts
from data_prep.labels import LabelsKind
from data_prep.pairs import PairsKind
from data_prep.readers import Reader, TextReader
from data_prep.tables import TableReader
from data_prep.text import TextKind
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.data.shards import read_manifest
from hvdtrain.errors import ConfigError, DataError

SUFFIXES = ("", ".gz")
GOOD = [f"good text {n} é" for n in range(40)]


def table(folder: Path, name: str, **how: Any) -> TableReader:
    return TableReader(files_of(folder / name), ["label", "text"], label="label", **how)


def sides(folder: Path, name: str, **how: Any) -> AlignedReader:
    return AlignedReader(files_of(folder / name), files_of(folder / f"{name}.other"), **how)


def text(documents: str) -> Callable[..., Reader]:
    return lambda folder, name, **how: TextReader(files_of(folder / name), documents, **how)


# Reader -> how it is made, its good items in a file and as items, what is bad in its place, and as what it is counted.
LATIN = "café".encode("latin-1")
READERS: dict[str, tuple[Callable[..., Reader], Callable[[str], bytes], list[tuple[bytes, str]], bytes]] = {
    "line": (text("line"), lambda t: t.encode() + b"\n", [(LATIN + b"\n", "utf8"), (b"a\0b\n", "zero")], b""),
    "blank-line": (text("blank-line"), lambda t: t.encode() + b"\n\n", [(LATIN + b"\nmore\n\n", "utf8")], b""),
    "jsonl": (
        text("file"),
        lambda t: json.dumps({"text": t}).encode() + b"\n",
        [
            (b"{]\n", "json"),
            (b'["a"]\n', "json"),
            (b'{"text": NaN}\n', "field"),
            (b'{"body": ""}\n', "field"),
            (b'{"text": "' + LATIN + b'"}\n', "utf8"),
            (b'{"text": "a\0"}\n', "zero"),
            (b'{"text": "\\u0000"}\n', "zero"),
            (b'{"text": "\\ud800"}\n', "surrogate"),
        ],
        b"",
    ),
    "table": (
        table,
        lambda t: f"{t}\t1\n".encode(),
        [
            (b"one cell\n", "cells"),
            (b"a\tfragment\t1\n", "cells"),
            (b"a\t\n", "label"),
            (LATIN + b"\t1\n", "utf8"),
            (b"\0\t1\n", "zero"),
        ],
        b"text\tlabel\n",
    ),
    "csv": (
        table,
        lambda t: f'"{t}",1\n'.encode(),
        [
            (b"one cell\n", "cells"),
            (b"a,fragment,1\n", "cells"),
            (b"a,\n", "label"),
            (LATIN + b",1\n", "utf8"),
            (b"\0,1\n", "zero"),
        ],
        b"text,label\n",
    ),
    "pairs": (sides, lambda t: t.encode() + b"\n", [(LATIN + b"\n", "utf8"), (b"\0\n", "zero")], b""),
}
NAMES = {"jsonl": "a.jsonl", "table": "a.tsv", "csv": "a.csv"}


def mixed(folder: Path, kind: str, suffix: str = "") -> tuple[str, Counter, list[int]]:
    """A file with bad among good: (its name, what is bad in it, where each bad item begins)."""
    _, good, bads, head = READERS[kind]
    content, expected, places = head, Counter(), []
    for number, one in enumerate(GOOD):
        content += good(one)
        if number % 3 == 0:
            bad, reason = bads[number // 3 % len(bads)]
            places.append(len(content))
            content += bad
            expected[f"bad_{reason}"] += 1
    name = NAMES.get(kind, "a.txt") + suffix
    write(folder, **{name: content})
    if kind == "pairs":
        write(folder, **{f"{name}.other": b"other\n" * content.count(b"\n")})
    return name, expected, places


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", READERS)
def test_what_is_bad_is_left_out_and_counted_by_kind(tmp_path: Path, kind: str, suffix: str):
    name, expected, places = mixed(tmp_path, kind, suffix)
    make = READERS[kind][0]
    extra = {"pairs": (b"other",), "table": (b"1",), "csv": (b"1",)}.get(kind, ())
    items = [(one.encode(), *extra) if kind == "pairs" else (*extra, one.encode()) for one in GOOD]
    for piece_bytes in (37, 1 << 20):
        counts = Counts()
        with small_pieces(piece_bytes):
            assert items_of(make(tmp_path, name, skip_bad=True), 100, counts) == items
        assert counts == expected
        assert len(counts.bad_items) == NAMED
        for message, place in zip(counts.bad_items, places, strict=False):
            assert message.startswith(str(tmp_path / name))
            assert (
                kind in ("csv", "blank-line") or f"byte {place}" in message or "is 0xe9" in message or "zero" in message
            )
    with pytest.raises(DataError, match=r"\(--skip-bad leaves out and counts what is bad\)"):
        items_of(make(tmp_path, name), 100)


def test_the_place_of_a_bad_byte_is_counted_from_the_files_beginning(tmp_path: Path):
    write(tmp_path, **{"a.txt": codecs.BOM_UTF8 + b"good\n" * 20 + b"caf\xe9\ngood\nx\0y\n"})
    for documents, piece_bytes in (("line", 16), ("line", 1 << 20), ("blank-line", 1 << 20)):
        counts = Counts()
        with small_pieces(piece_bytes):
            items_of(TextReader(files_of(tmp_path / "a.txt"), documents, skip_bad=True), 16, counts)
        wanted = ["byte 106 is 0xe9", "zero byte at byte 114"][documents != "line" :]  # all is one paragraph
        assert len(counts.bad_items) == len(wanted)
        assert all(place in message for place, message in zip(wanted, counts.bad_items, strict=True))


def test_equal_bad_lines_have_places_of_their_own(tmp_path: Path):
    write(tmp_path, **{"a.txt": b"caf\xe9\ncaf\xe9\ngood\n", "a.tsv": MARK + b"label\ttext\nx\nx\n1\tgood\n"})
    counts = Counts()
    items_of(TextReader(files_of(tmp_path / "a.txt"), "line", skip_bad=True), counts=counts)
    items_of(table(tmp_path, "a.tsv", skip_bad=True), counts=counts)
    assert [re.findall(r"byte (\d+)", message) for message in counts.bad_items] == [["3"], ["8"], ["14"], ["16"]]


@pytest.mark.parametrize("invalid", ["refuse", "replace"])
@pytest.mark.parametrize("documents", ["line", "blank-line", "file"])
def test_nothing_of_utf_16_is_left_wherever_it_is_cut(tmp_path: Path, documents: str, invalid: str):
    """Line by line some of it would pass: a line of one letter, or all of it with U+FFFD for each zero."""
    write(tmp_path, **{"a.txt": "a\nb\n\nmore of it\n".encode("utf-16") * 20})
    counts = Counts()
    with small_pieces(64):
        reader = TextReader(files_of(tmp_path / "a.txt"), documents, cleaning=Cleaning(invalid), skip_bad=True)
        assert items_of(reader, 64, counts) == []
    assert set(counts) == {"bad_utf16"}


def test_a_bad_file_is_a_bad_document(tmp_path: Path):
    write(tmp_path, **{"a.txt": "good", "b.txt": LATIN, "c.txt": "good".encode("utf-16"), "d.txt": b"\x7fELF\0\1"})
    counts = Counts()
    assert items_of(TextReader(files_of(tmp_path), skip_bad=True), counts=counts) == [(b"good",)]
    assert counts == {"bad_utf8": 1, "bad_utf16": 1, "bad_zero": 1}


@pytest.mark.parametrize("side", ["a.txt", "a.txt.other"])
def test_the_line_beside_a_bad_one_goes_with_it(tmp_path: Path, side: str):
    contents = {"a.txt": b"1\n2\n3\n", "a.txt.other": b"one\ntwo\nthree\n"}
    contents[side] = contents[side].replace(b"2", b"\xff").replace(b"two", b"\xff")
    write(tmp_path, **contents)
    assert items_of(sides(tmp_path, "a.txt", skip_bad=True)) == [(b"1", b"one"), (b"3", b"three")]


def test_a_broken_array_is_refused_with_skip_bad_too(tmp_path: Path):
    write(tmp_path, **{"a.json": '[{"text": "a"}, {"text" "b"}, {"text": "c"}]'})
    with pytest.raises(DataError, match="broken at byte 24"):
        items_of(TextReader(files_of(tmp_path / "a.json"), skip_bad=True))


# --- whole preparations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READERS)
def test_the_same_shards_for_any_number_of_ranks(tmp_path: Path, byte: Path, kind: str):
    name, expected, _ = mixed(tmp_path, kind)

    def make():
        reader = READERS[kind][0](tmp_path, name, skip_bad=True)
        if kind in ("table", "csv"):
            return LabelsKind(reader, (1, 2))
        return PairsKind(reader, 0) if kind == "pairs" else TextKind(reader, 0)

    found = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"out{ranks}"
        with small_pieces(64):
            manifest, _ = run(make, byte, out, ranks, shard_tokens=100)
        found.append(snapshot(out))
        assert {key: manifest.source[key] for key in expected} == expected
        assert manifest.source["skip_bad"] is True
        assert len(manifest.source["bad_items"]) == NAMED
        assert sum(shard.documents for shard in manifest.shards) == len(GOOD)
    assert found[0] == found[1] == found[2]
    assert kind == "csv" or len(found[0]) > 5  # so the ranks did share it


def test_skip_bad_makes_it_another_preparation(tmp_path: Path, byte: Path):
    """Nothing is bad here, but that was not known when the shards were asked for."""
    write(tmp_path, **{"a.txt": "good"})
    run(lambda: TextKind(TextReader(files_of(tmp_path / "a.txt")), 0), byte, tmp_path / "out")
    with pytest.raises(Exception, match=r"made otherwise \(differing: skip_bad\)"):
        run(lambda: TextKind(TextReader(files_of(tmp_path / "a.txt"), skip_bad=True), 0), byte, tmp_path / "out")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, byte: Path, capfd: pytest.CaptureFixture):
    """A command of data_prep in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # main() sets it where it is not
    monkeypatch.chdir(tmp_path)

    def call(words: str) -> tuple[int, str, str]:
        code = main(words.format(to=f"--tokenizer {byte} --val-fraction 0 --out").split())
        return (code, *capfd.readouterr())

    return call


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("text --documents line --input a.txt {to} out", "line"),
        ("text --input a.jsonl {to} out", "jsonl"),
        ("tokenizer --kind byte --input a.jsonl --out out.json", "jsonl"),
        ("labels --input a.tsv {to} out", "table"),
        ("labels --input a.csv {to} out", "csv"),
        ("pairs --source-field text --target-field label --input a.tsv {to} out", "table"),
        ("pairs --source a.txt --target a.txt.other {to} out", "pairs"),
    ],
)
def test_every_command_refuses_or_says_what_it_left_out(command, tmp_path: Path, words: str, kind: str):
    name, expected, _ = mixed(tmp_path, kind)
    code, _, said = command(words)
    assert (code, said.count("\n"), "--skip-bad" in said, name in said) == (65, 1, True, True)
    code, told, said = command(f"{words} --skip-bad")
    lost = sum(expected.values()) - (expected["bad_label"] if words.startswith("pairs") else 0)
    assert code == 0
    (line,) = [line for line in told.splitlines() if "left out as bad: " in line]
    assert sum(int(part.split()[0]) for part in line.partition("bad: ")[2].split(", ") if part[0].isdecimal()) == lost
    assert said.count("hvdtrain: left out: ") == said.count(name) == NAMED
    if words.endswith("out"):
        assert len(read_manifest(tmp_path / "out").source["bad_items"]) == NAMED


def test_quoted_tables_from_the_command_line(command, tmp_path: Path):
    rows = [("1", 'a "b"\nc'), ("0", "d\te,f")]
    for name, delimiter in (("a.tsv", "\t"), ("b.csv", ",")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows([("label", "text"), *rows])
    assert command("labels --input a.tsv {to} cut")[0] == 65
    assert command("labels --input a.tsv --quoted {to} tsv")[0] == command("labels --input b.csv {to} csv")[0] == 0
    assert command("pairs --source-field label --target-field text --input a.tsv --quoted {to} pairs")[0] == 0
    code, _, said = command("labels --input b.csv --quoted {to} csv")
    assert (code, "made otherwise (differing: quoted)" in said) == (2, True)
    shards = [(tmp_path / out / "train-00000.h5").read_bytes() for out in ("tsv", "csv")]
    assert shards[0] == shards[1]
    assert read_manifest(tmp_path / "csv").label_names == ("0", "1")
    assert read_manifest(tmp_path / "csv").source["byte_order_marks"] == 1


def test_how_a_json_was_read_is_said(command, tmp_path: Path):
    write(tmp_path, **{"a.json": '[{"text": "x"}]', "b.json": '{"text": "y"}', "c.json": '{"text": "z"}'})
    code, _, said = command("text --input a.json b.json c.json {to} out")
    assert code == 0
    assert said.splitlines() == [
        "hvdtrain: note: a.json: read as an array of JSON objects",
        "hvdtrain: note: b.json and 1 more .json files: read as JSON lines",
    ]


def test_a_table_that_is_read_as_text_is_said(command, tmp_path: Path):
    write(tmp_path, **{"a.tsv": "label\ttext\n1\tx\n"})
    code, _, said = command("tokenizer --kind byte --input a.tsv --out t.json")
    assert (code, said) == (0, "hvdtrain: note: a.tsv: read as plain text, all columns of it\n")


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_a_header_alone_is_nothing(command, tmp_path: Path, name: str):
    write(tmp_path, **{name: "label\ttext\n".replace("\t", "," if name == "a.csv" else "\t")})
    code, _, said = command(f"labels --input {name} {{to}} out")
    assert (code, "nothing is left of the input" in said) == (65, True)


# --- a file's beginning ------------------------------------------------------------------------------------------

MARK = codecs.BOM_UTF8


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", [*READERS, "file"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, kind: str, suffix: str):
    """It became part of the first document, sentence or label; only at the very beginning it is a mark."""
    make, good, _, head = READERS.get(kind, (text("file"), str.encode, [], b""))
    name = NAMES.get(kind, "a.txt") + suffix
    content = head + good("one") + good("\ufefftwo")
    contents = {name: content, f"{name}.other": b"x\ny\n"}
    write(tmp_path / "without", **contents)
    write(tmp_path / "with", **{name: MARK + content for name, content in contents.items()})
    counts: Counter = Counter()
    for piece_bytes in (1 << 20, 3) if kind != "file" else (1 << 20,):
        counts.clear()
        with small_pieces(piece_bytes):
            items = items_of(make(tmp_path / "without", name), 10)
            assert items_of(make(tmp_path / "with", name), 10, counts) == items
        assert "\ufefftwo".encode() in b"".join(items[-1])
    assert counts == {"byte_order_marks": 2 if kind == "pairs" else 1}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", [*READERS, "file"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16BE", "UTF-16LE", "UTF-32"])
def test_utf_16_is_named_as_such(tmp_path: Path, kind: str, encoding: str, suffix: str):
    """As `iconv` writes it: UTF-16 and UTF-32 with a mark, the others without. To replace it would leave nothing."""
    name = NAMES.get(kind, "a.txt") + suffix
    make, good, _, head = READERS.get(kind, (text("file"), str.encode, [], b""))
    content = head + good("text é") * 9
    done = subprocess.run(["iconv", "-f", "UTF-8", "-t", encoding], input=content, capture_output=True, check=True)
    (tmp_path / name).write_bytes(compressed(done.stdout, suffix))
    write(tmp_path, **{f"{name}.other": content})
    for cleaning in (Cleaning(), Cleaning("replace")):
        with pytest.raises(DataError, match=rf"{name} is {encoding} text; convert it: iconv -f {encoding} -t UTF-8"):
            items_of(make(tmp_path, name, cleaning=cleaning))


@pytest.mark.parametrize("kind", ["line", "blank-line", "table", "csv", "pairs", "jsonl"])
def test_lines_that_end_with_a_carriage_return_alone_are_not_one_line(tmp_path: Path, kind: str):
    make, good, _, head = READERS[kind]
    name = NAMES.get(kind, "a.txt")
    content = (head + good("one") + good("two")).replace(b"\n", b"\r")
    write(tmp_path, **{name: content, f"{name}.other": content})
    with pytest.raises(DataError, match=r"ends its lines with \\r alone, not with \\n; convert it: tr '\\r' '\\n'"):
        items_of(make(tmp_path, name))


def test_a_zero_byte_is_replaced_on_request(tmp_path: Path):
    write(
        tmp_path,
        **{"a.txt": b"one\0two \xff\n", "b.jsonl": '{"text": "a\\u0000b"}\n', "c.tsv": b"label\ttext\n1\tx\0\n"},
    )
    counts: Counter = Counter()
    replace = Cleaning("replace")
    assert items_of(TextReader(files_of(tmp_path / "a.txt"), cleaning=replace), counts=counts) == [
        ("one\ufffdtwo \ufffd\n".encode(),)
    ]
    assert items_of(TextReader(files_of(tmp_path / "b.jsonl"), cleaning=replace), counts=counts) == [
        ("a\ufffdb".encode(),)
    ]
    assert items_of(table(tmp_path, "c.tsv", cleaning=replace), counts=counts) == [(b"1", "x\ufffd".encode())]
    assert counts == {"replaced_characters": 4}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.NDJSON.gz", "a.tsv", "a.csv"])
def test_a_table_is_no_side_of_a_pair(tmp_path: Path, name: str):
    """Braces and keys would be translated."""
    write(tmp_path, **{name: '{"text": "x"}\n', "b.txt": "x\n"})
    with pytest.raises(
        ConfigError, match=rf"line by line; .*{name} is no such file by its ending: give it with --input"
    ):
        AlignedReader(files_of(tmp_path / "b.txt"), files_of(tmp_path / name))
