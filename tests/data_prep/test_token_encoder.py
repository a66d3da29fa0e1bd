"""The fast encoder gives what the slow one gives, or says that it does not do the work."""

import json
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import EOS, ODD_TEXTS

from data_prep import encoder as encoder_module
from data_prep.encoder import TokenEncoder
from data_prep.tokenizer import build_tokenizer
from data_prep.tokenizer_file import load_tokenizer

TEXT = (
    "It's 1984 — isn't it? 漢字とかな e\u0301 \U0001f468\u200d\U0001f469  two  spaces\r\n\tdef f():\n    return x\n" * 5
)
END_OF_TEXT = "<|endoftext|>"
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
PIECES = st.sampled_from(
    [END_OF_TEXT, "<|unk|>", "<|", " ", "  ", "\n", "\n\n", "\u3000\u3000", "'s", "don't", "é", "e\u0301", "١٢", "x1"]
)


def encoder_of(tokenizer: Path, sample: list[bytes]) -> TokenEncoder:
    return TokenEncoder(load_tokenizer(tokenizer), sample)


@pytest.fixture(scope="module")
def fast(bpe: Path) -> TokenEncoder:
    encoder = encoder_of(bpe, [TEXT.encode()])
    assert (encoder.name, encoder.note) == ("gigatoken", "")
    return encoder


@settings(max_examples=100)
@given(st.lists(st.lists(ANY | PIECES).map("".join), min_size=1))
def test_both_libraries_give_the_same_tokens(fast: TokenEncoder, texts: list[str]):
    documents = [text.encode() for text in texts]
    tokens, offsets = fast.encode(documents)
    slow_tokens, slow_offsets = fast._encode_slow(documents)
    assert np.array_equal(offsets, slow_offsets)
    assert np.array_equal(tokens, slow_tokens)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(tokens), len(texts) + 1)


@pytest.mark.parametrize("kind", ["bpe", "byte", "unigram", "char"])
def test_no_text_is_lost_by_any_kind(tokenizers_of: dict[str, Path], kind: str):
    encoder = encoder_of(tokenizers_of[kind], [TEXT.encode()])
    tokens, offsets = encoder.encode([text.encode() for text in [*ODD_TEXTS, ""]])
    back = [encoder._tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False) for a, b in pairwise(offsets)]
    assert back == [*ODD_TEXTS, ""]
    assert EOS not in tokens
    assert [len(values) for values in encoder.encode([])] == [0, 1]


def test_what_the_fast_one_does_not_know_is_said(tokenizers_of: dict[str, Path]):
    encoder = encoder_of(tokenizers_of["char"], [TEXT.encode()])
    assert encoder.name == "tokenizers"
    assert "gigatoken does not take this tokenizer" in encoder.note
    tokens, offsets = encoder.encode([b"It's", b"", "漢".encode()])
    assert (len(tokens), offsets.tolist()) == (5, [0, 4, 4, 5])


def test_one_token_of_difference_is_enough(bpe: Path, monkeypatch: pytest.MonkeyPatch):
    right = TokenEncoder._encode_fast

    def wrong(self: TokenEncoder, documents: list[bytes]):
        tokens, offsets = right(self, documents)
        tokens = tokens.copy()
        tokens[offsets[1]] ^= 1
        return tokens, offsets

    monkeypatch.setattr(TokenEncoder, "_encode_fast", wrong)
    encoder = encoder_of(bpe, [b"first", b"second"])
    assert encoder.name == "tokenizers"
    assert "disagree on document 1 of the sample" in encoder.note


def test_ranks_share_the_comparison_and_what_one_finds_holds_for_all(bpe: Path, monkeypatch: pytest.MonkeyPatch):
    right = TokenEncoder._encode_fast

    def wrong(self: TokenEncoder, documents: list[bytes]):
        tokens, offsets = right(self, documents)
        return tokens ^ np.uint32(b"third" in documents), offsets

    monkeypatch.setattr(TokenEncoder, "_encode_fast", wrong)
    file, sample = load_tokenizer(bpe), [b"first", b"second", b"third", b"fourth", b"fifth"]
    ranks = [TokenEncoder(file, sample, slice(rank, None, 4)) for rank in range(4)]
    notes = [encoder.note for encoder in ranks]
    assert notes == ["", "", "gigatoken and tokenizers disagree on document 2 of the sample", ""]
    for encoder in ranks:
        encoder.agree(notes)
        assert (encoder.name, encoder.note) == ("tokenizers", notes[2])
    assert len({encoder.bytes_per_token for encoder in ranks}) == 1


def test_threads_encode_beside_one_another(fast: TokenEncoder):
    """The stand-in for the library of its rows is the whole process's: one thread took it from another."""
    begin, documents = threading.Barrier(8), [TEXT.encode()] * 40

    def work(_: int) -> int:
        begin.wait()
        return sum(len(fast.encode(documents)[0]) for _ in range(50))

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(work, range(8)))) == 1


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_library_of_its_rows_is_left_alone(fast: TokenEncoder, monkeypatch: pytest.MonkeyPatch, is_loaded: bool):
    """Importing it took longer than encoding a hundred megabytes; to others it is what it was."""
    other = ModuleType("awkward")
    monkeypatch.setitem(sys.modules, "awkward", other)
    if not is_loaded:
        monkeypatch.delitem(sys.modules, "awkward")
    tokens, offsets = fast.encode([b"one", b"", b"two"])
    assert sys.modules.get("awkward") is (other if is_loaded else None)
    assert (type(tokens), tokens.dtype, type(offsets), offsets.dtype) == (np.ndarray, np.uint32, np.ndarray, np.int64)


