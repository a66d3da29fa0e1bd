"""The documents are those of a plain reading of the whole file, each once and in order, however the file is cut."""

import codecs
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from preparing import ODD_TEXTS, TEXTS, compressed, files_of, items_of, plain_documents, small_pieces, write

from data_prep.corpus import COMPRESSIONS
from data_prep.readers import TextReader, split_lines, split_paragraphs
from data_prep.tables import TableReader
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.errors import DataError

SUFFIXES = ("", *COMPRESSIONS)
CUTS = (st.sampled_from(SUFFIXES), st.integers(1, 60), st.integers(1, 200), st.integers(1, 30))
# No lone surrogates here; they have tests of their own.
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NO_TABS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0"), max_size=20)


def one_file(folder: Path, content: bytes, suffix: str = "", name: str = "a.txt"):
    path = folder / f"{name}{suffix}"
    path.write_bytes(compressed(content, suffix))
    return files_of(path)


# --- text --------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(TEXTS, st.sampled_from(["line", "blank-line"]), *CUTS)
def test_documents_are_those_of_a_plain_reading(
    tmp_path: Path, text: bytes, documents: str, suffix: str, piece_bytes: int, unit_bytes: int, look_ahead: int
):
    assume(b"\n" in text or b"\r" not in text.removeprefix(b"\xef\xbb\xbf").strip(b"\r"))  # an old Mac's is refused
    with small_pieces(piece_bytes, look_ahead):
        reader = TextReader(one_file(tmp_path, text, suffix), documents)
        assert items_of(reader, unit_bytes) == [(one,) for one in plain_documents(text, documents)]


