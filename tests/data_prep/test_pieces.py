"""Pieces tile the input, wherever they are cut, and units and ranks share them: no byte twice, none left out."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import TEXTS, compressed, files_of, small_pieces

from data_prep import pieces
from data_prep.corpus import COMPRESSIONS, InputFile
from data_prep.pieces import Piece, Unit, chunks, cut_files, end_of_line, end_of_paragraph, end_of_text, gather, share
from data_prep.readers import split_paragraphs
from hvdtrain.errors import DataError


def file_of(size: int, name: str = "a.txt", split: str | None = None) -> InputFile:
    return InputFile(Path(name), name, size, 0, split)


def spans(cut: list[Piece]) -> list[tuple[str, int, int, str | None]]:
    return [(piece.file.name, piece.begin, piece.end, piece.split) for piece in cut]


def plain_file(folder: Path, content: bytes, suffix: str = "") -> InputFile:
    path = folder / f"text.txt{suffix}"
    path.write_bytes(compressed(content, suffix))
    return files_of(path)[0]


# --- cutting by numbers ------------------------------------------------------------------------------------------


def test_files_are_cut_at_multiples():
    cut = cut_files([file_of(25, "a"), file_of(0, "b"), file_of(10, "c"), file_of(90, "d.gz"), file_of(1, "e")], 10)
    assert spans(cut) == [
        ("a", 0, 10, None), ("a", 10, 20, None), ("a", 20, 25, None), ("c", 0, 10, None),
        ("d.gz", 0, 90, None),  # can be read only from its start
        ("e", 0, 1, None),
    ]  # fmt: skip
    assert [piece.weight for piece in cut] == [10, 10, 5, 10, 360, 1]


def test_the_tail_is_cut_off_by_the_byte():
    cut = cut_files([file_of(25, "a"), file_of(15, "b")], 10, tail_fraction=0.5)
    assert spans(cut) == [
        ("a", 0, 10, "train"), ("a", 10, 20, "train"), ("a", 20, 25, "val"), ("b", 0, 10, "val"), ("b", 10, 15, "val"),
    ]  # fmt: skip
    assert spans(cut_files([file_of(8)], 10, 0.75)) == [("a.txt", 0, 2, "train"), ("a.txt", 2, 8, "val")]


def test_the_tail_is_that_of_what_is_for_training():
    """What --val-input and --test-input name is not counted: a tail of half of 20 bytes is 10 of them."""
    files = [file_of(20, "a"), file_of(1000, "v", "val"), file_of(30, "t", "test")]
    assert spans(cut_files(files, 1000, tail_fraction=0.5)) == [
        ("a", 0, 10, "train"), ("a", 10, 20, "val"), ("v", 0, 1000, "val"), ("t", 0, 30, "test"),
    ]  # fmt: skip


def test_units_are_gathered_in_order_a_piece_at_least_each():
    cut = [Piece(file_of(size, f"{n}"), 0, size, None) for n, size in enumerate([4, 4, 4, 30, 1, 9, 1])]
    assert [[piece.file.name for piece in unit.pieces] for unit in gather(cut, 10)] == [
        ["0", "1"], ["2"], ["3"], ["4", "5"], ["6"],
    ]  # fmt: skip
    assert [(unit.number, unit.weight) for unit in gather(cut, 10)] == [(0, 8), (1, 4), (2, 30), (3, 10), (4, 1)]
    assert len(gather(cut, 1)) == 7
    assert gather([], 10) == []


@given(
    st.lists(st.integers(0, 60), max_size=8), st.integers(1, 30), st.integers(1, 90), st.sampled_from([0.0, 0.1, 0.9])
)
def test_units_tile_all_files(sizes: list[int], piece_bytes: int, unit_bytes: int, tail: float):
    files = [file_of(size, f"{n}") for n, size in enumerate(sizes)]
    units = gather(cut_files(files, piece_bytes, tail), unit_bytes)
    found = [piece for unit in units for piece in unit.pieces]
    for file in files:
        ends = [0, *(piece.end for piece in found if piece.file == file)]
        assert ends[:-1] == [piece.begin for piece in found if piece.file == file]
        assert ends[-1] == file.bytes
    assert all(unit.weight <= unit_bytes or len(unit.pieces) == 1 for unit in units)
    assert all(0 < piece.end - piece.begin <= piece_bytes for piece in found)
    if tail:
        assert sum(piece.weight for piece in found if piece.split == "train") == int(sum(sizes) * (1 - tail))


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_ranks_share_evenly(weights: list[int], size: int):
    shares = share(weights, size)
    assert sorted(number for mine in shares for number in mine) == list(range(len(weights)))
    assert all(mine == sorted(mine) for mine in shares)
    loads = [sum(weights[number] for number in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(weights, default=0)  # a rank is never ahead by more than one unit


def test_sharing_by_hand():
    assert share([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert share([1, 1, 8, 1, 1], 2) == [[2], [0, 1, 3, 4]]
    assert share([3], 4) == [[0], [], [], []]
    lengths = [len(mine) for mine in share([7] * 100, 8)]
    assert max(lengths) - min(lengths) == 1


def test_a_stamp_knows_the_files_and_the_cuts():
    file = file_of(10)
    one = Unit(0, (Piece(file, 0, 10, None),))
    others = [
        one,
        Unit(0, (Piece(replace(file, mtime_ns=1), 0, 10, None),)),  # touched
        Unit(0, (Piece(replace(file, partner=file_of(9, "b")), 0, 10, None),)),
        Unit(0, (Piece(replace(file, partner=replace(file_of(9, "b"), mtime_ns=1)), 0, 10, None),)),  # the partner was
        Unit(0, (Piece(file, 0, 9, None),)),  # other places, because another file changed the bytes of a token
        Unit(0, (Piece(file, 0, 10, "val"),)),
    ]
    assert len({unit.stamp for unit in others}) == len(others)
    assert Unit(5, one.pieces).stamp == one.stamp == Unit(0, (Piece(file_of(10), 0, 10, None),)).stamp


# --- where documents end -----------------------------------------------------------------------------------------


def ends(end_of, text: str | bytes, at: range | None = None) -> list[int]:
    content = text if isinstance(text, bytes) else text.encode()
    return [end_of(lambda start, size: content[start : start + size], n) for n in at or range(1, len(content) + 1)]


def test_the_end_of_a_line():
    assert ends(end_of_line, "ab\ncd\n") == [3, 3, 6, 6, 6, 6]
    assert ends(end_of_line, "ab\ncd") == [3, 3, 5, 5, 5]


def test_the_end_of_a_paragraph():
    #       0 1 2 345 678 9 10
    text = "a\n\nbb\n \n\nc\nd"
    assert ends(end_of_paragraph, text) == [3, *[9] * 6, *[12] * 5]


def test_a_long_text_is_cut_at_a_line_end_between_letters_if_there_is_one():
    assert ends(end_of_text, "aa bb\n\ncc\nddddd")[:3] == [10, 10, 10]
    assert ends(end_of_text, "aa bb\n\ncc")[:3] == [6, 6, 6]  # else at any
    assert ends(end_of_text, "aa bb cc")[:4] == [2, 2, 5, 5]  # else before a word
    assert ends(end_of_text, "漢字") == [3, 3, 3, 6, 6, 6]  # else between characters
    assert ends(end_of_text, b"\xa0" * 9)[:3] == [1, 2, 3]  # bytes that are no text have no good place


@pytest.mark.parametrize("space", ["\u3000", "\xa0", "\u2028", "\u2003", "\u1680", "\u202f", "\u205f", " ", "\t", "\n"])
def test_a_line_end_beside_white_space_is_no_place_to_cut(space: str):
    """A tokenizer gathers white space: "\\n" + U+3000 U+3000, as Chinese paragraphs begin, is cut before the last."""
    for text in (f"aaa\n{space}bbb\nccc", f"aaa{space}\nbbb\nccc"):
        assert ends(end_of_text, text, range(1, 4)) == [len(text.encode()) - 3] * 3


# --- cutting bytes -----------------------------------------------------------------------------------------------


def cut_of(file: InputFile, documents: str, tail: float = 0.0) -> list[tuple[int, bytes, str | None]]:
    found = cut_files([file], pieces.PIECE_BYTES, tail)
    return [(offset, content, piece.split) for piece in found for offset, content in chunks(piece, documents)]


@settings(max_examples=120)
@given(TEXTS, st.integers(9, 60), st.integers(4, 30))
def test_a_long_file_is_cut_between_characters_and_joins_again(
    tmp_path: Path, text: bytes, piece_bytes: int, look_ahead: int
):
    with small_pieces(piece_bytes, min(look_ahead, piece_bytes - 1)):
        parts = cut_of(plain_file(tmp_path, text), "file")
        assert b"".join(content for _, content, _ in parts) == text
        assert [offset for offset, _, _ in parts] == [text.index(c, o) for o, c, _ in parts]
        assert all(0 < len(content) <= piece_bytes + look_ahead and content.decode() for _, content, _ in parts)


@settings(max_examples=120)
@given(TEXTS, st.integers(9, 60), st.integers(4, 30), st.floats(0.01, 0.99))
def test_the_tail_is_the_rest(tmp_path: Path, text: bytes, piece_bytes: int, look_ahead: int, tail: float):
    """Also where the cut of the tail falls just behind a regular one: no byte is both in training and validation."""
    look_ahead = min(look_ahead, piece_bytes - 1)
    with small_pieces(piece_bytes, look_ahead):
        parts = cut_of(plain_file(tmp_path, text), "file", tail)
        assert b"".join(content for _, content, _ in parts) == text
        train = sum(len(content) for _, content, split in parts if split == "train")
        assert [split for _, _, split in parts] == sorted(split for _, _, split in parts)  # train, then val
        asked = int(len(text) * (1 - tail))
        assert 0 <= train - asked <= (3 if asked % piece_bytes > look_ahead else look_ahead)
        text[:train].decode()


@settings(max_examples=120)
@given(TEXTS, st.sampled_from(COMPRESSIONS), st.integers(9, 60), st.integers(4, 30))
def test_a_compressed_file_is_cut_like_a_plain_one(
    tmp_path: Path, text: bytes, suffix: str, piece_bytes: int, look_ahead: int
):
    with small_pieces(piece_bytes, min(look_ahead, piece_bytes - 1)):
        assert cut_of(plain_file(tmp_path, text, suffix), "file") == cut_of(plain_file(tmp_path, text), "file")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("documents", "text"), [("line", b"x\n" + b"y" * 999), ("blank-line", b"x\n\n" + b"y\n" * 499)]
)
def test_what_never_ends_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: str, text: bytes, suffix: str
):
    monkeypatch.setattr(pieces, "LONGEST_DOCUMENT", 200)
    with (
        small_pieces(20),
        pytest.raises(DataError, match=rf"text.txt{suffix}: a document is longer .*\(from byte \d+\).*--documents"),
    ):
        cut_of(plain_file(tmp_path, text, suffix), documents)


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path):
    file = plain_file(tmp_path, b"some text\n" * 10)
    file.path.write_bytes(b"some")
    with pytest.raises(DataError, match=r"text\.txt became shorter while it was read"):
        cut_of(file, "file")


def test_a_very_long_run_of_blank_lines_takes_no_time():
    """A pattern that looks for the end of blank lines from each of them takes minutes for these."""
    text = b"a" + b"\n" * (1 << 18) + b"b"
    assert 5 < ends(end_of_paragraph, text, range(5, 6))[0] < len(text)
    assert split_paragraphs(text) == [b"a", b"b"]
    assert split_paragraphs(text[1:-1] + b" " * (1 << 18)) == [b""]
