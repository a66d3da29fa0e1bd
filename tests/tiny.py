"""Small data and small models for the tests."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

from hvdtrain.data.questions import Question, text_of
from hvdtrain.data.shards import Manifest, read_manifest, token_dtype, write_manifest, write_shard
from hvdtrain.data.stream import TokenStream
from hvdtrain.files import file_blocks, file_sha256
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.options import TransformerOptions
from hvdtrain.slices import Rect, whole_rect
from hvdtrain.tasks.task import run

torch.set_num_threads(1)  # a second one would only wait for the first: minutes, where the cores are busy

CPU = torch.device("cpu")
Datasets = dict[str, np.ndarray]  # of one shard


def write_tokenizer(path: Path, vocab_size: int) -> None:
    vocab = {f"t{number}": number for number in range(vocab_size)}
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}), encoding="utf-8")


def write_data(folder: Path, vocab_size: int = 50, **splits: Sequence[Sequence[int]]) -> Manifest:
    """A folder of shards: ``write_data(folder, train=[tokens of shard 0, tokens of shard 1], val=[...])``."""
    pieces = {split: [documents([tokens], vocab_size) for tokens in shards] for split, shards in splits.items()}
    return write_corpus(folder, pieces, vocab_size)


def documents(texts: Sequence[Sequence[int]], vocab_size: int = 50, side: str = "") -> Datasets:
    """Texts as a shard holds them; ``side``: ``source_`` or ``target_`` of pairs."""
    tokens = [token for text in texts for token in np.asarray(text).tolist()]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return {f"{side}tokens": np.array(tokens, token_dtype(vocab_size)), f"{side}doc_offsets": offsets}


def pairs(rows: Sequence[tuple[Sequence[int], Sequence[int]]], vocab_size: int = 50) -> Datasets:
    """(source, target) of each row, as a shard holds them."""
    sides = zip(("source_", "target_"), (0, 1), strict=True)
    return {key: v for side, at in sides for key, v in documents([r[at] for r in rows], vocab_size, side).items()}


def labelled(rows: Sequence[tuple[Sequence[int], int]], vocab_size: int = 50) -> Datasets:
    """(text, label) of each row, as a shard holds them."""
    return {**documents([text for text, _ in rows], vocab_size), "labels": np.array([n for _, n in rows], np.int64)}


def several(rows: Sequence[tuple[Sequence[int], Sequence[int]]], vocab_size: int = 50) -> Datasets:
    """(text, labels) of each row, as a shard of version 2 holds them."""
    labels = documents([labels for _, labels in rows], 1 << 20)
    found = {"labels": labels["tokens"].astype(np.int64), "label_offsets": labels["doc_offsets"]}
    return {**documents([text for text, _ in rows], vocab_size), **found}


HEAD = (1, 5, 2)  # [cls] a question [sep]


def asked(rows: Sequence[tuple[str, Sequence[str] | None]], first: int = 0, room: int = 8, step: int = 5) -> Datasets:
    """Questions by (paragraph, answers; None: not told), as a shard of version 2 holds them: a token a character, three
    more before each window and one behind it; ids q0, q1, ... from ``first`` on.
    """
    tokens, spans, places, counts, chars, texts = [], [], [], [], [], []
    for number, (context, answers) in enumerate(rows):
        begins = range(0, max(1, len(context) - room + step), step)
        for begin in begins:
            window = context[begin : begin + room]
            tokens.append([*HEAD, *(3 + ord(letter) % 47 for letter in window), 2])
            at = context.index(answers[0]) if answers else -1
            inside = answers and begin <= at and at + len(answers[0]) <= begin + len(window)
            spans.append([3 + at - begin, 2 + at - begin + len(answers[0])] if answers and inside else [0, 0])
            places.append([len(HEAD), begin])
        counts.append(len(begins))
        chars.append(np.array([[at, at + 1] for at in range(len(context))], np.int32).reshape(-1, 2))
        said = Question(f"q{first + number}", context, None if answers is None else tuple(answers))
        texts.append(np.frombuffer(text_of(said), np.uint8))
    return {
        **documents(tokens),
        "spans": np.array(spans, np.int64).reshape(-1, 2),
        "examples": np.repeat(np.arange(first, first + len(rows)), counts),
        "windows": np.array(places, np.int64).reshape(-1, 2),
        "question_offsets": np.cumsum([0, *counts]),
        "chars": np.concatenate([np.empty((0, 2), np.int32), *chars]),
        "char_offsets": np.cumsum([0, *map(len, chars)]),
        "texts": np.concatenate([np.empty(0, np.uint8), *texts]),
        "text_offsets": np.cumsum([0, *map(len, texts)]),
    }


def write_corpus(folder: Path, splits: Mapping[str, Sequence[Datasets]], vocab_size: int = 50, **more: Any) -> Manifest:
    """A folder of shards of any kind: ``write_corpus(folder, {"train": [datasets of shard 0, ...]}, kind="pairs")``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json", vocab_size)
    infos = [
        write_shard(folder, split, number, datasets)
        for split, shards in splits.items()
        for number, datasets in enumerate(shards)
    ]
    digest = file_sha256(folder / "tokenizer.json")
    manifest = Manifest(vocab_size, digest, str(token_dtype(vocab_size)), tuple(infos), source={}, **more)
    write_manifest(folder, manifest)
    return manifest


