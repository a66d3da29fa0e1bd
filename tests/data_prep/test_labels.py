"""Labelled texts: how labels are numbered, how long texts are cut, and what a label without training data is."""

import hashlib
import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import ODD_TEXTS, files_of, run, shards_of, snapshot, token_rows, write
from tokenizers import Tokenizer

from data_prep import prepare as prepare_module
from data_prep.__main__ import main
from data_prep.label_cells import ONE_LABEL, LabelCells, read_label_names
from data_prep.labels import LabelsKind, _shortened
from data_prep.tables import TableReader
from data_prep.tokenizer_file import load_tokenizer
from hvdtrain.data.check import check_shards
from hvdtrain.data.records import Records
from hvdtrain.data.shards import Manifest, frame_tokens, read_manifest, target_begin
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, ConfigError, HvdtrainError


def table(rows: list[tuple[str, ...]], head: tuple[str, ...] = ("label", "text")) -> str:
    return "".join("\t".join(row) + "\n" for row in (head, *rows))


class Labels:
    """Tables of a folder, one split each, and preparations of them."""

    def __init__(self, folder: Path, tokenizer: Path, fields: tuple[str, ...] = ("label", "text")):
        self.folder, self.tokenizer, self.fields = folder, tokenizer, fields
        self.special = load_tokenizer(tokenizer).special
        self.cls, self.sep = frame_tokens(self.special)
        self.out = folder / "out"

    def prepare(self, ranks: int = 1, most: int = 512, cells: LabelCells = ONE_LABEL, **options) -> Manifest:
        files = [
            file
            for split in ("train", "val", "test")
            if (self.folder / split).exists()
            for file in files_of(self.folder / split, split=None if split == "train" else split)
        ]
        return run(
            lambda: LabelsKind(
                TableReader(files, self.fields, label=self.fields[0]), (self.cls, self.sep), most, cells
            ),
            self.tokenizer,
            self.out,
            ranks,
            **options,
        )[0]

    def rows(self, split: str = "train") -> list[tuple[str, list[int]]]:
        """(label, tokens) of each text."""
        names = read_manifest(self.out).label_names
        numbers = [number for shard in shards_of(self.out, split) for number in shard["labels"]]
        return list(zip((names[number] for number in numbers), token_rows(self.out, split), strict=True))

    def framed(self, *texts: str) -> list[int]:
        tokenizer = Tokenizer.from_file(str(self.tokenizer))
        tokenizer.encode_special_tokens = True
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [self.cls, *(token for part in ids for token in (*part, self.sep))]


@pytest.fixture
def labels(tmp_path: Path, bpe: Path) -> Labels:
    return Labels(tmp_path, bpe)


# --- the labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_labels", "names"),
    [
        (["pos", "neg", "neutral"], ("neg", "neutral", "pos")),
        (["10", "9", "-1", "2"], ("-1", "2", "9", "10")),  # numbers in the order of numbers
        (["10", "9", "x"], ("10", "9", "x")),  # but not where there is a word
        (["1", "01", "1.0"], ("01", "1", "1.0")),
        (["01", "1", "001"], ("001", "01", "1")),
        (["-", "3"], ("-", "3")),
        (["--1", "3"], ("--1", "3")),
        (["é", "e", "漢", " ", "Z"], (" ", "Z", "e", "é", "漢")),
    ],
)
def test_numbers_are_ordered_as_numbers_names_by_their_letters(labels: Labels, given_labels, names):
    rows = [(label, f"text {n}") for n, label in enumerate(given_labels * 3)]
    write(labels.folder / "train", **{"a.tsv": table(rows)})
    for ranks in (1, 3):
        labels.out = labels.folder / f"out{ranks}"
        assert labels.prepare(ranks, shard_tokens=5).label_names == names
        assert [label for label, _ in labels.rows()] == [label for label, _ in rows]
    assert snapshot(labels.folder / "out1") == snapshot(labels.folder / "out3")