def test_it_goes_with_its_last_user(bpe: Path):
    """It has tens of megabytes that Python's collector knows nothing of: a process that made many grew to gigabytes."""
    encoder = encoder_of(bpe, [TEXT.encode()])
    seen = weakref.ref(encoder)
    del encoder
    assert seen() is None


def test_a_crash_of_the_fast_one_is_no_crash(bpe: Path, monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):  # what Rust's panics become
        pass

    def panic(self: TokenEncoder, documents: list[bytes]):
        raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    monkeypatch.setattr(TokenEncoder, "_encode_fast", panic)
    encoder = encoder_of(bpe, [TEXT.encode()])
    assert encoder.note == "gigatoken does not take this tokenizer (index out of bounds)"
    assert len(encoder.encode([TEXT.encode()])[0]) > 0


def test_without_the_library(bpe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = encoder_of(bpe, [TEXT.encode()])
    assert encoder.name == "tokenizers"
    assert "gigatoken" in encoder.note
    assert len(encoder.encode([TEXT.encode()])[0]) > 0


def test_a_sample_may_be_long_or_empty(bpe: Path):
    assert encoder_of(bpe, ["漢".encode() * 30_000]).note == ""
    encoder = encoder_of(bpe, [])
    assert (encoder.note, encoder.bytes_per_token) == ("", 1.0)


def test_bytes_of_a_token(byte: Path, bpe: Path):
    assert encoder_of(byte, [b"four", "漢".encode()]).bytes_per_token == 1.0
    tokens, _ = encoder_of(bpe, [TEXT.encode()]).encode([TEXT.encode()])
    assert encoder_of(bpe, [TEXT.encode()]).bytes_per_token == len(TEXT.encode()) / len(tokens)


@pytest.mark.parametrize(
    "texts", [[END_OF_TEXT], [f"a{END_OF_TEXT}b", "c"], ["", "x", f"{END_OF_TEXT}"], ["a", "<|unk|><|cls|>", "b"]]
)
def test_the_name_of_a_special_token_in_a_text_is_text(fast: TokenEncoder, texts: list[str]):
    """Taken for the token, it would make a border of a document where there is none, and be lost on the way back."""
    for encode in (fast._encode_fast, fast._encode_slow):
        tokens, offsets = encode([text.encode() for text in texts])
        names = [fast._tokenizer.token_to_id(name) for name in (END_OF_TEXT, "<|unk|>", "<|cls|>")]
        assert not np.isin(tokens, names).any()
        back = [fast._tokenizer.decode(tokens[a:b].tolist()) for a, b in pairwise(offsets)]
        assert back == texts


def test_a_token_that_is_not_special_is_one_in_a_text(bpe: Path, tmp_path: Path):
    """Added by a user to have a word of his in one token: both libraries take it for that."""
    fields = json.loads(bpe.read_text(encoding="utf-8"))
    number = max(fields["model"]["vocab"].values()) + 1
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": number, "content": "quux", "special": False})
    (tmp_path / "t.json").write_text(json.dumps(fields), encoding="utf-8")
    encoder = encoder_of(tmp_path / "t.json", [b"a quux b"])
    assert encoder.note == ""
    assert number in encoder.encode([b"a quux b"])[0]
    assert encoder.vocab_size == number + 1


# --- the slow one, a mebibyte at a time --------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.lists(st.lists(st.lists(ANY | PIECES).map("".join), max_size=6)), st.integers(4, 60))
def test_a_long_text_gives_the_tokens_of_one_piece(fast: TokenEncoder, documents: list[list[str]], at_once: int):
    """As long as there is a line end between letters near, which there is in any text that is not made for this."""
    texts = ["".join(f"{part}ab\ncd" for part in parts) + "ab\n" for parts in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "_SLOW_BYTES", at_once)
        tokens, offsets = fast._encode_slow([text.encode() for text in texts])
    whole = [fast._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokens[a:b].tolist() for a, b in pairwise(offsets)] == whole


def test_the_paragraphs_of_a_chinese_novel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each begins with two wide spaces, the first of which a tokenizer gathers with the line end before it."""
    text = ("\u3000\u3000漢字とかなの文章。\n" * 5 + "終\n") * 12
    build_tokenizer([text], "bpe", 300).save(str(tmp_path / "t.json"))
    encoder = encoder_of(tmp_path / "t.json", [text.encode()])
    whole = encoder._tokenizer.encode(text, add_special_tokens=False)
    assert "\n\u3000" in {text[a:b] for a, b in whole.offsets}
    for at_once in range(100, 300, 17):
        monkeypatch.setattr(encoder_module, "_SLOW_BYTES", at_once)
        assert encoder._encode_slow([text.encode()])[0].tolist() == whole.ids


@settings(max_examples=100)
@given(st.lists(ANY | PIECES).map("".join), st.integers(4, 40))
def test_whatever_is_cut_joins_again(text: str, at_once: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "_SLOW_BYTES", at_once)
        pieces = encoder_module._cut(text.encode())
    assert "".join(piece.decode() for piece in pieces) == text
