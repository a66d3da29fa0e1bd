"""Pairs: two aligned files, plain or compressed, or columns of a table; each side keeps its place beside the other."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import EOS, ODD_TEXTS, files_of, items_of, run, small_pieces, snapshot, texts_of, token_rows, write

from data_prep import aligned
from data_prep.aligned import AlignedReader, LineIndex
from data_prep.corpus import COMPRESSIONS, InputFile
from data_prep.pairs import PairsKind
from data_prep.pieces import Piece
from data_prep.prepare import PrepareOptions, SplitsOf
from data_prep.tables import TableReader
from data_prep.tokenizer import build_tokenizer
from hvdtrain.errors import DataError, HvdtrainError

SUFFIXES = ("", *COMPRESSIONS)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "multi30k-en-fr"
# Lines of very different lengths, empty ones too, of both kinds of line end.
LINES = st.lists(
    st.sampled_from(["", "a", "漢字", "word " * 9, "é\u2028", " ", "x" * 90, "b\r"]), min_size=1, max_size=30
)
ROWS = [(f"source {n} 漢字", f"target {n} é" * (n % 4)) for n in range(90)]


def sides(folder: Path, sources: list[str], targets: list[str], packed: tuple[str, str] = ("", ""), end: str = "\n"):
    """The two files of a reader."""
    for name, lines, suffix in (("a.src", sources, packed[0]), ("a.tgt", targets, packed[1])):
        write(folder, **{f"{name}{suffix}": "\n".join(lines) + end})
    return files_of(folder / f"a.src{packed[0]}"), files_of(folder / f"a.tgt{packed[1]}")


def pairs_of(lines: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [tuple(text.removesuffix("\r").encode() for text in pair) for pair in lines]


# --- aligned files -----------------------------------------------------------------------------------------------


@settings(max_examples=70)
@given(LINES, st.data(), st.sampled_from(["\n", ""]), st.integers(1, 60), st.integers(1, 200), st.integers(1, 40))
def test_line_by_line_wherever_the_files_are_cut(
    tmp_path: Path, sources: list[str], data: st.DataObject, end: str, piece: int, unit: int, block: int
):
    targets = data.draw(st.lists(st.sampled_from(["", "c", "字" * 30]), min_size=len(sources), max_size=len(sources)))
    if not end:  # a last line that is empty and has no end is none
        sources, targets = [*sources, "last"], [*targets, "last"]
    with small_pieces(piece), pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligned, "_BLOCK", block)
        for packed in (("", ""), ("", ".gz"), (".gz", "")):
            reader = AlignedReader(*sides(tmp_path, sources, targets, packed, end))
            assert items_of(reader, unit) == pairs_of(list(zip(sources, targets, strict=True)))


@settings(max_examples=60)
@given(LINES, st.booleans(), st.integers(1, 50))
def test_an_index_finds_lines(tmp_path: Path, lines: list[str], ends: bool, block: int):
    content = "\n".join(lines).encode() + b"\n" * ends or b"x"
    (file,) = files_of(write(tmp_path, **{"a.txt": content}) / "a.txt")
    whole = content.split(b"\n")
    whole = whole[:-1] if not whole[-1] else whole
    begins = [sum(len(line) + 1 for line in whole[:number]) for number in range(len(whole))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligned, "_BLOCK", block)
        index = LineIndex(file)
        assert index.lines == len(whole)
        assert [index.byte_of(line) for line in range(len(whole))] == begins
        assert index.byte_of(len(whole)) == index.byte_of(len(whole) + 5) == len(content)
        assert [index.line_at(byte) for byte in range(len(content) + 1)] == [
            content[:byte].count(b"\n") for byte in range(len(content) + 1)
        ]


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("source", SUFFIXES)
def test_plain_or_compressed_in_every_combination(tmp_path: Path, byte: Path, source: str, target: str):
    def prepare(name: str, packed: tuple[str, str]) -> None:
        files = sides(tmp_path / name, *map(list, zip(*ROWS, strict=True)), packed)
        reader = AlignedReader(*files)
        manifest, _ = run(lambda: PairsKind(reader, EOS), byte, tmp_path / f"{name}-out", val_fraction=0.2)
        assert manifest.source["empty_side"] == 23  # every fourth target is empty

    prepare("plain", ("", ""))
    prepare("packed", (source, target))
    plain, packed = (snapshot(tmp_path / f"{name}-out") for name in ("plain", "packed"))
    assert {name for name in plain if plain[name] != packed[name]} <= {"manifest.json"}
    found = {
        pair
        for split in ("train", "val")
        for pair in zip(*(texts_of(tmp_path / "packed-out", split, f"{s}_") for s in ("source", "target")), strict=True)
    }
    assert found == {row for row in ROWS if row[1]}


@pytest.mark.parametrize("target", ["", ".gz"])
@pytest.mark.parametrize("source", ["", ".zst"])
@pytest.mark.parametrize("short", [0, 1])
def test_files_that_are_not_aligned_are_named_with_both_counts(
    tmp_path: Path, byte: Path, source: str, target: str, short: int
):
    lines = [["line"] * 1234, ["line"] * 1233]
    files = sides(tmp_path, lines[short], lines[1 - short], (source, target))
    counts = ("1,234", "1,233") if short == 0 else ("1,233", "1,234")
    message = rf"a\.src{source} has {counts[0]} lines but .*a\.tgt{target} has {counts[1]}: .* aligned line by line"
    with pytest.raises(HvdtrainError, match=message) as caught:
        run(lambda: PairsKind(AlignedReader(*files), EOS), byte, tmp_path / "out")
    assert caught.value.exit_code == 65
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("target", ["", ".gz"])
def test_an_empty_file_is_not_aligned_with_one_that_is_not(tmp_path: Path, target: str):
    write(tmp_path, **{"a.src": "one\n", "b.src": "", f"a.tgt{target}": "one\n", f"b.tgt{target}": "two\n"})
    sources, targets = (files_of(*(tmp_path / f"{n}{s}" for n in "ab")) for s in (".src", f".tgt{target}"))
    with pytest.raises(DataError, match=r"b\.src has 0 lines but .*b\.tgt.* has 1"):
        AlignedReader(sources, targets)


def test_one_source_may_have_two_targets(tmp_path: Path):
    """Several references, or several languages: each line is paired with both."""
    write(tmp_path, **{"a.en": "one\ntwo\n", "a.de": "eins\nzwei\n", "a.fr": "un\ndeux\n"})
    reader = AlignedReader(files_of(*[tmp_path / "a.en"] * 2), files_of(tmp_path / "a.de", tmp_path / "a.fr"))
    assert items_of(reader) == [(b"one", b"eins"), (b"two", b"zwei"), (b"one", b"un"), (b"two", b"deux")]


@pytest.mark.parametrize("side", [0, 1])
def test_bad_text_is_named_on_both_sides(tmp_path: Path, side: int):
    contents = [b"good\n" * 50, b"good\n" * 50]
    contents[side] = b"good\n" * 49 + b"caf\xe9\n"
    write(tmp_path, **{"a.src": contents[0], "a.tgt": contents[1]})
    reader = AlignedReader(files_of(tmp_path / "a.src"), files_of(tmp_path / "a.tgt"))
    with small_pieces(64), pytest.raises(DataError, match=rf"a\.{('src', 'tgt')[side]} is not UTF-8 text: byte 248"):
        items_of(reader, 100)


@pytest.mark.parametrize("side", ["src", "tgt"])
def test_either_side_makes_it_another_input(tmp_path: Path, byte: Path, side: str):
    """The target's name, size or bytes once did not count: shards of the old one were kept."""

    def prepare():
        reader = AlignedReader(files_of(tmp_path / "in" / "a.src"), files_of(tmp_path / "in" / "a.tgt"))
        return run(lambda: PairsKind(reader, EOS), byte, tmp_path / "out", shard_tokens=20)

    files = {"a.src": "source\n" * 30, "a.tgt": "target\n" * 30}
    write(tmp_path / "in", **files)
    assert prepare()[1] is False
    assert prepare()[1] is True
    name = f"a.{side}"
    write(tmp_path / "in", **{name: files[name].upper()})
    with pytest.raises(HvdtrainError, match=r"differing: contents"):
        prepare()
    write(tmp_path / "in", **{name: files[name].replace("e\n", "ee\n").replace("t\n", "tt\n")})
    with pytest.raises(HvdtrainError, match=r"differing: files_sha256"):
        prepare()
    write(tmp_path / "in", **files)  # the same bytes, written anew
    assert prepare()[1] is True