def rewrite(path: Path, change: Callable[[Datasets], Any] = lambda datasets: None, chunk: int = 0, **how: Any) -> None:
    """A shard written anew by hand: its datasets changed in place, stored in chunks, with ``compression``, ..."""
    with h5py.File(path) as file:
        datasets = {name: file[name][:] for name in file}
    change(datasets)
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            chunks = (min(chunk, len(values)), *values.shape[1:]) if chunk and len(values) else None
            file.create_dataset(name, data=values, chunks=chunks, **(how if len(values) else {}))


def seal(folder: Path) -> Manifest:
    """The manifest made right for the files as they are now: their sizes and digests, not what they hold."""
    manifest = read_manifest(folder)
    shards = []
    for info in manifest.shards:
        path = folder / info.file
        shards.append(replace(info, file_bytes=path.stat().st_size, block_sha256=file_blocks(path)))
    manifest = replace(manifest, shards=tuple(shards))
    write_manifest(folder, manifest)
    return manifest


def multiply(folder: Path, count: int, link: Callable[[Path, Path], Any] = os.link) -> Manifest:
    """``count`` train shards out of one: links to it, or copies."""
    manifest = read_manifest(folder)
    (first,) = manifest.shards
    shards = tuple(replace(first, file=f"train-{number:05d}.h5") for number in range(count))
    for info in shards[1:]:
        link(folder / first.file, folder / info.file)
    manifest = replace(manifest, shards=shards)
    write_manifest(folder, manifest)
    return manifest


def random_tokens(count: int, vocab_size: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def stream_of(folder: Path, tokens: Sequence[int], vocab_size: int = 50) -> TokenStream:
    return TokenStream([(folder, write_data(folder, vocab_size, train=[tokens]))], "train")


def tiny_decoder(seed: int = 0, vocab_size: int = 50, **options) -> Decoder:
    small = {"layers": 2, "heads": 2, "width": 16, "context": 8, "ff_ratio": 2.0}
    model = Decoder(TransformerOptions(**{**small, **options}), vocab_size)
    model.initialise(seed)
    return model


class Held:
    """``Tensors`` that a model holds."""

    def __init__(self, model: nn.Module):
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.names = list(self._tensors)

    def whole(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self._tensors[name].shape, self._tensors[name].dtype

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        whole = whole_rect(tensor.shape)
        return torch.cat([tensor[place.index_in(whole)] for place in places or [whole]])


def loss_of(task: Any, model: Callable[..., torch.Tensor], batch: Any) -> Any:
    """A task's loss of a batch, as a replica takes it."""
    return task.loss(model, model(*task.inputs(batch)), batch)


def measure_of(task: Any, model: Callable[..., torch.Tensor], batch: Any) -> torch.Tensor:
    """A task's sums over a batch of evaluation, without what is decoded."""
    return task.measure(model, run(model, task.inputs(batch), batch.rows_at_once), batch)
