"""Text -> shards: nothing is lost, the split is where it was asked for, and limits are kept and counted."""

import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import (
    ODD_TEXTS,
    TEXTS,
    files_of,
    plain_documents,
    run,
    small_pieces,
    snapshot,
    text_kind,
    texts_of,
    token_rows,
    write,
)

from data_prep.corpus import COMPRESSIONS
from data_prep.text import within
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.data.shards import Manifest, read_manifest
from hvdtrain.errors import HvdtrainError

KINDS = ("bpe", "unigram", "byte", "char")


class Corpus:
    """A folder of texts, and preparations of it."""

    def __init__(self, folder: Path, texts: list[str]):
        self.folder = folder
        write(folder / "in", **{f"{number:03}.txt": text for number, text in enumerate(texts)})

    def prepare(self, tokenizer: Path, out: str = "out", documents: str = "file", **options) -> tuple[Manifest, bool]:
        files = files_of(self.folder / "in")
        return run(lambda: text_kind(files, documents), tokenizer, self.folder / out, **options)

    def texts(self, split: str = "train", out: str = "out") -> list[str]:
        return texts_of(self.folder / out, split)


# --- nothing is lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_tokens", [1, 40, 1 << 20])
def test_every_text_comes_back(tmp_path: Path, tokenizers_of: dict[str, Path], kind: str, shard_tokens: int):
    """Scripts of all directions, emoji families, marks that combine, private use, U+2028, BOM, CR LF, ..."""
    corpus = Corpus(tmp_path, ODD_TEXTS)
    manifest, reused = corpus.prepare(tokenizers_of[kind], shard_tokens=shard_tokens)
    assert corpus.texts() == ODD_TEXTS
    assert (reused, manifest.kind, manifest.split("val")) == (False, "text", ())
    assert manifest.source["documents"] == len(ODD_TEXTS) == sum(shard.documents for shard in manifest.shards)
    assert manifest.source["text_bytes"] == sum(len(text.encode()) for text in ODD_TEXTS)
    assert manifest.special_tokens["eos"] == 0
    if shard_tokens == 1:
        assert len(manifest.shards) == len(ODD_TEXTS)


@settings(max_examples=15)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1),
    st.sampled_from(["bpe", "byte"]),
)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, tokenizers_of: dict[str, Path], texts: list[str], kind: str
):
    corpus = Corpus(tmp_path_factory.mktemp("any"), texts)
    corpus.prepare(tokenizers_of[kind], val_fraction=0.3, val_split="tail")
    assert "".join(corpus.texts("train") + corpus.texts("val")) == "".join(texts)


@settings(max_examples=15)
@given(TEXTS, st.sampled_from(["line", "blank-line"]), st.integers(8, 50), st.integers(1, 200))
def test_documents_go_through_pieces_units_and_shards(
    tmp_path_factory: pytest.TempPathFactory, byte: Path, text: bytes, documents: str, piece: int, shard_tokens: int
):
    folder = tmp_path_factory.mktemp("pieces")
    expected = [one.decode() for one in plain_documents(text, documents)]
    files = files_of(write(folder / "in", **{"a.txt": text}))
    with small_pieces(piece):
        if not expected:
            with pytest.raises(HvdtrainError, match="nothing is left of the input"):
                run(lambda: text_kind(files, documents), byte, folder / "out", shard_tokens=shard_tokens)
            return
        run(lambda: text_kind(files, documents), byte, folder / "out", shard_tokens=shard_tokens)
    assert texts_of(folder / "out", "train") == expected


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("documents", ["file", "line", "blank-line"])
def test_compressed_input_gives_the_same_shards(tmp_path: Path, bpe: Path, suffix: str, documents: str):
    texts = {f"{n}.txt": text * 3 for n, text in enumerate(ODD_TEXTS)}
    write(tmp_path / "plain", **texts)
    write(tmp_path / "packed", **{f"{name}{suffix}": text for name, text in texts.items()})
    for name in ("plain", "packed"):
        files = files_of(tmp_path / name)
        run(lambda: text_kind(files, documents), bpe, tmp_path / f"{name}-out", val_fraction=0.5)  # noqa: B023
    plain, packed = (snapshot(tmp_path / f"{name}-out") for name in ("plain", "packed"))
    assert {"train-00000.h5", "val-00000.h5", "tokenizer.json"} < set(plain)
    assert {name for name in plain if plain[name] != packed[name]} == {"manifest.json"}  # it knows the files' names
    assert read_manifest(tmp_path / "plain-out").data_digest == read_manifest(tmp_path / "packed-out").data_digest