# --- what is kept ------------------------------------------------------------------------------------------------


def test_odd_texts_come_back_on_both_sides(tmp_path: Path, bpe: Path):
    texts = [text.strip("\r\n").replace("\n", " ") for text in ODD_TEXTS]
    rows = [(a, b) for a in texts for b in texts if a.strip() and b.strip()]
    files = sides(tmp_path, *map(list, zip(*rows, strict=True)))
    manifest, _ = run(lambda: PairsKind(AlignedReader(*files), EOS), bpe, tmp_path / "out", shard_tokens=500)
    found = zip(*(texts_of(tmp_path / "out", "train", f"{side}_") for side in ("source", "target")), strict=True)
    assert list(found) == rows
    assert manifest.kind == "pairs"
    assert sum(shard.target_tokens for shard in manifest.shards) > 0
    assert len(manifest.shards) > 3


def test_limits_hold_for_both_sides_and_empty_sides_are_counted(tmp_path: Path, byte: Path):
    #         tokens with the end   2..6
    rows = [
        ("a" * 5, "b" * 1),
        ("a" * 6, "b"),
        ("a", "b" * 6),
        ("", "b"),
        ("a", " \t"),
        ("", ""),
        ("a", "b"),
        ("a" * 9, ""),
    ]
    files = sides(tmp_path, *map(list, zip(*rows, strict=True)))
    kind = PairsKind(AlignedReader(*files), EOS, min_tokens=2, max_tokens=6)
    source = run(lambda: kind, byte, tmp_path / "out")[0].source
    assert [texts_of(tmp_path / "out", "train", f"{s}_") for s in ("source", "target")] == [["aaaaa", "a"], ["b", "b"]]
    assert (source["empty_side"], source["too_long"], source["documents"]) == (4, 2, 2)
    assert "too_short" not in source
    kind = PairsKind(AlignedReader(*files), EOS, min_tokens=3, max_tokens=6)
    with pytest.raises(HvdtrainError, match="nothing is left"):
        run(lambda: kind, byte, tmp_path / "none")