def test_texts_come_back_with_their_labels(labels: Labels):
    texts = [text.strip("\r\n").replace("\n", " ").replace("\t", " ") for text in ODD_TEXTS]
    rows = [(f"label {n % 3}", text) for n, text in enumerate(texts)]
    write(labels.folder / "train", **{"a.tsv": table(rows)})
    manifest = labels.prepare()
    assert labels.rows() == [(label, labels.framed(text)) for label, text in rows]
    assert (manifest.kind, "cut_short" in manifest.source) == ("labels", False)


def test_json_lines_give_what_a_table_gives(labels: Labels, tmp_path: Path):
    rows = [(str(n % 2), f"text {n}") for n in range(20)]
    write(labels.folder / "train", **{"a.tsv": table(rows)})
    labels.prepare()
    other = Labels(tmp_path / "json", labels.tokenizer)
    lines = (json.dumps({"text": text, "label": int(label)}) for label, text in rows)
    write(other.folder / "train", **{"a.jsonl": "\n".join(lines)})
    other.prepare()
    assert other.rows() == labels.rows()
    assert (other.out / "train-00000.h5").read_bytes() == (labels.out / "train-00000.h5").read_bytes()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_label_that_training_never_has_is_named_with_its_file(labels: Labels, split: str, ranks: int):
    write(labels.folder / "train", **{"a.tsv": table([("pos", "x"), ("neg", "y")])})
    write(labels.folder / split, **{"b.tsv": table([("pos", "x")]), "c.tsv": table([("neg", "x"), ("neutral", "y")])})
    message = rf"c\.tsv: label 'neutral' of the {split} split is never seen in training, which has 2: neg, pos"
    with pytest.raises(HvdtrainError, match=message) as caught:
        labels.prepare(ranks, shard_tokens=1)
    assert caught.value.exit_code == 65
    assert not (labels.out / "manifest.json").exists()


def test_many_labels_are_not_all_listed(labels: Labels):
    write(labels.folder / "train", **{"a.tsv": table([(f"{n}", "x") for n in range(50)])})
    write(labels.folder / "val", **{"b.tsv": table([("51", "x")])})
    with pytest.raises(HvdtrainError, match=r"which has 50: 0, 1, .*, 19, \.\.\. \(--skip-bad"):
        labels.prepare()


def test_validation_may_lack_a_label(labels: Labels):
    write(labels.folder / "train", **{"a.tsv": table([("pos", "x"), ("neg", "y")])})
    write(labels.folder / "val", **{"b.tsv": table([("pos", "z")])})
    assert labels.prepare().label_names == ("neg", "pos")
    assert labels.rows("val") == [("pos", labels.framed("z"))]


# --- the texts ---------------------------------------------------------------------------------------------------


def test_what_stands_around_a_text():
    assert frame_tokens({"eos": 0, "bos": 1, "cls": 2, "sep": 3}) == (2, 3)
    assert frame_tokens({"eos": 0, "bos": 1}) == (1, 0)
    assert frame_tokens({"eos": 7}) == (7, 7)
    assert [target_begin(special) for special in ({"eos": 7, "bos": 1}, {"eos": 7}, {"cls": 0})] == [1, 7, None]


def test_two_texts_make_one(tmp_path: Path, bpe: Path):
    labels = Labels(tmp_path, bpe, ("label", "text", "second"))
    rows = [("1", "first text", "second, longer text"), ("0", "é漢", "x"), ("1", "", "only the second")]
    write(tmp_path / "train", **{"a.tsv": table(rows, ("label", "text", "second"))})
    labels.prepare()
    assert labels.rows() == [(label, labels.framed(one, two)) for label, one, two in rows]


def test_a_long_text_loses_its_end_and_is_counted(tmp_path: Path, byte: Path):
    labels = Labels(tmp_path, byte)
    write(tmp_path / "train", **{"a.tsv": table([("1", "abcdefgh"), ("1", "abcdef"), ("0", "abc")])})
    assert labels.prepare(most=8).source["cut_short"] == 1
    assert [tokens for _, tokens in labels.rows()] == [
        labels.framed("abcdef"), labels.framed("abcdef"), labels.framed("abc"),
    ]  # fmt: skip
    labels.out = tmp_path / "no limit"
    assert "cut_short" not in labels.prepare(most=0).source
    assert labels.rows()[0][1] == labels.framed("abcdefgh")


