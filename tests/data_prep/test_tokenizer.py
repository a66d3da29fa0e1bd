"""Tokenizers: nothing is lost, the same input gives the same file, and a file is never changed under a run."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.corpus import find_files
from data_prep.tokenizer import END_OF_TEXT, UNKNOWN, load_tokenizer, train_tokenizer
from hvdtrain.data.shards import read_json, tokenizer_vocab_size
from hvdtrain.errors import ConfigError, DataError

TEXT = (
    "To be, or not to be, that is the question.\r\n 漢字とかな e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467\n\t"
    * 5
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_bytes(TEXT.encode())
    for kind in ("bpe", "char"):
        train_tokenizer(find_files([folder / "text.txt"], "*", []), kind, 300, folder / f"{kind}.json")
    return folder


@pytest.fixture(scope="module")
def bpe(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "bpe.json")[0]


@pytest.fixture(scope="module")
def char(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "char.json")[0]


def there_and_back(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


@settings(max_examples=200)
@given(ANY_TEXT)
def test_bpe_loses_nothing_of_any_text(bpe: Tokenizer, text: str):
    assert there_and_back(bpe, text) == text


@given(st.text(sorted(set(TEXT)), max_size=60))
def test_char_loses_nothing_of_what_it_knows(char: Tokenizer, text: str):
    assert there_and_back(char, text) == text
    assert len(char.encode(text, add_special_tokens=False).ids) == len(text)


def test_char_marks_what_it_does_not_know(char: Tokenizer):
    ids = char.encode("To Ж be 猫猫", add_special_tokens=False).ids
    unknown = char.token_to_id(UNKNOWN)
    assert [number == unknown for number in ids] == [False] * 3 + [True] + [False] * 4 + [True] * 2


def test_the_vocabulary(folder: Path, bpe: Tokenizer, char: Tokenizer):
    assert tokenizer_vocab_size(folder / "bpe.json") == bpe.get_vocab_size() == 300
    assert tokenizer_vocab_size(folder / "char.json") == char.get_vocab_size() == len(set(TEXT)) + 2
    for kind in ("bpe", "char"):
        assert load_tokenizer(folder / f"{kind}.json")[1] == 0
    assert (bpe.id_to_token(0), char.id_to_token(0), char.id_to_token(1)) == (END_OF_TEXT, END_OF_TEXT, UNKNOWN)
    assert len(bpe.encode(TEXT).ids) < len(TEXT.encode())  # it did learn to merge


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path, kind: str):
    record = train_tokenizer(find_files([folder / "text.txt"], "*", []), kind, 300, tmp_path / "new" / "again.json")
    assert (tmp_path / "new" / "again.json").read_bytes() == (folder / f"{kind}.json").read_bytes()
    assert (record["reused"], record["kind"], record["files"]) == (False, kind, 1)
    assert read_json(tmp_path / "new" / "again.record.json")["trained_on_bytes"] == len(TEXT.encode())


def test_the_same_one_is_kept_another_is_refused(folder: Path):
    out, files = folder / "bpe.json", find_files([folder / "text.txt"], "*", [])
    before = out.stat().st_mtime_ns
    record = train_tokenizer(files, "bpe", 300, out)
    assert (record["reused"], record["vocab_size"], out.stat().st_mtime_ns) == (True, 300, before)
    with pytest.raises(ConfigError, match="was not made from this input and these settings"):
        train_tokenizer(files, "bpe", 301, out)
    with pytest.raises(ConfigError, match="was not made from"):
        train_tokenizer(files, "char", 300, out)
    with pytest.raises(ConfigError, match="was not made from"):
        train_tokenizer(find_files([folder / "text.txt"] * 2, "*", []), "bpe", 300, out)
    assert out.stat().st_mtime_ns == before


def test_a_strangers_file_is_not_written_over(folder: Path, tmp_path: Path):
    (tmp_path / "mine.json").write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.json exists"):
        train_tokenizer(find_files([folder / "text.txt"], "*", []), "char", 300, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "precious"


def test_a_vocabulary_below_all_bytes_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--vocab-size 256: byte-level BPE needs more than 256"):
        train_tokenizer(find_files([folder / "text.txt"], "*", []), "bpe", 256, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []
    assert (
        train_tokenizer(find_files([folder / "text.txt"], "*", []), "bpe", 257, tmp_path / "t.json")["vocab_size"]
        == 257
    )


def test_files_that_are_no_tokenizer(folder: Path, tmp_path: Path):
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match=r"cannot read tokenizer .*t\.json: No such file"):
        load_tokenizer(path)
    for content in (b"{}", b"\xff", b"", b"[]"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t\.json"):
            load_tokenizer(path)
    text = (folder / "bpe.json").read_text(encoding="utf-8")
    path.write_text(text.replace(END_OF_TEXT, "<|fin|>"), encoding="utf-8")
    with pytest.raises(DataError, match="declares no end-of-text token"):
        load_tokenizer(path)
    path.write_text(text.replace(END_OF_TEXT, "</s>"), encoding="utf-8")
    assert load_tokenizer(path)[1] == 0
