"""JSON as other tools write it: of any ending, an object a line, an array, or one object; and what values may be."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import ODD_TEXTS, compressed, files_of, items_of, small_pieces, write

from data_prep import json_items
from data_prep.corpus import COMPRESSIONS
from data_prep.formats import JSON_ARRAY, JSON_LINES, JSON_OBJECT, SQUAD, resolve
from data_prep.pieces import Piece, Places
from data_prep.readers import TextReader
from data_prep.tables import TableReader
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.errors import DataError

ROWS = [{"id": n, "text": text, "label": n % 2} for n, text in enumerate(ODD_TEXTS)]
ITEMS = [(text.encode(),) for text in ODD_TEXTS]
LINES = "\n".join(map(json.dumps, ROWS))


def shape_of(folder: Path, content: str, command: str = "labels") -> str:
    (file,) = resolve(files_of(write(folder, **{"a.json": content}) / "a.json"), command)
    return file.how


# --- which ending, which shape -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", *COMPRESSIONS, ".GZ"])
@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".ndjson", ".json", ".Json"])
def test_lines_are_read_as_json_whatever_the_ending(tmp_path: Path, ending: str, packed: str):
    """Of these only .jsonl in small letters once was: the others became text with keys and braces."""
    path = tmp_path / f"a{ending}{packed}"
    path.write_bytes(compressed(LINES.encode(), packed.lower()))
    assert items_of(TextReader(files_of(path))) == ITEMS


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (LINES, JSON_LINES),
        ('{"text": "one line"}', JSON_LINES),
        ('\ufeff\n {"text": "a"}\n{"text": "b"}', JSON_LINES),
        ('{"text": "a"},\n{"text": "b"}', JSON_LINES),  # which is wrong, and said of the line
        (json.dumps(ROWS), JSON_ARRAY),
        (json.dumps(ROWS, indent=1), JSON_ARRAY),
        (" \n[]", JSON_ARRAY),
        (json.dumps(ROWS[0], indent=4), JSON_OBJECT),
        ('{"text":\n"a"}', JSON_OBJECT),
        (json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": []}]}), SQUAD),
        (json.dumps({"data": [{"paragraphs": []}], "version": 2.0}, indent=2), SQUAD),
        ('\ufeff{"version": "a \\" data", "n": -1.5e3, "data": []}', SQUAD),
        (json.dumps({"meta": {"data": [{}]}, "label": 1, "text": "x"}), JSON_LINES),
        (json.dumps({"data": "x", "label": 1, "text": "x"}), JSON_LINES),
        (json.dumps({"data": [1, 2], "label": 1, "text": "x"}), JSON_LINES),
    ],
)
def test_the_content_decides_what_a_json_is(tmp_path: Path, content: str, how: str):
    assert shape_of(tmp_path, content) == how


@settings(max_examples=60)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), max_size=9),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from(["", ".gz"]),
    st.sampled_from(["", "\ufeff", " \n"]),
)
def test_an_array_is_read_as_its_elements_however_little_is_held(
    tmp_path: Path, texts: list[str], indent: int | None, is_ascii: bool, read_bytes: int, packed: str, before: str
):
    rows = [{"n": -n / 3, "text": text, "more": [None, {"[": '"]'}]} for n, text in enumerate(texts)]
    content = before + json.dumps(rows, indent=indent, ensure_ascii=is_ascii) + "\n "
    path = tmp_path / f"a.json{packed}"
    path.write_bytes(compressed(content.encode(), packed))
    with small_pieces(16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_items, "_READ_BYTES", max(read_bytes, 4))  # which reaches to the bracket
        patch.setattr(json_items, "_BATCH_BYTES", 30)
        reader = TextReader(files_of(path))
        assert len(reader.pieces(20)) == 1  # it cannot be cut
        assert items_of(reader, 20) == [(text.encode(),) for text in texts if text]


def test_places_of_an_array_are_its_bytes(tmp_path: Path):
    """So a tokenizer is trained on a sample of it, too."""
    path = write(tmp_path, **{"a.json": json.dumps([{"text": f"{n:04}"} for n in range(100)])}) / "a.json"
    reader = TextReader(files_of(path))
    piece = Piece(reader.files[0], 0, path.stat().st_size, None, Places(18, frozenset({2, 5})))  # '{"text": "0002"}, '
    assert [item for items in reader.items(piece, Counter()) for item in items] == [(b"0002",), (b"0005",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"]', "the JSON array is broken at byte 28: Expecting ',' delimiter"),
        ('[{"text": "a"} {"text": "b"}]', "is broken at byte 15: expected , or ]"),
        ('[{"text": "a"}, ]', "is broken at byte 16: Expecting value"),
        ('[{"text": "a"}', "ends too early at byte 14: expected , or ]"),
        ('[{"text": "aé', "ends too early at byte 10: Unterminated string"),
        ("[", "ends too early at byte 1: expected a value or ]"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "more stands behind the JSON array that ends at byte 14"),
        ('["a", "b"]', "the element at byte 1 is not a JSON object"),
        ('[{"text": "a"}, {"text": 1}]', "field 'text' of the element at byte 16 is 1, not text"),
        ('[{"text": "a"}, {"body": 1}]', "the element at byte 16 has no field 'text'; it has: body"),
        ('[{"text": "a\nb"}]', "the element at byte 1 is not JSON: control character"),
        (
            '{\n"train": [{"text": "a"}]}',
            r"the object at byte 0 has no field 'text'; it has: train; .* jq -c '.\[\"train\"\]\[\]'",
        ),
        ('{\n"text": "a"', "the object at byte 0 is not JSON: EOF"),
    ],
)
def test_what_is_wrong_in_a_json_document_is_named(tmp_path: Path, content: str, message: str):
    files = files_of(write(tmp_path, **{"a.json": content}) / "a.json")
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        items_of(TextReader(files))


def test_a_broken_array_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_items, "_READ_BYTES", 100)
    (file,) = files_of(write(tmp_path, **{"a.json": '[{"text" "a"},' + '{"text": "b"},' * 1000}) / "a.json")
    read, open_file = [], type(file).read
    monkeypatch.setattr(type(file), "read", lambda *words: read.append(open_file(*words)) or read[-1])
    with pytest.raises(DataError, match="broken at byte 9"):
        items_of(TextReader([file]))
    assert len(read) == 2  # to see what it is, and the first 100 bytes


def test_a_number_is_whole_before_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_items, "_READ_BYTES", 4)
    files = files_of(write(tmp_path, **{"a.json": '[123456789, {"text": "a"}, 1]'}) / "a.json")
    counts: Counter = Counter()
    assert items_of(TextReader(files, skip_bad=True), counts=counts) == [(b"a",)]
    assert counts == {"bad_json": 2}


def test_one_object_is_one_item(tmp_path: Path):
    files = files_of(write(tmp_path, **{"a.json": "\ufeff" + json.dumps(ROWS[1], indent=2)}) / "a.json")
    counts: Counter = Counter()
    assert items_of(TextReader(files), counts=counts) == [ITEMS[1]]
    assert counts == {"byte_order_marks": 1}
    assert items_of(TableReader(files, ["label", "text"], label="label")) == [(b"1", *ITEMS[1])]


def test_an_object_with_an_empty_text_is_counted(tmp_path: Path):
    files = files_of(write(tmp_path, **{"a.jsonl": '{"text": ""}\n\n{"text": "a"}\n{"text": " "}\n'}) / "a.jsonl")
    counts: Counter = Counter()
    assert items_of(TextReader(files), counts=counts) == [(b"a",), (b" ",)]
    assert counts == {"empty_documents": 1}


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "label"), [("0", "0"), ("-3", "-3"), ('"a b"', "a b"), ('"1.0"', "1.0"), ("12345678901234567890", None)]
)
def test_a_label_is_text_or_a_whole_number(tmp_path: Path, value: str, label: str | None):
    files = files_of(write(tmp_path, **{"a.jsonl": f'{{"label": {value}, "text": "x"}}'}) / "a.jsonl")
    assert items_of(TableReader(files, ["label", "text"], label="label")) == [((label or value).encode(), b"x")]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "true", "false", "null", "1.0", "1e2", '["a"]', '{"a": 1}'])
def test_other_values_are_no_label_and_numbers_are_no_text(tmp_path: Path, value: str):
    """They once were the classes 'nan', 'True' and 'None', and texts."""
    lines = f'{{"label": 1, "text": "x"}}\n{{"label": {value}, "text": "x"}}'
    files = files_of(write(tmp_path, **{"a.jsonl": lines}) / "a.jsonl")
    shown = value.replace("1e2", "100.0").replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(DataError, match=f"'label' of the line at byte 26 is {shown}, neither text nor a whole number"):
        items_of(TableReader(files, ["label", "text"], label="label"))
    with pytest.raises(DataError, match="field 'label' of the line at byte 0 is 1, not text"):
        items_of(TableReader(files, ["text", "label"]))


def test_an_empty_label_is_none(tmp_path: Path):
    files = files_of(write(tmp_path, **{"a.jsonl": '{"label": "", "text": "x"}'}) / "a.jsonl")
    with pytest.raises(DataError, match="field 'label' of the line at byte 0 is empty"):
        items_of(TableReader(files, ["label", "text"], label="label"))


def test_of_two_fields_of_one_name_none_is_chosen(tmp_path: Path):
    """Python takes the last without a word; the same name within another object is no matter."""
    good = '{"text": "a", "meta": {"text": "b"}}\n'
    files = files_of(write(tmp_path, **{"a.jsonl": good}) / "a.jsonl")
    assert items_of(TextReader(files)) == [(b"a",)]
    files = files_of(write(tmp_path, **{"a.jsonl": good + '{"text": "a", "text": "b"}\n'}) / "a.jsonl")
    with pytest.raises(DataError, match="the line at byte 37 has field 'text' twice"):
        items_of(TextReader(files))


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["a", "é\u0301", "\\u0000", '\\"', "\\ud83d\\ude00", "\\u0041", "\\\\u0000"])))
def test_the_quick_way_finds_what_a_look_at_each_line_finds(tmp_path: Path, parts: list[str]):
    line = '{"id": 1, "text": "' + "".join(parts) + '", "b": "c"}'
    files = files_of(write(tmp_path, **{"a.jsonl": f"{line}\n\n{line}"}) / "a.jsonl")
    reader = TableReader(files, ["text", "b"], cleaning=Cleaning("replace"))
    with pytest.MonkeyPatch.context() as patch:
        found = items_of(reader)
        patch.setattr(json_items.JsonItems, "_quick", lambda *words: None)
        assert items_of(reader) == found
    assert len(found) == 2
