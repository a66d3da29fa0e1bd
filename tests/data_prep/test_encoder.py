"""The fast encoder gives what the slow one gives, or says that it does not do the work."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import find_files
from data_prep.encoder import Encoder
from data_prep.tokenizer import END_OF_TEXT, train_tokenizer

TEXT = (
    "It's 1984 — isn't it? 漢字とかな e\u0301 \U0001f468\u200d\U0001f469  two  spaces\r\n\tdef f():\n    return x\n" * 5
)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
PIECES = st.sampled_from([END_OF_TEXT, "<|", " ", "  ", "\n", "'s", "don't", "é", "e\u0301", "\u3000", "١٢", "x1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "text.txt").write_bytes(TEXT.encode())
    for kind in ("bpe", "char"):
        train_tokenizer(find_files([folder / "text.txt"], "*", []), kind, 320, folder / f"{kind}.json")
    return folder


@pytest.fixture(scope="module")
def fast(folder: Path) -> Encoder:
    encoder = Encoder(folder / "bpe.json", [TEXT.encode()])
    assert (encoder.name, encoder.note) == ("gigatoken", "")
    return encoder


@settings(max_examples=200)
@given(st.lists(st.lists(ANY | PIECES).map("".join), min_size=1))
def test_both_libraries_give_the_same_tokens(fast: Encoder, texts: list[str]):
    documents = [text.encode() for text in texts]
    tokens, offsets = fast.encode(documents)
    slow_tokens, slow_offsets = fast._encode_slow(documents)
    assert np.array_equal(offsets, slow_offsets)
    assert np.array_equal(tokens, slow_tokens)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(tokens), len(texts) + 1)


def test_what_the_fast_one_does_not_know_is_said(folder: Path):
    encoder = Encoder(folder / "char.json", [TEXT.encode()])
    assert encoder.name == "tokenizers"
    assert "gigatoken does not take this tokenizer" in encoder.note
    tokens, offsets = encoder.encode([b"It's", b"", "漢".encode()])
    assert (len(tokens), offsets.tolist()) == (5, [0, 4, 4, 5])


def test_one_token_of_difference_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch):
    right = Encoder._encode_fast

    def wrong(self: Encoder, documents: list[bytes]):
        tokens, offsets = right(self, documents)
        tokens = tokens.copy()
        tokens[-1] ^= 1
        return tokens, offsets

    monkeypatch.setattr(Encoder, "_encode_fast", wrong)
    encoder = Encoder(folder / "bpe.json", [b"first", b"second"])
    assert (encoder.name, encoder.encode) == ("tokenizers", encoder._encode_slow)
    assert "disagree on document 1 of the sample" in encoder.note


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = Encoder(folder / "bpe.json", [TEXT.encode()])
    assert encoder.name == "tokenizers"
    assert "gigatoken" in encoder.note
    assert len(encoder.encode([TEXT.encode()])[0]) > 0


def test_a_sample_may_be_cut_within_a_character(folder: Path):
    encoder = Encoder(folder / "bpe.json", ["漢".encode() * 30_000])  # longer than what is compared of a document
    assert encoder.note == ""


@pytest.mark.parametrize(
    "texts", [[END_OF_TEXT], [f"a{END_OF_TEXT}b", "c"], ["", "x", f"{END_OF_TEXT}"], ["a", END_OF_TEXT, "b"]]
)
def test_the_name_of_a_special_token_in_a_text_is_text(fast: Encoder, texts: list[str]):
    """Taken for the token, it would make a border of a document where there is none, and be lost on the way back."""
    tokens, offsets = fast.encode([text.encode() for text in texts])
    assert fast._tokenizer.token_to_id(END_OF_TEXT) not in tokens
    back = [fast._tokenizer.decode(tokens[a:b].tolist()) for a, b in pairwise(offsets)]
    assert back == texts
