"""Cells in quotes are what Python's csv wrote; rows with more or fewer cells than columns are none."""

import csv
import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preparing import compressed, files_of, items_of, small_pieces, write

from data_prep import json_items, quoted, tables
from data_prep.tables import TableReader
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.errors import DataError

CELLS = st.lists(
    st.sampled_from(["a", '"', "\n", "\r\n", "\t", ",", " ", "é", "漢", "\u2028", "\x0c", "x" * 30]), max_size=6
).map("".join)


def written(rows: list[list[str]], delimiter: str = ",", end: str = "\n", all_quoted: bool = False) -> bytes:
    text = io.StringIO(newline="")
    how = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=how).writerows(rows)
    return text.getvalue().encode()


def read(folder: Path, content: bytes, name: str = "a.csv", **how):
    (folder / name).write_bytes(compressed(content, Path(name).suffix))
    counts: Counter = Counter()
    reader = TableReader(files_of(folder / name), how.pop("fields", ["label", "text"]), label="label", **how)
    return items_of(reader, 20, counts), counts


@settings(max_examples=120)
@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=12),
    st.sampled_from(["a.csv", "a.CSV", "a.csv.gz", "a.tsv", "a.tsv.zst"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 50),
    st.booleans(),
)
def test_what_csv_writes_is_read(
    tmp_path: Path, rows: list[tuple[str, str, str]], name: str, end: str, all_quoted: bool, block: int, has_mark: bool
):
    """Line ends, tabs, commas and quotes of a cell come back; once a row was cut at each."""
    rows = [(label or "none", text, more) for label, text, more in rows]
    content = written(
        [["label", "more", "text"], *([a, c, b] for a, b, c in rows)], "\t" if ".tsv" in name else ",", end, all_quoted
    )
    with small_pieces(16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(quoted, "_BLOCK", block)
        patch.setattr(tables, "_BATCH_BYTES", block)
        found, counts = read(tmp_path, b"\xef\xbb\xbf" * has_mark + content, name, quoted=True)
    assert found == [(label.encode(), text.encode()) for label, text, _ in rows]
    assert counts == ({"byte_order_marks": 1} if has_mark else {})


def test_a_quoted_file_is_read_from_its_start_by_one(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(written([["label", "text"], *([str(n), "a\nb"] for n in range(100))]))
    with small_pieces(16):
        (piece,) = TableReader(files_of(tmp_path / "a.csv"), ["label", "text"]).pieces(50)
    assert piece.is_stream
    assert (piece.begin, piece.end) == (0, (tmp_path / "a.csv").stat().st_size)


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_what_cannot_be_cut_is_not_held_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """8 MB in a tenth of that, with blocks of 64 KiB instead of megabytes."""
    for module, size in ((quoted, "_BLOCK"), (tables, "_BATCH_BYTES"), (json_items, "_READ_BYTES")):
        monkeypatch.setattr(module, size, 1 << 16)
    monkeypatch.setattr(json_items, "_BATCH_BYTES", 1 << 16)
    text = ("a" * 1999 + "\n") * 2
    row = json.dumps({"label": 1, "text": text}) if name == "a.json" else f'1,"{text}"\n'
    content = f"[{','.join([row] * 2000)}]" if name == "a.json" else "label,text\n" + row * 2000
    (tmp_path / name).write_text(content)
    reader = TableReader(files_of(tmp_path / name), ["label", "text"], label="label")
    (piece,) = reader.pieces(1 << 30)
    tracemalloc.start()
    rows = sum(len(items) for items in reader.items(piece, Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rows, len(content) > 8_000_000, peak < 800_000) == (2000, True, True)


def test_a_csv_without_a_header(tmp_path: Path):
    found, _ = read(tmp_path, b'1,"a, b"\n\n0,c\n', columns=["label", "text"])
    assert found == [(b"1", b"a, b"), (b"0", b"c")]


HEAD = b"label,text\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + b'1,"a\n2,b\n3,c\n', "the quote that opens on line 2 never closes"),
        (HEAD + b'1,a\n"1\n\n2","a ""b""\n3,c\n', "the quote that opens on line 5 never closes"),
        (HEAD + b'1,"a\n""b""\nc\n', "the quote that opens on line 2 never closes"),
        (HEAD + b'1,"a" b\n', "line 2 of the row that begins on line 2: ',' expected after '\"'"),
        (HEAD + b'1,"a\n\nb" c\n', "line 4 of the row that begins on line 2: .* written twice"),
        (HEAD + b"1,a\rb\n", "line 2 of the row that begins on line 2: new-line character seen in unquoted"),
        (HEAD + b'1,"a\nb"\n2,c,d\n', "the row on line 4 has 3 cells for 2 columns: '2'"),
        (HEAD + b"1\n", "the row on line 2 has 1 cells for 2 columns: '1'"),
        (HEAD + b'1,"caf\xe9"\n', "the row on line 2 is not UTF-8"),
        (HEAD + b"1,a\0b\n", r"the row on line 2 is binary \(a zero byte\)"),
        (HEAD + b',"a"\n', "the row on line 2 has no label"),
        (b"label;text\n1;a\n", "has no column 'label', 'text'; it has: 'label;text'"),
        (b'"label","text\n1,a\n', "the quote that opens on line 1 never closes"),
        (b"label,text,text\n1,a,b\n", "has 2 columns 'text'; which one is meant"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        read(tmp_path, content)


def test_a_quote_out_of_place_is_refused_with_skip_bad_too(tmp_path: Path):
    """Which line begins a row after it cannot be told."""
    with pytest.raises(DataError, match="line 2 never closes"):
        read(tmp_path, HEAD + b'1,"a\n2,b\n', skip_bad=True)


def test_a_cell_may_be_longer_than_csv_allows_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found, _ = read(tmp_path, HEAD + b'1,"' + b"x\n" * 100_000 + b'"\n')  # csv's own limit is 131,072 characters
    assert len(found[0][1]) == 200_000
    csv.field_size_limit(1000)
    try:
        with pytest.raises(DataError, match="the quote that opens on line 3 never closes within 16 million characters"):
            read(tmp_path, HEAD + b'1,a\n2,"' + b"x\n" * 1000)
    finally:
        csv.field_size_limit(quoted._LONGEST_CELL)


def test_what_is_not_utf8_is_replaced_on_request(tmp_path: Path):
    found, counts = read(tmp_path, HEAD + '1,"日本'.encode()[:-1] + b'\xff\0"\n', cleaning=Cleaning("replace"))
    assert found == [(b"1", "日\ufffd\ufffd\ufffd".encode())]
    assert counts == {"replaced_characters": 3}


# --- tables without quotes ---------------------------------------------------------------------------------------


def test_quotes_of_a_tsv_are_text_which_is_counted(tmp_path: Path):
    """A review may begin and end with quotes; but then it is told that there is another way to read it."""
    content = b'label\ttext\n1\t"good"\n"0"\tsaid "bad"\n'
    found, counts = read(tmp_path, content, "a.tsv")
    assert found == [(b"1", b'"good"'), (b'"0"', b'said "bad"')]
    assert counts == {"quoted_cells": 2}
    assert read(tmp_path, content.replace(b'said "', b"said ").replace(b'bad"', b"bad"), "a.tsv", quoted=True)[0] == [
        (b"1", b"good"),
        (b"0", b"said bad"),
    ]


def test_a_cut_row_asks_for_quoted(tmp_path: Path):
    content = written([["label", "text"], ["1", "a\nb"], ["0", "c"]], "\t")
    with pytest.raises(
        DataError, match=r"the line at byte 11 .*|the line at byte 16 has 1 cells .*; are its cells in quotes"
    ):
        read(tmp_path, content, "a.tsv")


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize(
    "first", [b"label\ttext", b"Label\tText", b"label\tsentence"], ids=["the same", "in capitals", "the label alone"]
)
def test_a_header_that_columns_deny_is_no_row(tmp_path: Path, name: str, first: bytes):
    """``label`` once became a class of its own."""
    content = (first + b"\n1\ta\n").replace(b"\t", b"," if name == "a.csv" else b"\t")
    with pytest.raises(DataError, match=r"begins with a header line \('[Ll]abel .*'\); leave out --columns"):
        read(tmp_path, content, name, columns=["label", "text"])


def test_each_file_has_its_own_header(tmp_path: Path):
    write(tmp_path, **{"a.tsv": "label\ttext\n1\ta\n", "b.tsv": "text\tid\tlabel\nb\t7\t0\n", "c.tsv": "text\tlabel\n"})
    found = items_of(TableReader(files_of(tmp_path), ["label", "text"]))
    assert found == [(b"1", b"a"), (b"0", b"b")]
    write(tmp_path, **{"d.tsv": "1\ta\n"})
    with pytest.raises(DataError, match=r"d\.tsv has no column 'label', 'text'; it has: '1', 'a'"):
        items_of(TableReader(files_of(tmp_path), ["label", "text"]))


def test_a_header_that_is_no_header_is_not_cut(tmp_path: Path):
    """What comes after 64 KiB of it would be missing from the columns."""
    with pytest.raises(DataError, match=r"a\.tsv: the first line, .*, is longer than 64 KiB"):
        read(tmp_path, b"label\ttext\t" + b"x" * (1 << 16) + b"\n1\ta\tb\n", "a.tsv")


def test_columns_that_nobody_asks_for_may_have_one_name(tmp_path: Path):
    found, _ = read(tmp_path, b"_\tlabel\t_\ttext\nx\t1\ty\ta\n", "a.tsv")
    assert found == [(b"1", b"a")]


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(["a", "1", "", "é"]), min_size=1, max_size=4), min_size=1, max_size=9),
    st.integers(4, 60),
)
def test_rows_of_other_widths_are_left_out_wherever_they_are_cut(tmp_path: Path, rows: list[list[str]], piece: int):
    assume(all(any(row) for row in rows))
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in rows))
    counts: Counter = Counter()
    with small_pieces(piece):
        reader = TableReader(files_of(tmp_path / "a.tsv"), ["b"], ["a", "b"], skip_bad=True)
        found = items_of(reader, 30, counts)
    assert found == [(row[1].encode(),) for row in rows if len(row) == 2]
    assert counts["bad_cells"] == sum(len(row) != 2 for row in rows)