def test_of_two_long_texts_the_longer_gives_first(tmp_path: Path, byte: Path):
    labels = Labels(tmp_path, byte, ("label", "text", "second"))
    rows = [
        ("1", "abcdefghij", "xyz"),
        ("1", "abc", "uvwxyzuvwxyz"),
        ("0", "abcdefghij", "qrstuvwxyz"),
        ("0", "a", "b"),
    ]
    write(tmp_path / "train", **{"a.tsv": table(rows, ("label", "text", "second"))})
    labels.prepare(most=11)
    expected = [("abcde", "xyz"), ("abc", "uvwxy"), ("abcd", "qrst"), ("a", "b")]
    assert [tokens for _, tokens in labels.rows()] == [labels.framed(*pair) for pair in expected]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=2), st.integers(0, 40))
def test_shortening(lengths: list[int], room: int):
    parts = [np.arange(length) for length in lengths]
    cut = [len(part) for part in _shortened(parts, room)]
    assert sum(cut) == min(room, sum(lengths))
    assert all(0 <= after <= before for after, before in zip(cut, lengths, strict=True))
    if len(cut) == 2 and sum(lengths) > room:
        short, long = sorted(range(2), key=lambda at: lengths[at])
        assert cut[short] == lengths[short] or abs(cut[0] - cut[1]) <= 1  # cut only when both are equally long
        assert cut[long] >= cut[short] or cut[short] - cut[long] == 1


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_room_for_text_is_refused(most: int):
    with pytest.raises(ConfigError, match=f"--max-tokens {most} leaves no room for text; it must be above 3"):
        LabelsKind(TableReader([], ["label", "text"]), (0, 0), most)


def test_equal_texts_are_left_out_where_their_labels_are_equal_too(labels: Labels):
    write(labels.folder / "train", **{"a.tsv": table([("1", "x"), ("0", "x"), ("1", "x"), ("1", "y")])})
    assert labels.prepare(deduplicate=True).source["duplicates"] == 1
    assert Counter(label for label, _ in labels.rows()) == {"1": 2, "0": 1}


# --- rare labels -------------------------------------------------------------------------------------------------