@settings(max_examples=80)
@given(st.lists(ANY | st.sampled_from(ODD_TEXTS)), st.sampled_from(["\n", "\r\n", "\n\n"]), *CUTS)
def test_jsonl_gives_the_field_of_each_line(
    tmp_path: Path, texts: list[str], end: str, suffix: str, piece_bytes: int, unit_bytes: int, look_ahead: int
):
    rows = [json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    content = (end.join(rows) + end * (len(texts) % 2)).encode() or b"\n"
    with small_pieces(piece_bytes, look_ahead):
        found = items_of(TextReader(one_file(tmp_path, content, suffix, "a.jsonl")), unit_bytes)
    assert found == [(text.encode(),) for text in texts if text]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_whole_file_is_a_document(tmp_path: Path, suffix: str):
    files = files_of(write(tmp_path, **{f"{n:02}.txt{suffix}": text for n, text in enumerate(ODD_TEXTS)}))
    assert items_of(TextReader(files)) == [(text.encode(),) for text in ODD_TEXTS]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_no_document(tmp_path: Path, suffix: str):
    files = files_of(write(tmp_path, **{f"a.txt{suffix}": "", f"b.txt{suffix}": "b"}))
    for documents in ("file", "line", "blank-line"):
        assert items_of(TextReader(files, documents)) == [(b"b",)]


def test_by_hand():
    assert split_lines(b"a\r\nb\n\nc") == [b"a", b"b", b"", b"c"]
    assert split_lines(b"a\n\n") == [b"a", b""]
    assert split_lines(b"a\rb") == [b"a\rb"]  # no line end of our time
    assert split_paragraphs(b"\n \na\nb\r\n\r\n\t\n  c\n\n d \n ") == [b"a\nb", b"  c", b" d "]


def test_lines_end_at_line_feeds_only(tmp_path: Path):
    """Python's own splitlines() would cut at seven more."""
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    assert items_of(TextReader(one_file(tmp_path, f"{odd}\n{odd}".encode()), "line")) == [(odd.encode(),)] * 2


def test_one_line_longer_than_many_pieces_among_short_ones(tmp_path: Path):
    """Held until its end was found, it once pulled in so much that the lines behind it were cut anywhere."""
    lines = [b"a", b"b" * 3000, *(b"%d" % n for n in range(900)), b"c" * 500, b"end"]
    for suffix in SUFFIXES:
        with small_pieces(64, 16):
            reader = TextReader(one_file(tmp_path, b"\n".join(lines), suffix), "line")
            assert items_of(reader, 100) == [(line,) for line in lines]


# --- what is no text ---------------------------------------------------------------------------------------------

BAD = {
    "latin-1": (b"caf\xe9 au lait", "byte 3 is 0xe9"),
    "cut short": ("日本".encode()[:-1], "byte 3 is 0xe6"),
    "a surrogate": (b"\xed\xa0\x80", "byte 0 is 0xed"),
    "overlong": (b"ab\xc0\xaf", "byte 2 is 0xc0"),
    "too large": (b"\xf4\x90\x80\x80", "byte 0 is 0xf4"),
    "UTF-16": ("x".encode("utf-16"), "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
    "binary": (b"abc\0def", "binary file: zero byte at byte 3"),
}


@pytest.mark.parametrize("documents", ["file", "line", "blank-line"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_utf8_is_named_with_file_and_byte(tmp_path: Path, bad: str, suffix: str, documents: str):
    raw, message = BAD[bad]
    with pytest.raises(DataError, match=message) as caught:
        items_of(TextReader(one_file(tmp_path, raw, suffix), documents))
    assert str(tmp_path / f"a.txt{suffix}") in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_byte_is_counted_from_the_files_beginning(tmp_path: Path, suffix: str):
    text = b"some line\n" * 50 + b"caf\xe9\n" + b"more\n" * 20
    with small_pieces(64, 16), pytest.raises(DataError, match=r"a\.txt.* is not UTF-8 text: byte 503 is 0xe9"):
        items_of(TextReader(one_file(tmp_path, text, suffix), "line"), 100)


def test_what_is_wrong_is_replaced_and_counted_on_request(tmp_path: Path):
    counts: Counter = Counter()
    raw = "good \ufffd ".encode() + b"caf\xe9 \xff\xfe" + "日本".encode()[:-1]
    reader = TextReader(one_file(tmp_path, raw), cleaning=Cleaning("replace"))
    assert items_of(reader, counts=counts) == [("good \ufffd caf\ufffd \ufffd\ufffd日\ufffd".encode(),)]
    assert counts == {"replaced_characters": 4}  # the first was in the text


@settings(max_examples=100)
@given(st.binary(max_size=80).map(lambda raw: raw.replace(b"\0", b"") or b"x"))
@example(codecs.BOM_UTF8)
@example(codecs.BOM_UTF8 + b"caf\xe9")
def test_replacing_gives_what_python_gives(tmp_path: Path, raw: bytes):
    """But for a byte order mark, which is taken off, and UTF-16, which is not text in bits of eight."""
    assume(not raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)))
    reader = TextReader(one_file(tmp_path, raw), cleaning=Cleaning("replace"))
    text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").encode()
    assert items_of(reader) == ([(text,)] if text else [])


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["e\u0301", "é", "ﬁ", "\u1100\u1161", "a", "\u212b", "漢", "\u0344"])).map("".join))
def test_composed_on_request_kept_otherwise(tmp_path: Path, text: str):
    import unicodedata

    files = one_file(tmp_path, (text + "\n").encode())
    assert items_of(TextReader(files)) == [((text + "\n").encode(),)]
    composed = unicodedata.normalize("NFC", text + "\n").encode()
    assert items_of(TextReader(files, cleaning=Cleaning(nfc=True))) == [(composed,)]
    rows = one_file(tmp_path, json.dumps({"text": text + "\n"}).encode(), name="a.jsonl")
    assert items_of(TextReader(rows, cleaning=Cleaning(nfc=True))) == [(composed,)]


def test_replaced_and_composed(tmp_path: Path):
    files = one_file(tmp_path, b"e\xcc\x81 \xff")
    assert items_of(TextReader(files, cleaning=Cleaning("replace", nfc=True))) == [("é \ufffd".encode(),)]


# --- JSON lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "the line at byte 14 is not JSON: EOF"),
        (b'{"text": "a"} {"text": "b"}\n', "the line at byte 0 is not JSON: trailing"),
        (b'["a"]\n', "the line at byte 0 is not a JSON object"),
        (b'{"body": "a", "id": 3}\n', "byte 0 has no field 'text'; it has: body, id"),
        (b'{"text": null}\n', "field 'text' of the line at byte 0 is null, not text"),
        (b'{"text": true}\n', "field 'text' of the line at byte 0 is true, not text"),
        (b'{"text": NaN}\n', "field 'text' of the line at byte 0 is NaN, not text"),
        (b'{"text": 3}\n', "field 'text' of the line at byte 0 is 3, not text"),
        (b'{"text": ["a"]}\n', r"field 'text' of the line at byte 0 is \[\"a\"\], not text"),
        (b'{"text": "a", "text": "b"}\n', "the line at byte 0 has field 'text' twice"),
        (b'{"text": "a"},\n', "the line at byte 0 is not JSON: trailing"),
        (rb'{"text": "a\u0000b"}' + b"\n", "byte 0 holds a zero character; .* --invalid-utf8 replace"),
        (b'\n\n{"text": "caf\xe9"}\n', "is not UTF-8 text: byte 15 is 0xe9"),
        (b'{"text": "a\0b"}\n', "is a binary file: zero byte at byte 11"),
        (rb'{"text": "a\ud83d"}' + b"\n", "byte 0 holds half a surrogate pair, .* --invalid-utf8 replace"),
        (b"[" * 100_000, "the line at byte 0 is not JSON: recursion limit"),
        (b"{}", "byte 0 has no field 'text'; it has: nothing"),
    ],
)
def test_what_is_wrong_in_json_is_named(tmp_path: Path, raw: bytes, message: str):
    with pytest.raises(DataError, match=rf"a\.jsonl.*{message}"):
        items_of(TextReader(one_file(tmp_path, raw, name="a.jsonl")))


