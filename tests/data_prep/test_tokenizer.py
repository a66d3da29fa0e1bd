"""Tokenizers: nothing is lost, the same input gives the same file, and a file is never changed under a run."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.encoder import Encoder
from data_prep.tokenizer import KINDS, SPECIAL_TOKENS, build_tokenizer, load_tokenizer, special_ids, train_tokenizer
from hvdtrain.data.shards import read_json, tokenizer_vocab_size
from hvdtrain.errors import ConfigError, DataError

TEXT = (
    "To be, or not to be, that is the question.\r\n 漢字とかな e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467\n\t"
    * 5
)
IDENTITY = {"sample_sha256": "of TEXT"}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
END, UNKNOWN = SPECIAL_TOKENS["eos"][0], SPECIAL_TOKENS["unk"][0]
BYTE_COMPLETE = ("bpe", "unigram", "byte")


def train(kind: str, out: Path, vocab_size: int = 0, special: tuple[str, ...] = (), identity=None) -> dict:
    size = vocab_size or (260 if kind == "unigram" else 300)  # which is all that so little text gives
    return train_tokenizer([TEXT], identity or IDENTITY, kind, size, special, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    for kind in KINDS:
        train(kind, folder / f"{kind}.json")
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder / f"{kind}.json")[0] for kind in KINDS}


def there_and_back(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


@settings(max_examples=200)
@given(ANY_TEXT)
def test_nothing_of_any_text_is_lost(made: dict[str, Tokenizer], text: str):
    for kind in BYTE_COMPLETE:
        assert there_and_back(made[kind], text) == text, kind


@pytest.mark.parametrize(
    "text",
    [
        "  two  at both ends  ",
        "\ufeffa mark first",
        "\u2028\u2029\x85\x0b\x0c lines of other kinds",
        "e\u0301 is not é, ﬁ is not fi",
        "\U0001f1ef\U0001f1f5 \U0001f44d\U0001f3fd \U0001d54f \ue000",
        "三百六十行，行行出状元。",
        "\u202eright to left\u202c",
    ],
)
def test_what_is_rare_in_training_too(made: dict[str, Tokenizer], text: str):
    for kind in BYTE_COMPLETE:
        assert there_and_back(made[kind], text) == text, kind


@given(st.text(sorted(set(TEXT)), max_size=60))
def test_char_loses_nothing_of_what_it_knows(made: dict[str, Tokenizer], text: str):
    assert there_and_back(made["char"], text) == text
    assert len(made["char"].encode(text, add_special_tokens=False).ids) == len(text)


def test_char_marks_what_it_does_not_know(made: dict[str, Tokenizer]):
    ids = made["char"].encode("To Ж be 猫猫", add_special_tokens=False).ids
    unknown = made["char"].token_to_id(UNKNOWN)
    assert [number == unknown for number in ids] == [False] * 3 + [True] + [False] * 4 + [True] * 2


def test_the_vocabularies(folder: Path, made: dict[str, Tokenizer]):
    sizes = {"bpe": 300, "char": len(set(TEXT)) + 2, "byte": 257}
    for kind in KINDS:
        size = made[kind].get_vocab_size()
        assert tokenizer_vocab_size(folder / f"{kind}.json") == size == sizes.get(kind, size)
        assert load_tokenizer(folder / f"{kind}.json")[1]["eos"] == 0
        assert made[kind].id_to_token(0) == END
    assert made["unigram"].get_vocab_size() == 260
    assert len(made["byte"].encode(TEXT).ids) == len(TEXT.encode())
    for kind in ("bpe", "unigram"):
        assert len(made[kind].encode(TEXT).ids) < len(TEXT.encode()), kind  # it did learn to join bytes


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_the_fast_library_agrees(folder: Path, kind: str):
    encoder = Encoder(folder / f"{kind}.json", [TEXT.encode()])
    assert (encoder.name, encoder.note) == ("gigatoken", "")
    assert encoder.encode([TEXT.encode()])[0].tolist() == load_tokenizer(folder / f"{kind}.json")[0].encode(TEXT).ids


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(kind: str):
    tokenizer = build_tokenizer([TEXT], kind, 262 if kind == "unigram" else 300, ["pad", "cls", "sep"])
    found = special_ids(tokenizer)
    assert {"eos", "pad", "cls", "sep"} <= set(found)
    assert sorted(found.values()) == list(range(len(found)))  # ours come first
    assert found["eos"] == 0
    text = f"a {SPECIAL_TOKENS['cls'][0]} b"
    tokenizer.encode_special_tokens = True  # as data_prep encodes: a name in a text is text
    assert found["cls"] not in tokenizer.encode(text, add_special_tokens=False).ids


def test_special_tokens_of_others():
    names = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}
    tokenizer = Tokenizer.from_str(json.dumps({"model": {"type": "WordLevel", "vocab": names, "unk_token": "[UNK]"}}))
    assert special_ids(tokenizer) == {"eos": 3, "pad": 0, "unk": 1, "mask": 4, "sep": 3, "cls": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path, kind: str):
    record = train(kind, tmp_path / "new" / "again.json")
    assert (tmp_path / "new" / "again.json").read_bytes() == (folder / f"{kind}.json").read_bytes()
    assert (record["reused"], record["kind"]) == (False, kind)
    trained_on = 0 if kind == "byte" else len(TEXT.encode())
    assert read_json(tmp_path / "new" / "again.record.json")["trained_on_bytes"] == trained_on


def test_the_same_one_is_kept_another_is_refused(folder: Path):
    out = folder / "bpe.json"

    def untouched() -> Iterator[str]:
        raise AssertionError("the text was read")
        yield

    before = out.stat().st_mtime_ns
    record = train_tokenizer(untouched(), IDENTITY, "bpe", 300, (), out)
    assert (record["reused"], record["vocab_size"], out.stat().st_mtime_ns) == (True, 300, before)
    for other in ({"vocab_size": 301}, {"kind": "char"}, {"special": ("pad",)}, {"identity": {"sample_sha256": "x"}}):
        with pytest.raises(ConfigError, match="was not made from this input and these settings"):
            train(**{"kind": "bpe", "out": out, **other})
    assert out.stat().st_mtime_ns == before


def test_a_strangers_file_is_not_written_over(tmp_path: Path):
    (tmp_path / "mine.json").write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.json exists"):
        train("char", tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "precious"


@pytest.mark.parametrize(("kind", "least"), [("bpe", 257), ("unigram", 257)])
def test_a_vocabulary_below_all_bytes_is_refused(tmp_path: Path, kind: str, least: int):
    with pytest.raises(ConfigError, match=rf"--vocab-size {least - 1}: {kind} needs {least} or more"):
        train(kind, tmp_path / "t.json", least - 1)
    assert list(tmp_path.iterdir()) == []
    assert train("bpe", tmp_path / "t.json", 257)["vocab_size"] == 257


def test_wrong_use(tmp_path: Path):
    with pytest.raises(ConfigError, match="no special token 'start'; there are: eos, pad"):
        build_tokenizer([TEXT], "bpe", 300, ["start"])
    for kind in ("bpe", "unigram", "char"):
        with pytest.raises(DataError, match="no text"):
            build_tokenizer(["", ""], kind, 300)
    assert build_tokenizer([], "byte", 1).get_vocab_size() == 257


def test_files_that_are_no_tokenizer(folder: Path, tmp_path: Path):
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match=r"cannot read tokenizer .*t\.json: No such file"):
        load_tokenizer(path)
    for content in (b"{}", b"\xff", b"", b"[]"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t\.json"):
            load_tokenizer(path)
    text = (folder / "bpe.json").read_text(encoding="utf-8")
    path.write_text(text.replace(END, "<|fin|>"), encoding="utf-8")
    with pytest.raises(DataError, match="declares no end-of-text token"):
        load_tokenizer(path)
    path.write_text(text.replace(END, "</s>"), encoding="utf-8")
    assert load_tokenizer(path)[1]["eos"] == 0


def test_the_slow_way_cuts_long_texts_and_gives_the_same_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch):
    text = "".join(f"line {number} of a long text, 漢字\n" for number in range(300)).encode()
    encoder = Encoder(folder / "char.json", [text])  # which the fast library does not know
    assert encoder.name == "tokenizers"
    whole = encoder.encode([b"", text, b"x", text[:40]])
    monkeypatch.setattr("data_prep.encoder._SLOW_BYTES", 500)
    cut = encoder.encode([b"", text, b"x", text[:40]])
    assert all(np.array_equal(a, b) for a, b in zip(whole, cut, strict=True))