def test_a_pair_counts_once_in_the_limits(tmp_path: Path, byte: Path):
    files = sides(tmp_path, ["a", "ok ok"], ["b" * 99, "ok ok"])  # one side too short, the other too long
    kind = PairsKind(AlignedReader(*files), EOS, min_tokens=4, max_tokens=20)
    source = run(lambda: kind, byte, tmp_path / "out")[0].source
    assert (source["too_short"], source.get("too_long"), source["documents"]) == (1, None, 1)


def test_equal_pairs_are_left_out_but_not_equal_sides(tmp_path: Path, byte: Path):
    rows = [("a", "b"), ("a", "c"), ("a", "b"), ("ab", ""), ("d", "b")]
    files = sides(tmp_path, *map(list, zip(*rows, strict=True)))
    manifest, _ = run(lambda: PairsKind(AlignedReader(*files), EOS), byte, tmp_path / "out", deduplicate=True)
    assert texts_of(tmp_path / "out", "train", "source_") == ["a", "a", "d"]
    assert (manifest.source["duplicates"], manifest.source["empty_side"]) == (1, 1)


def test_a_pair_goes_to_validation_by_both_of_its_sides():
    piece = Piece(InputFile(Path("a"), "a", 1, 0), 0, 1, None)
    splits = SplitsOf(PrepareOptions(val_fraction=0.5))
    assert {splits((b"same", b"%d" % n), piece)[0] for n in range(20)} == {"train", "val"}
    assert splits((b"a", b"b"), piece)[1] != splits((b"ab", b""), piece)[1]


# --- tables ------------------------------------------------------------------------------------------------------


def test_tables_and_json_lines_give_the_same_pairs(tmp_path: Path, byte: Path):
    rows = [row for row in ROWS if row[1]]
    write(
        tmp_path,
        **{
            "a.tsv": "id\tsource\ttarget\n" + "".join(f"{n}\t{a}\t{b}\n" for n, (a, b) in enumerate(rows)),
            "b.jsonl": "".join(json.dumps({"target": b, "source": a}) + "\n" for a, b in rows),
            "c.tsv": "".join(f"{b}\t{a}\n" for a, b in rows),
        },
    )
    found = []
    for name, columns in (("a.tsv", ()), ("b.jsonl", ()), ("c.tsv", ("target", "source"))):
        reader = TableReader(files_of(tmp_path / name), ["source", "target"], columns)
        run(lambda: PairsKind(reader, EOS), byte, tmp_path / f"{name}-out", shard_tokens=200)  # noqa: B023
        found.append([token_rows(tmp_path / f"{name}-out", "train", f"{side}_") for side in ("source", "target")])
    assert found[0] == found[1] == found[2]
    assert texts_of(tmp_path / "a.tsv-out", "train", "source_") == [a for a, _ in rows]


# --- real ones ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason=f"there is no {SHARED}")
def test_multi30k(tmp_path: Path):
    """29,000 captions in English and French: what comes out is what is in the files."""
    texts = {
        side: (files_of(SHARED / f"train.{side}.gz")[0].read_all().decode()).split("\n")[:-1] for side in ("en", "fr")
    }
    build_tokenizer([text for side in texts.values() for text in side[:3000]], "bpe", 2000).save(
        str(tmp_path / "t.json")
    )
    sources, targets = (
        [file for split, name in ((None, "train"), ("val", "val"), ("test", "test_2016_flickr"))
         for file in files_of(SHARED / f"{name}.{side}.gz", split=split)]
        for side in ("en", "fr")
    )  # fmt: skip
    manifest, _ = run(
        lambda: PairsKind(AlignedReader(sources, targets), EOS, max_tokens=1024),
        tmp_path / "t.json",
        tmp_path / "out",
        2,
    )
    counts = {split: sum(shard.documents for shard in manifest.split(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 29_000, "val": 1_014, "test": 1_000}
    assert texts_of(tmp_path / "out", "train", "source_") == texts["en"]
    assert texts_of(tmp_path / "out", "train", "target_") == texts["fr"]
