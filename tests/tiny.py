"""Small data, small models and stand-in groups for the tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hvdtrain.comm.group import Pending
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.shards import Manifest, TokenStream, file_sha256, token_dtype, write_manifest, write_shard
from hvdtrain.models.decoder import Decoder, DecoderOptions

torch.set_num_threads(1)  # a second one would only wait for the first: minutes, where the cores are busy

CPU = torch.device("cpu")


def write_tokenizer(path: Path, vocab_size: int) -> None:
    vocab = {f"t{number}": number for number in range(vocab_size)}
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}), encoding="utf-8")


def write_data(folder: Path, vocab_size: int = 50, **splits: Sequence[Sequence[int]]) -> Manifest:
    """A folder of shards: ``write_data(folder, train=[tokens of shard 0, tokens of shard 1], val=[...])``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json", vocab_size)
    dtype = token_dtype(vocab_size)
    shards = [
        write_shard(folder, split, number, np.asarray(tokens, dtype), np.array([0, len(tokens)]))
        for split, pieces in splits.items()
        for number, tokens in enumerate(pieces)
    ]
    digest = file_sha256(folder / "tokenizer.json")
    manifest = Manifest(vocab_size, digest, str(dtype), tuple(shards), source={})
    write_manifest(folder, manifest)
    return manifest


def random_tokens(count: int, vocab_size: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def stream_of(folder: Path, tokens: Sequence[int], vocab_size: int = 50) -> TokenStream:
    return TokenStream(folder, write_data(folder, vocab_size, train=[tokens]), "train")


def tiny_decoder(seed: int = 0, vocab_size: int = 50, **options) -> Decoder:
    small = {"layers": 2, "heads": 2, "width": 16, "context": 8, "ff_ratio": 2.0}
    model = Decoder(DecoderOptions(**{**small, **options}), vocab_size)
    model.initialise(seed)
    return model


class LateGroup(LocalGroup):
    """A group of one whose sums arrive only when they are waited for, as on a network.

    Until then the tensor holds NaN: who sends too early, writes after sending or reads before waiting, is found out.
    ``sent`` lists the names in the order in which they left.
    """

    def __init__(self) -> None:
        self.sent: list[str] = []

    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        self.sent.append(name)
        return _Late(tensor)


class _Late:
    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._values = tensor, tensor.clone()
        tensor.fill_(torch.nan)

    def wait(self) -> None:
        self._tensor.copy_(self._values)
