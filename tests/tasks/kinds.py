"""Small shards of each kind. What a row says is random, so nothing can be learned from them."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tiny import asked, documents, labelled, pairs, random_tokens, write_corpus

TASK_OF = {"text": "lm", "pairs": "seq2seq", "labels": "classify", "qa": "span_qa"}
LABELS = ("bad", "fair", "good")
Train = Callable[..., dict[str, Any]]


def texts(count: int, seed: int, longest: int = 8) -> list[list[int]]:
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count).tolist()
    return [random_tokens(length, seed=1000 * seed + number).tolist() for number, length in enumerate(lengths)]


def write_text(folder: Path, seed: int = 0) -> Path:
    """Two shards of 300 tokens for training, one of 100 for validation."""
    tokens = random_tokens(700, seed=seed)
    shards = {"train": [tokens[:300], tokens[300:600]], "val": [tokens[600:]]}
    splits = {split: [documents([part]) for part in parts] for split, parts in shards.items()}
    write_corpus(folder, splits, special_tokens={"eos": 0, "mask": 1})
    return folder


def write_pairs(folder: Path, seed: int = 0, train: int = 60, val: int = 11, longest: int = 8) -> Path:
    rows = list(zip(*(texts(train + val, 2 * seed + side, longest) for side in (0, 1)), strict=True))
    splits = {"train": [pairs(rows[:train])], "val": [pairs(rows[train:])]}
    write_corpus(folder, splits, kind="pairs", special_tokens={"eos": 0})
    return folder


def write_labels(folder: Path, seed: int = 0, train: int = 60, val: int = 11, longest: int = 8) -> Path:
    rows = [(text, number % 3) for number, text in enumerate(texts(train + val, seed, longest))]
    splits = {"train": [labelled(rows[:train])], "val": [labelled(rows[train:])]}
    write_corpus(folder, splits, kind="labels", label_names=LABELS)
    return folder


def write_questions(folder: Path, seed: int = 0, train: int = 60, val: int = 11) -> Path:
    """Windows of up to four characters of a paragraph, of which a question has up to three."""
    draw = random.Random(seed)
    contexts = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(train + val)]
    rows = [(text, [text[len(text) // 2 :][:2]] if draw.random() < 0.8 else []) for text in contexts]
    splits = {"train": [asked(rows[:train], room=4, step=3)], "val": [asked(rows[train:], train, room=4, step=3)]}
    write_corpus(folder, splits, kind="qa", version=2)
    return folder


WRITE = {"text": write_text, "pairs": write_pairs, "labels": write_labels, "qa": write_questions}
