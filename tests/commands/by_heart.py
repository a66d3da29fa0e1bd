"""Runs that have learned a few lines by heart, of bytes, so that all text can be read and written."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from threads import ThreadGroup, on_ranks
from tiny import documents, labelled, pairs, write_corpus
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from hvdtrain.comm.world import World
from hvdtrain.data.shards import write_manifest
from hvdtrain.files import file_sha256
from hvdtrain.train import train

EOS = 256
LINES = {"a dog": "un chien œuvré", "two": "狗在 ☃", "cat!": "le chat, à ici", "été": "summer"}
CONTEXT = 24


def tokenizer() -> Tokenizer:
    """Each byte a token, and <eos>."""
    vocabulary = {char: number for number, char in enumerate([*sorted(ByteLevel.alphabet()), "<eos>"])}
    made = Tokenizer(BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteDecoder()
    made.add_special_tokens(["<eos>"])
    return made


def encode(text: str) -> list[int]:
    return [*tokenizer().encode(text, add_special_tokens=False).ids, EOS]


def shards(folder: Path, kind: str) -> Path:
    rows = [(encode(source), encode(target)) for source, target in LINES.items()]
    more: dict[str, Any] = {"special_tokens": {"eos": EOS}, "kind": kind}
    if kind == "pairs":
        made = {"train": [pairs(rows * 8, 257)], "val": [pairs(rows, 257)]}
    elif kind == "labels":
        texts = [([EOS, *source], number % 2) for number, (source, _) in enumerate(rows)]
        made, more["label_names"] = {"train": [labelled(texts * 8, 257)], "val": [labelled(texts, 257)]}, ("no", "yes")
    else:
        texts = [np.array(source[:-1] + target) for source, target in rows]
        made = {split: [documents(texts * 8, 257)] for split in ("train", "val")}
    manifest = write_corpus(folder, made, 257, **more)
    tokenizer().save(str(folder / "tokenizer.json"))
    write_manifest(folder, replace(manifest, tokenizer_sha256=file_sha256(folder / "tokenizer.json")))
    return folder


def learn(folder: Path, kind: str, *overrides: str) -> Path:
    """A run that knows LINES, in about three seconds."""
    task = {"pairs": "seq2seq", "labels": "classify", "text": "lm"}[kind]
    recipe = {
        "data": {"dir": str(shards(folder / "shards", kind))},
        "task": {"name": task},
        "model": {"layers": 1, "heads": 2, "width": 32, "context": CONTEXT, "ff_ratio": 2.0},
        "train": {"steps": 120, "global_tokens": 192},
        "eval": {"every": 60},
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
        "schedule": {"warmup_steps": 10},
        "metrics": {"every": 100, "tensorboard": False},
        "checkpoint": {"every": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(str(folder / "recipe.yaml"), overrides, folder / "run", "auto", World())
    return folder / "run"


def on(monkeypatch: pytest.MonkeyPatch, module: str, ranks: int, work: Callable[[World], Any]) -> Sequence[Any]:
    """``work(world)`` on so many ranks, threads of this process, where ``module`` opens its group."""
    groups: dict[str, ThreadGroup] = {}

    def opened(world: World, parts: bool = False) -> Any:
        return nullcontext(groups[threading.current_thread().name])

    def live(group: ThreadGroup) -> Any:
        groups[threading.current_thread().name] = group
        return work(World(group.rank, ranks, group.rank, ranks, "mpirun"))

    with monkeypatch.context() as patched:
        patched.setattr(f"{module}.open_group", opened)
        return on_ranks(ranks, live)
