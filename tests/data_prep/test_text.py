"""Text -> shards: nothing is lost, the split is where it was asked for, and a preparation is whole or begun anew."""

import json
from itertools import pairwise
from pathlib import Path

import h5py
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.corpus import find_files
from data_prep.text import TextOptions, prepare_text
from data_prep.tokenizer import train_tokenizer
from hvdtrain.data.shards import Manifest, read_manifest
from hvdtrain.errors import ConfigError, DataError, OutputError

TEXTS = [
    "Hello, world.\n",
    "漢字とかなの文章。\n二行目\r\n",
    "e\u0301 is two characters, é is one; ﬁ is one; \u202eright to left\u202c\n",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1ef\U0001f1f5 \U0001f44d\U0001f3fd \U0001d54f",
    "\ufeffBOM and\ttab and\u3000wide space and no line end",
    "x",
    " \n \n\n",
]


class Corpus:
    """A folder of texts, and preparations of it."""

    def __init__(self, folder: Path, texts: list[str]):
        self.folder = folder
        (folder / "in").mkdir(parents=True)
        for number, text in enumerate(texts):
            (folder / "in" / f"{number:03}.txt").write_bytes(text.encode())

    def tokenizer(self, kind: str = "bpe") -> Path:
        path = self.folder / f"{kind}.json"
        train_tokenizer(find_files([self.folder / "in"], "*", []), kind, 280, path)
        return path

    def prepare(self, out: str = "out", kind: str = "bpe", **options) -> tuple[Manifest, bool]:
        files = find_files([self.folder / "in"], "*.txt", [])
        return prepare_text(files, self.tokenizer(kind), self.folder / out, TextOptions(**options))

    def read(self, out: str = "out") -> dict[str, list[str]]:
        """The documents of each split, back from tokens."""
        folder = self.folder / out
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        found: dict[str, list[str]] = {"train": [], "val": []}
        for shard in read_manifest(folder).shards:
            with h5py.File(folder / shard.file) as file:
                tokens, ends = file["tokens"][:].tolist(), file["doc_offsets"][:].tolist()
            assert (ends[0], ends[-1], len(ends) - 1) == (0, len(tokens), shard.documents)
            for start, end in pairwise(ends):
                assert tokens[end - 1] == 0  # the end of a text
                found[shard.split].append(tokenizer.decode(tokens[start : end - 1], skip_special_tokens=False))
        return found


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path, TEXTS)


# --- nothing is lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("shard_tokens", [1, 40, 1 << 20])
def test_every_text_comes_back(corpus: Corpus, kind: str, shard_tokens: int):
    manifest, reused = corpus.prepare(kind=kind, val_fraction=0.0, shard_tokens=shard_tokens)
    assert corpus.read() == {"train": TEXTS, "val": []}
    assert not reused
    assert manifest.source["documents"] == len(TEXTS) == sum(shard.documents for shard in manifest.shards)
    assert manifest.source["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    if shard_tokens == 1:
        assert len(manifest.shards) == len(TEXTS)


@settings(max_examples=20)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1),
    st.sampled_from(["bpe", "char"]),
)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], kind: str):
    corpus = Corpus(tmp_path_factory.mktemp("any"), texts)
    corpus.prepare(kind=kind, val_fraction=0.3, val_split="tail")
    found = corpus.read()
    assert "".join(found["train"] + found["val"]) == "".join(texts)


def test_an_empty_file_is_no_document(tmp_path: Path):
    corpus = Corpus(tmp_path, ["a", "", "b"])
    assert corpus.prepare(val_fraction=0.0)[0].source["documents"] == 2
    assert corpus.read()["train"] == ["a", "b"]


def test_the_same_input_gives_the_same_bytes(corpus: Corpus):
    corpus.prepare("a", shard_tokens=50, val_fraction=0.3)
    corpus.prepare("b", shard_tokens=50, val_fraction=0.3)
    files = {path.name for path in (corpus.folder / "a").iterdir()}
    assert {"manifest.json", "tokenizer.json", "train-00000.h5"} <= files
    for name in files:
        assert (corpus.folder / "a" / name).read_bytes() == (corpus.folder / "b" / name).read_bytes(), name


# --- the split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_the_tail_is_cut_at_the_byte(tmp_path: Path, fraction: float):
    corpus = Corpus(tmp_path, ["abcdefghij" * 10, "klmnopqrst" * 20])
    corpus.prepare(val_split="tail", val_fraction=fraction)
    found, whole = corpus.read(), "abcdefghij" * 10 + "klmnopqrst" * 20
    cut = int(300 * (1 - fraction))
    assert ("".join(found["train"]), "".join(found["val"])) == (whole[:cut], whole[cut:])