def in_validation(label: str, text: str, fraction: float) -> bool:
    """By the digest alone."""
    digest = hashlib.sha256(f"{label}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < int(fraction * 2**64)


def rare_rows() -> list[tuple[str, str]]:
    """Two labels with texts enough, and several of which chance gives every text to validation."""
    common = [(f"{number % 2}", f"text {number}") for number in range(60)]
    chance = [(f"rare{label}", f"{label} {number}") for label in range(40) for number in range(2)]
    by_label = [chance[at : at + 2] for at in range(0, len(chance), 2)]
    rare = [pair for pair in by_label if all(in_validation(*row, 0.5) for row in pair)]
    assert 5 < len(rare) < 15
    singles = [(f"single{number}", "x") for number in range(20) if in_validation(f"single{number}", "x", 0.5)]
    return [row for rows in ([common], rare, [singles]) for part in rows for row in part]


def test_a_rare_label_keeps_one_text_in_training(labels: Labels):
    """Ours refused its own split: the label of the val split is never seen in training."""
    rows = rare_rows()
    write(labels.folder / "train", **{"a.tsv": table(rows[::2]), "b.tsv": table(rows[1::2])})
    manifest = labels.prepare(val_fraction=0.5)
    trained, validated = (labels.rows(split) for split in ("train", "val"))
    assert {label for label, _ in trained} == {label for label, _ in rows}
    moved = [row for row in rows if in_validation(*row, 0.5) and (row[0], labels.framed(row[1])) in trained]
    # One text of each rare label, that with the highest digest; every other one is where its digest puts it.
    rare = {label for label, _ in rows} - {label for label, text in rows if not in_validation(label, text, 0.5)}
    assert sorted(label for label, _ in moved) == sorted(rare)
    for label, text in moved:
        digests = {hashlib.sha256(f"{label}\0{other}".encode()).digest() for one, other in rows if one == label}
        assert hashlib.sha256(f"{label}\0{text}".encode()).digest() == max(digests)
    expected = [row for row in rows if in_validation(*row, 0.5) and row not in moved]
    assert Counter((label, tuple(row)) for label, row in validated) == Counter(
        (label, tuple(labels.framed(text))) for label, text in expected
    )
    assert manifest.source["kept_in_training"] == len(rare)


def test_what_is_kept_does_not_depend_on_ranks_or_files(labels: Labels):
    rows = rare_rows()
    write(labels.folder / "train", **{f"{number}.tsv": table(rows[number::5]) for number in range(5)})
    for ranks in (1, 3):
        labels.out = labels.folder / f"out{ranks}"
        labels.prepare(ranks, val_fraction=0.5, shard_tokens=20)
    assert snapshot(labels.folder / "out1") == snapshot(labels.folder / "out3")
    whole = sorted(labels.rows("val"))
    for path in (labels.folder / "train").iterdir():
        path.unlink()
    write(labels.folder / "train", **{"all.tsv": table(rows[::-1])})
    labels.out = labels.folder / "one file"
    labels.prepare(val_fraction=0.5)
    assert sorted(labels.rows("val")) == whole


def test_equal_texts_of_a_rare_label_stay_together(labels: Labels):
    """Or validation would hold what was trained on."""
    label, text = next((f"r{n}", "x") for n in range(99) if in_validation(f"r{n}", "x", 0.5))
    write(labels.folder / "train", **{"a.tsv": table([("0", f"{n}") for n in range(20)] + [(label, text)] * 3)})
    assert labels.prepare(val_fraction=0.5).source["kept_in_training"] == 3
    assert label not in {one for one, _ in labels.rows("val")}


def test_an_interrupted_preparation_keeps_the_same(labels: Labels, monkeypatch: pytest.MonkeyPatch):
    """Another file is added meanwhile, which has a rare label's text for training: then none needs to be kept."""
    label = next(f"r{n}" for n in range(99) if in_validation(f"r{n}", "x", 0.5))
    other = next(f"y{n}" for n in range(99) if not in_validation(label, f"y{n}", 0.5))
    write(labels.folder / "train", **{"a.tsv": table([("0", f"{n}") for n in range(9)] + [(label, "x")])})
    write(labels.folder / "train", **{"b.tsv": table([("1", f"{n}") for n in range(9)])})
    finish = prepare_module._Preparation._finish

    def stopped(job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module._Preparation, "_finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        labels.prepare(val_fraction=0.5, shard_tokens=1)
    monkeypatch.setattr(prepare_module._Preparation, "_finish", finish)
    times = [path.stat().st_mtime_ns for path in sorted((labels.out).glob("*.h5"))]
    assert labels.prepare(val_fraction=0.5, shard_tokens=1).source["kept_in_training"] == 1
    assert [path.stat().st_mtime_ns for path in sorted((labels.out).glob("*.h5"))] == times  # nothing was made anew
    # Now the same size of b.tsv, and in it a text of the rare label.
    shutil.rmtree(labels.out)
    monkeypatch.setattr(prepare_module._Preparation, "_finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        labels.prepare(val_fraction=0.5, shard_tokens=1)
    monkeypatch.setattr(prepare_module._Preparation, "_finish", finish)
    path = labels.folder / "train" / "b.tsv"
    content = table([(label, other)])
    path.write_text(content + table([("1", "filler".ljust(path.stat().st_size - len(content) - 3, "."))], ())[1:])
    size = path.stat().st_size
    assert labels.prepare(val_fraction=0.5, shard_tokens=1).source.get("kept_in_training") is None, size
    assert (label, labels.framed("x")) in labels.rows("val")


def test_labels_of_explicit_splits_that_training_lacks_can_be_left_out(tmp_path: Path, bpe: Path, capsys):
    write(tmp_path, **{"train.tsv": table([("pos", "x"), ("neg", "y")])})
    write(
        tmp_path, **{"val.tsv": table([("pos", "a"), ("neutral", "b"), ("neg", "c")]), "test.tsv": table([("?", "d")])}
    )
    words = ["labels", "--input", tmp_path / "train.tsv", "--val-input", tmp_path / "val.tsv"]
    words += ["--test-input", tmp_path / "test.tsv", "--tokenizer", bpe, "--out", tmp_path / "out"]
    assert main([*map(str, words)]) == EXIT_BAD_DATA
    assert "label 'neutral' of the val split is never seen in training" in capsys.readouterr().err
    assert main([*map(str, words), "--skip-bad"]) == EXIT_OK
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.source["bad_unseen"], manifest.label_names) == (2, ("neg", "pos"))
    assert [shard["labels"] for shard in shards_of(tmp_path / "out", "val")] == [[1, 0]]
    assert not manifest.split("test")
    printed = capsys.readouterr()
    assert "left out as bad: 2 with a label that training never has" in printed.out
    assert "left out: " in printed.err
    assert "val.tsv: label 'neutral' of the val split" in printed.err


def test_the_count_of_kept_texts_is_said(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, **{"in.tsv": table(rare_rows())})
    words = [
        "labels",
        "--input",
        tmp_path / "in.tsv",
        "--val-fraction",
        0.5,
        "--tokenizer",
        bpe,
        "--out",
        tmp_path / "o",
    ]
    assert main([*map(str, words)]) == EXIT_OK
    count = read_manifest(tmp_path / "o").source["kept_in_training"]
    assert f"{count} of labels that only validation had kept in training" in capsys.readouterr().out


# --- several labels, and names for them ---------------------------------------------------------------------------


SEVERAL = [("4,27", "a"), ("27", "b"), (" 4 , 10 ", "c"), ("10,4,10", "d")]


def several_labels(folder: Path, split: str = "train") -> list[list[str]]:
    """The names of the labels of each text."""
    names, found = read_manifest(folder).label_names, []
    for shard in shards_of(folder, split):
        ends = shard["label_offsets"]
        found += [[names[n] for n in shard["labels"][a:b]] for a, b in pairwise(ends)]
    return found


def prepare_labels(folder: Path, tokenizer: Path, *words: object, out: str = "out") -> int:
    fixed = ["labels", "--tokenizer", tokenizer, "--out", folder / out, "--val-fraction", 0]
    return main([*map(str, fixed), *map(str, words)])


def test_a_text_may_have_several_labels(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, **{"in.tsv": table(SEVERAL)})
    assert prepare_labels(tmp_path, bpe, "--input", tmp_path / "in.tsv", "--multi-label", ",") == EXIT_OK
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.label_names, manifest.version) == (("4", "10", "27"), 2)
    assert several_labels(tmp_path / "out") == [["4", "27"], ["27"], ["4", "10"], ["4", "10"]]
    assert "1 labels that were said before of the same text" in capsys.readouterr().out
    assert check_shards(tmp_path / "out", manifest, manifest.shards) == []
    records = Records(tmp_path / "out", manifest, "train")
    assert records.many_hot(np.array([0, 3]), 3).astype(int).tolist() == [[1, 0, 1], [1, 1, 0]]
    # The same table without the word: each cell is a label of its own, and the shards are as they always were.
    assert prepare_labels(tmp_path, bpe, "--input", tmp_path / "in.tsv", out="one") == EXIT_OK
    manifest = read_manifest(tmp_path / "one")
    assert (len(manifest.label_names), manifest.version) == (4, 1)
    assert "label" not in "".join(manifest.source.keys() - {"labels"})


def test_several_labels_are_the_same_for_any_number_of_ranks(labels: Labels):
    rows = [(",".join(str(label) for label in range(n % 5, 5)), f"text {n}") for n in range(40)]
    write(labels.folder / "train", **{"a.tsv": table(rows)})
    cells = LabelCells(",")
    for ranks in (1, 3):
        labels.out = labels.folder / f"out{ranks}"
        labels.prepare(ranks, cells=cells, shard_tokens=9, val_fraction=0.3)
    assert snapshot(labels.folder / "out1") == snapshot(labels.folder / "out3")
    both = several_labels(labels.out) + several_labels(labels.out, "val")
    assert sorted(both) == sorted(label.split(",") for label, _ in rows)


def test_names_give_labels_their_numbers(tmp_path: Path, bpe: Path):
    """Those that no text has too; a table may say the name or the number."""
    write(tmp_path, **{"in.tsv": table([("2", "a"), ("joy,0", "b")]), "labels.txt.gz": "anger\njoy\nsorrow\nawe\n"})
    words = ["--input", tmp_path / "in.tsv", "--label-names", tmp_path / "labels.txt.gz"]
    assert prepare_labels(tmp_path, bpe, *words, "--multi-label", ",") == EXIT_OK
    assert read_manifest(tmp_path / "out").label_names == ("anger", "joy", "sorrow", "awe")
    assert several_labels(tmp_path / "out") == [["sorrow"], ["anger", "joy"]]
    assert prepare_labels(tmp_path, bpe, *words, out="one") == EXIT_BAD_DATA  # "joy,0" is no name


@pytest.mark.parametrize(
    ("cell", "kind", "message"),
    [
        ("1,", "label", "a text has an empty label in '1,'"),
        ("7", "unnamed", "a text has the label '7', which is neither one of the 2 names of --label-names nor their"),
        ("-1", "unnamed", "a text has the label '-1', which is neither"),
        ("fear", "unnamed", "a text has the label 'fear', which is neither"),
    ],
)
def test_cells_that_say_no_labels(tmp_path: Path, bpe: Path, capsys, cell: str, kind: str, message: str):
    write(tmp_path, **{"in.tsv": table([("1", "a"), (cell, "b"), (cell, "c")]), "labels.txt": "anger\njoy\n"})
    words = ["--input", tmp_path / "in.tsv", "--label-names", tmp_path / "labels.txt", "--multi-label", ","]
    assert prepare_labels(tmp_path, bpe, *words) == EXIT_BAD_DATA
    assert f"in.tsv: {message}" in capsys.readouterr().err
    assert prepare_labels(tmp_path, bpe, *words, "--skip-bad") == EXIT_OK
    assert read_manifest(tmp_path / "out").source[f"bad_{kind}"] == 2
    assert several_labels(tmp_path / "out") == [["joy"]]


def test_a_label_of_several_that_training_never_has(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, **{"in.tsv": table(SEVERAL), "val.tsv": table([("4", "x"), ("27,5", "y")])})
    words = ["--input", tmp_path / "in.tsv", "--val-input", tmp_path / "val.tsv", "--multi-label", ","]
    assert prepare_labels(tmp_path, bpe, *words) == EXIT_BAD_DATA
    assert "val.tsv: label '5' of the val split is never seen in training, which has 3: 4, 10, 27" in (
        capsys.readouterr().err
    )
    assert prepare_labels(tmp_path, bpe, *words, "--skip-bad") == EXIT_OK
    assert several_labels(tmp_path / "out", "val") == [["4"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n\nb\n", "line 2 is empty; each line names a label"),
        ("a\nb\na\n", "lines 1 and 3 are both 'a'"),
        (b"a\n\xff\n", "is not UTF-8"),
    ],
)
def test_names_that_are_none(tmp_path: Path, content: str | bytes, message: str):
    write(tmp_path, **{"labels.txt": content})
    with pytest.raises(HvdtrainError, match=message):
        read_label_names(tmp_path / "labels.txt")
    with pytest.raises(ConfigError, match="is a folder; it must be a file with a name a line"):
        read_label_names(tmp_path)


def test_goemotions_is_read_whole(tmp_path: Path, bpe: Path):
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "goemotions"
    if not folder.is_dir():
        pytest.skip("no GoEmotions in ../shared")
    words = ["--input", folder / "dev.tsv.gz", "--columns", "text", "label", "id", "--multi-label", ","]
    words += ["--label-names", folder / "labels.txt.gz", "--val-fraction", 0]
    assert prepare_labels(tmp_path, bpe, *words) == EXIT_OK
    manifest = read_manifest(tmp_path / "out")
    assert (len(manifest.label_names), manifest.label_names[27]) == (28, "neutral")
    found = several_labels(tmp_path / "out")
    assert (len(found), sum(map(len, found))) == (5426, 6380)