def test_json_may_hold_what_text_does_not(tmp_path: Path):
    counts: Counter = Counter()
    content = "\ufeff" + r'{"text": "zero\u0000byte"}' + "\n" + r'{"text": "\ud83d\ude00 \ud83d.\udc00"}' + "\r\n"
    raw = content.encode() + b'{"text": "caf\xe9"}\n' + b'{"text": "1", "meta": {"text": 2}}\n'
    reader = TextReader(one_file(tmp_path, raw, name="a.jsonl"), cleaning=Cleaning("replace"))
    texts = ["zero\ufffdbyte", "\U0001f600 \ufffd.\ufffd", "caf\ufffd", "1"]
    assert items_of(reader, counts=counts) == [(text.encode(),) for text in texts]
    assert counts == {"replaced_characters": 4, "byte_order_marks": 1}


def test_another_field(tmp_path: Path):
    files = one_file(tmp_path, b'{"text": "a", "body": "b", "b\xc3\xa9": "c"}', name="a.jsonl")
    assert items_of(TextReader(files, field="body")) == [(b"b",)]
    assert items_of(TextReader(files, field="bé", cleaning=Cleaning(nfc=True))) == [(b"c",)]


# --- tables ------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.lists(st.tuples(NO_TABS, NO_TABS, NO_TABS), min_size=1), st.sampled_from(["\n", "\r\n"]), *CUTS)
def test_the_cells_of_a_table(
    tmp_path: Path, rows: list[tuple[str, str, str]], end: str, suffix: str, piece_bytes: int, unit: int, ahead: int
):
    content = ("\ufeffone\ttwo\tthree" + end + "".join("\t".join(row) + end for row in rows)).encode()
    with small_pieces(piece_bytes, ahead):
        found = items_of(TableReader(one_file(tmp_path, content, suffix, "a.tsv"), ["three", "one"]), unit)
    assert found == [(row[2].encode(), row[0].encode()) for row in rows]


def test_a_table_without_a_header_line(tmp_path: Path):
    files = one_file(tmp_path, b"1\tgood\n0\tbad\n\n", name="a.tsv")
    assert items_of(TableReader(files, ["text", "label"], ["label", "text"])) == [(b"good", b"1"), (b"bad", b"0")]


def test_the_same_rows_as_json(tmp_path: Path):
    rows = [{"label": 1, "text": "good\tand\nmore"}, {"text": "bad", "label": "no"}]
    files = one_file(tmp_path, "\n".join(map(json.dumps, rows)).encode(), name="a.jsonl")
    assert items_of(TableReader(files, ["label", "text"], label="label")) == [
        (b"1", b"good\tand\nmore"),
        (b"no", b"bad"),
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"text\tsentiment\nx\ty\n", "no column 'label'; it has: 'text', 'sentiment'; .*--columns"),
        (b"text\tlabel\nonly one\n", "the line at byte 11 has 1 cells for 2 columns: 'only one'"),
        (b"text\tlabel\n\n\na\tb\tfragment\n", r"the line at byte 13 has 3 cells for 2 columns: 'a\\tb\\tfragment'"),
        (b"text\tlabel\ncaf\xe9\t1\n", "is not UTF-8 text: byte 14 is 0xe9"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path: Path, raw: bytes, message: str):
    with pytest.raises(DataError, match=rf"a\.tsv.*{message}"):
        items_of(TableReader(one_file(tmp_path, raw, name="a.tsv"), ["text", "label"]))