@pytest.mark.parametrize("text", ["漢字かな" * 3, "é" * 20, "a\U0001f600" * 7])
def test_the_tail_never_cuts_a_character(tmp_path: Path, text: str):
    raw = text.encode()
    for number, fraction in enumerate(cut / len(raw) for cut in range(1, 12)):
        corpus = Corpus(tmp_path / str(number), [text])
        corpus.prepare(kind="char", val_split="tail", val_fraction=fraction)
        found = corpus.read()
        train, val = "".join(found["train"]), "".join(found["val"])
        assert train + val == text
        at = int(len(raw) * (1 - fraction))
        assert 0 <= len(train.encode()) - at < 4  # moved on to the next character, no further


def test_hash_goes_by_each_text_alone(tmp_path: Path):
    """Added documents never move others between training and validation: no leak from one version to the next."""
    texts = [f"document {number}" for number in range(200)]
    few, many = Corpus(tmp_path / "few", texts[::2]), Corpus(tmp_path / "many", texts)
    for corpus in (few, many):
        corpus.prepare(kind="char", val_fraction=0.2)
    some, all_ = few.read(), many.read()
    assert set(some["val"]) == set(all_["val"]) & set(texts[::2])
    assert set(some["train"]) == set(all_["train"]) & set(texts[::2])
    assert 20 <= len(all_["val"]) <= 60  # 40 expected
    more = Corpus(tmp_path / "more", texts)
    more.prepare(kind="char", val_fraction=0.4)
    assert set(all_["val"]) < set(more.read()["val"])  # a larger fraction only adds


# --- whole, kept or begun anew -----------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_complete_preparation_is_kept(corpus: Corpus):
    manifest, _ = corpus.prepare()
    before = {path: path.stat().st_mtime_ns for path in (corpus.folder / "out").glob("[!.]*")}
    assert corpus.prepare() == (manifest, True)
    assert {path: path.stat().st_mtime_ns for path in (corpus.folder / "out").glob("[!.]*")} == before


def test_an_interrupted_one_is_begun_anew(corpus: Corpus):
    corpus.prepare("whole", shard_tokens=40)
    out = corpus.folder / "out"
    corpus.prepare("out", shard_tokens=1)  # many small shards, but it was killed before the manifest
    (out / "manifest.json").unlink()
    (out / ".train-00001.h5.1234.tmp").write_bytes(b"half")
    assert corpus.prepare("out", shard_tokens=40)[1] is False
    assert snapshot(out) == snapshot(corpus.folder / "whole")


def test_beginning_anew_leaves_strangers_alone(corpus: Corpus):
    """A folder may hold files of the user's own."""
    out = corpus.folder / "out"
    out.mkdir()
    (out / "measurements.h5").write_bytes(b"precious")
    (out / ".notes.tmp").write_bytes(b"precious")
    (out / "train-00000.h5").write_bytes(b"half")
    corpus.prepare()
    assert [(out / name).exists() for name in ("measurements.h5", ".notes.tmp")] == [True, True]
    assert read_manifest(out).shards


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"val_fraction": 0.5}, "val_fraction"),
        ({"val_split": "tail"}, "val_split"),
        ({"shard_tokens": 9}, "shard_tokens"),
    ],
)
def test_other_settings_are_refused(corpus: Corpus, options: dict, named: str):
    corpus.prepare()
    before = snapshot(corpus.folder / "out")
    with pytest.raises(ConfigError, match=rf"already holds shards made otherwise \(differing: {named}\)"):
        corpus.prepare(**options)
    assert snapshot(corpus.folder / "out") == before


def test_another_corpus_or_tokenizer_is_refused(corpus: Corpus):
    corpus.prepare()
    with pytest.raises(ConfigError, match=r"differing: tokenizer_sha256"):
        corpus.prepare(kind="char")
    tokenizer = corpus.tokenizer()
    (corpus.folder / "in" / "new.txt").write_text("new")
    with pytest.raises(ConfigError, match=r"differing: corpus_sha256"):
        prepare_text(find_files([corpus.folder / "in"], "*", []), tokenizer, corpus.folder / "out", TextOptions())


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest", "tokenizer"])
def test_a_damaged_one_is_named_not_kept(corpus: Corpus, damage: str):
    corpus.prepare()
    out = corpus.folder / "out"
    if damage == "missing":
        (out / "train-00000.h5").unlink()
    elif damage == "truncated":
        (out / "train-00000.h5").write_bytes(b"x")
    else:
        (out / f"{damage}.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(DataError, match=str(out)):
        corpus.prepare()


def test_bad_text_leaves_no_manifest(corpus: Corpus):
    tokenizer = corpus.tokenizer()
    (corpus.folder / "in" / "zzz.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"zzz\.txt is not UTF-8 text: byte 3 is 0xe9"):
        prepare_text(find_files([corpus.folder / "in"], "*", []), tokenizer, corpus.folder / "out", TextOptions())
    assert not (corpus.folder / "out" / "manifest.json").exists()


def test_the_output_may_not_be_a_file(corpus: Corpus):
    (corpus.folder / "out").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write to .*out"):
        corpus.prepare()
