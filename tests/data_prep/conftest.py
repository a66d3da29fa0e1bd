"""Tokenizers of each kind, made once."""

import os
from pathlib import Path

import pytest
from preparing import ODD_TEXTS

from data_prep import progress
from data_prep.tokenizer import build_tokenizer

_WORDS = "It's 1984, isn't it? The quick brown fox jumps over the lazy dog. def f(x):\n    return x\n"
SPECIAL = ("unk", "pad", "cls", "sep")


@pytest.fixture(scope="session")
def tokenizers_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> ``tokenizer.json``; the end of text is token 0. ``char`` knows the characters of ODD_TEXTS only."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [*ODD_TEXTS, _WORDS] * 3
    sizes = {"bpe": 400, "unigram": 300, "char": 0, "byte": 0}
    for kind, size in sizes.items():
        build_tokenizer(texts, kind, size, SPECIAL).save(str(folder / f"{kind}.json"))
    return {kind: folder / f"{kind}.json" for kind in sizes}


@pytest.fixture(scope="session")
def bpe(tokenizers_of: dict[str, Path]) -> Path:
    return tokenizers_of["bpe"]


@pytest.fixture(scope="session")
def byte(tokenizers_of: dict[str, Path]) -> Path:
    """One token a byte: lengths can be told by counting."""
    return tokenizers_of["byte"]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparations in this process wait neither for the disk nor for the clock; those in processes of their own do."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(progress, "_LOOK_EVERY_S", 0.01)
