"""Are the shards what the manifest says, to the last bit? Every digest, offset, label and token range."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np

from hvdtrain.data.shards import TOKENS_OF, Manifest, ReadThrough, ShardInfo, map_shard, offsets_of
from hvdtrain.errors import DataError
from hvdtrain.files import BLOCK_BYTES, again

_AT_ONCE = 1 << 22  # numbers looked at together


def check_shards(folder: Path, manifest: Manifest, infos: Sequence[ShardInfo], threads: int = 1) -> list[str]:
    """Everything that is wrong with these shards, each with shard and byte, in order; nothing: they are whole.

    Reads every byte once or twice: about 1 GB/s a thread.
    """
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda info: list(_problems(folder, manifest, info)), infos)
        return [problem for problems in found for problem in problems]


def _problems(folder: Path, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    path = folder / info.file
    try:
        damaged = again(lambda: list(_damaged_blocks(path, info)), path)
        if damaged:  # what such a file holds means nothing
            yield from damaged
        else:
            yield from _wrong_values(path, map_shard(folder, info, manifest), manifest)
    except DataError as error:
        yield str(error)
    except OSError as error:
        yield f"cannot read shard {path}: {error.strerror}"


def _wrong_values(path: Path, datasets: dict[str, np.ndarray | ReadThrough], manifest: Manifest) -> Iterator[str]:
    for name in TOKENS_OF[manifest.kind]:
        yield from _beyond(path, name, datasets[name], manifest.vocab_size, "vocabulary")
        yield from _wrong_offsets(path, offsets_of(name), datasets[offsets_of(name)], len(datasets[name]))
    if manifest.kind == "labels":
        yield from _beyond(path, "labels", datasets["labels"], len(manifest.label_names), "list of labels")
    if manifest.kind == "qa":
        yield from _wrong_spans(path, datasets["spans"], datasets["doc_offsets"])


def _damaged_blocks(path: Path, info: ShardInfo) -> Iterator[str]:
    with open(path, "rb") as file:  # buffered: a read gives less than a block only at the end
        for number in count():
            block = file.read(BLOCK_BYTES)
            known = info.block_sha256[number] if number < len(info.block_sha256) else None
            if not block and known is None:
                return
            first = number * BLOCK_BYTES
            if not block or known is None:
                yield f"shard {path} ends at byte {path.stat().st_size}, the manifest says {info.file_bytes}"
                return
            if hashlib.sha256(block).hexdigest() != known:
                yield (
                    f"shard {path} is damaged in block {number}, bytes {first} to {first + len(block) - 1}: "
                    "they are not those that were written (SHA-256)"
                )


def _beyond(path: Path, name: str, values: np.ndarray | ReadThrough, limit: int, what: str) -> Iterator[str]:
    for first in range(0, len(values), _AT_ONCE):
        part = values[first : first + _AT_ONCE]
        if part.max() >= limit or part.min() < 0:
            at = int(np.flatnonzero((part >= limit) | (part < 0))[0])
            yield f"shard {path}: /{name}[{first + at}] is {part[at]}, beyond the {what} of {limit}"
            return


def _wrong_offsets(path: Path, name: str, values: np.ndarray | ReadThrough, tokens: int) -> Iterator[str]:
    offsets = values[0 : len(values)]
    back = np.flatnonzero(offsets[1:] < offsets[:-1])  # a difference may overflow
    if len(back):
        at = int(back[0])
        yield f"shard {path}: /{name} goes backwards at document {at}: {offsets[at]}, then {offsets[at + 1]}"
    elif offsets[0] != 0 or offsets[-1] != tokens:
        yield f"shard {path}: /{name} goes from {offsets[0]} to {offsets[-1]}, but the shard has {tokens} tokens"


def _wrong_spans(path: Path, spans: np.ndarray | ReadThrough, offsets: np.ndarray | ReadThrough) -> Iterator[str]:
    first, last = spans[0 : len(spans)].T
    tokens = np.maximum(np.diff(offsets[0 : len(offsets)]), 1)  # 0, 0 means none, also in an empty text
    wrong = np.flatnonzero((first < 0) | (last < first) | (last >= tokens))
    if len(wrong):
        at = int(wrong[0])
        yield f"shard {path}: /spans[{at}] goes from {first[at]} to {last[at]}, but the text has {tokens[at]} tokens"