def test_composed_or_replaced_on_request(tmp_path: Path, bpe: Path):
    files = files_of(write(tmp_path / "in", **{"a.txt": "e\u0301 漢", "b.txt": b"caf\xe9 \xff"}))
    kind = text_kind(files, cleaning=Cleaning("replace", nfc=True))
    manifest, _ = run(lambda: kind, bpe, tmp_path / "out")
    assert texts_of(tmp_path / "out", "train") == ["é 漢", "caf\ufffd \ufffd"]
    assert manifest.source["replaced_characters"] == 2
    assert (manifest.source["invalid_utf8"], manifest.source["nfc"]) == ("replace", True)


def test_odd_texts_composed(tmp_path: Path, bpe: Path):
    files = files_of(write(tmp_path / "in", **{f"{n:02}.txt": text for n, text in enumerate(ODD_TEXTS)}))
    run(lambda: text_kind(files, cleaning=Cleaning(nfc=True)), bpe, tmp_path / "out")
    assert texts_of(tmp_path / "out", "train") == [unicodedata.normalize("NFC", text) for text in ODD_TEXTS]


def test_an_empty_file_is_no_document(tmp_path: Path, bpe: Path):
    corpus = Corpus(tmp_path, ["a", "", "b"])
    assert corpus.prepare(bpe)[0].source["documents"] == 2
    assert corpus.texts() == ["a", "b"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, bpe: Path):
    corpus = Corpus(tmp_path, ODD_TEXTS)
    for out in ("a", "b"):
        corpus.prepare(bpe, out, shard_tokens=50, val_fraction=0.3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert {"manifest.json", "tokenizer.json", "train-00000.h5"} <= set(snapshot(tmp_path / "a"))


def test_more_tokens_than_two_bytes_tell(tmp_path: Path, byte: Path):
    """A vocabulary above 65,536 takes four bytes a token."""
    fields = json.loads(byte.read_text(encoding="utf-8"))
    fields["model"]["vocab"]["b"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(fields), encoding="utf-8")
    corpus = Corpus(tmp_path, ["abc"])
    manifest, _ = corpus.prepare(tmp_path / "large.json")
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert token_rows(tmp_path / "out", "train")[0][1] == 70_000
    assert corpus.texts() == ["abc"]


# --- the split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_the_tail_is_cut_at_the_byte(tmp_path: Path, byte: Path, fraction: float):
    corpus = Corpus(tmp_path, ["abcdefghij" * 10, "klmnopqrst" * 20])
    corpus.prepare(byte, val_split="tail", val_fraction=fraction)
    whole = "abcdefghij" * 10 + "klmnopqrst" * 20
    cut = int(300 * (1 - fraction))
    assert ("".join(corpus.texts("train")), "".join(corpus.texts("val"))) == (whole[:cut], whole[cut:])


@pytest.mark.parametrize("text", ["漢字かな" * 3, "é" * 20, "a\U0001f600" * 7])
def test_the_tail_never_cuts_a_character(tmp_path: Path, byte: Path, text: str):
    raw = text.encode()
    for number, fraction in enumerate(cut / len(raw) for cut in range(1, 12)):
        corpus = Corpus(tmp_path / str(number), [text])
        corpus.prepare(byte, val_split="tail", val_fraction=fraction)
        train, val = "".join(corpus.texts("train")), "".join(corpus.texts("val"))
        assert train + val == text
        at = int(len(raw) * (1 - fraction))
        assert 0 <= len(train.encode()) - at < 4  # moved on to the next character, no further


def test_the_tail_of_lines_is_whole_lines(tmp_path: Path, byte: Path):
    corpus = Corpus(tmp_path, ["".join(f"line {n}\n" for n in range(100))])
    corpus.prepare(byte, documents="line", val_split="tail", val_fraction=0.25, shard_tokens=50)
    train, val = corpus.texts("train"), corpus.texts("val")
    assert train + val == [f"line {n}" for n in range(100)]
    assert 70 <= len(train) <= 80


def test_a_tail_of_compressed_files_is_refused(tmp_path: Path, byte: Path):
    write(tmp_path / "in", **{"a.txt.gz": "text " * 100})
    files = files_of(tmp_path / "in")
    with pytest.raises(HvdtrainError, match=r"a.txt.gz cannot be cut; use --val-split hash"):
        run(lambda: text_kind(files), byte, tmp_path / "out", val_split="tail", val_fraction=0.1)
    plain = files_of(write(tmp_path, **{"b.txt": "text " * 100}) / "b.txt")
    held_out = files_of(tmp_path / "in", split="val")  # of which none is cut
    run(lambda: text_kind([*plain, *held_out]), byte, tmp_path / "out", val_split="tail", val_fraction=0.1)
    assert texts_of(tmp_path / "out", "val") == ["text " * 10, "text " * 100]


def test_hash_goes_by_each_text_alone(tmp_path: Path, byte: Path):
    """Added documents never move others between training and validation: no leak from one version to the next."""
    texts = [f"document {number}" for number in range(200)]
    few, many = Corpus(tmp_path / "few", texts[::2]), Corpus(tmp_path / "many", texts)
    for corpus in (few, many):
        corpus.prepare(byte, val_fraction=0.2)
    assert set(few.texts("val")) == set(many.texts("val")) & set(texts[::2])
    assert set(few.texts("train")) == set(many.texts("train")) & set(texts[::2])
    assert 20 <= len(many.texts("val")) <= 60  # 40 expected
    more = Corpus(tmp_path / "more", texts)
    more.prepare(byte, val_fraction=0.4)
    assert set(many.texts("val")) < set(more.texts("val"))  # a larger fraction only adds
    most = Corpus(tmp_path / "most", texts)
    most.prepare(byte, val_fraction=1 - 2**-53)  # the largest below 1
    assert len(most.texts("val")) == 200


def test_files_may_be_for_one_split_as_a_whole(tmp_path: Path, byte: Path):
    files = [
        *files_of(write(tmp_path / "train", **{"a.txt": "a", "b.txt": "b"})),
        *files_of(write(tmp_path / "val", **{"a.txt": "c"}), split="val"),
        *files_of(write(tmp_path / "test", **{"a.txt": "d"}), split="test"),
    ]
    manifest, _ = run(lambda: text_kind(files), byte, tmp_path / "out")
    assert [texts_of(tmp_path / "out", split) for split in ("train", "val", "test")] == [["a", "b"], ["c"], ["d"]]
    assert [shard.split for shard in manifest.shards] == ["train", "val", "test"]


# --- limits ------------------------------------------------------------------------------------------------------


def test_the_end_of_text_counts():
    counts: Counter = Counter()
    assert within(np.array([1, 2, 3, 9, 10]), 2, 9, counts).tolist() == [False, True, True, True, False]
    assert counts == {"too_short": 1, "too_long": 1}
    assert within(np.array([1, 99]), 0, 0, counts).all()


def test_documents_outside_the_limits_are_left_out_and_counted(tmp_path: Path, byte: Path):
    texts = ["a" * length for length in (1, 3, 4, 5, 20, 21, 22, 400)]
    files = files_of(write(tmp_path / "in", **{f"{n}.txt": text for n, text in enumerate(texts)}))
    manifest, _ = run(lambda: text_kind(files, least=5, most=21), byte, tmp_path / "out", shard_tokens=30)
    assert texts_of(tmp_path / "out", "train") == ["a" * 4, "a" * 5, "a" * 20]
    source = manifest.source
    assert (source["too_short"], source["too_long"], source["documents"]) == (2, 3, 3)
    assert (source["min_tokens"], source["max_tokens"]) == (5, 21)


def test_nothing_left_is_an_error(tmp_path: Path, byte: Path):
    files = files_of(write(tmp_path / "in", **{"a.txt": "text"}))
    with pytest.raises(HvdtrainError, match="nothing is left of the input: all documents are empty or were left out"):
        run(lambda: text_kind(files, least=100), byte, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
