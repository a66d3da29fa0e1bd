"""Are the shards what the manifest says, to the last bit? Every digest, offset, label and token range."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path

import numpy as np

from hvdtrain.data.questions import question_of
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
    if manifest.has_several_labels:
        yield from _wrong_offsets(path, "label_offsets", datasets["label_offsets"], len(datasets["labels"]), "labels")
    if manifest.kind == "qa":
        yield from _wrong_spans(path, datasets["spans"], datasets["doc_offsets"])
    if manifest.has_questions:
        yield from _wrong_questions(path, datasets)


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


def _wrong_offsets(
    path: Path, name: str, values: np.ndarray | ReadThrough, count: int, what: str = "tokens"
) -> Iterator[str]:
    if not len(values):
        yield f"shard {path}: /{name} is empty; offsets begin with 0"
        return
    offsets = values[0 : len(values)]
    back = np.flatnonzero(offsets[1:] < offsets[:-1])  # a difference may overflow
    if len(back):
        at = int(back[0])
        yield f"shard {path}: /{name} goes backwards at document {at}: {offsets[at]}, then {offsets[at + 1]}"
    elif offsets[0] != 0 or offsets[-1] != count:
        yield f"shard {path}: /{name} goes from {offsets[0]} to {offsets[-1]}, but the shard has {count} {what}"


def _wrong_spans(path: Path, spans: np.ndarray | ReadThrough, offsets: np.ndarray | ReadThrough) -> Iterator[str]:
    first, last = spans[0 : len(spans)].T
    tokens = np.maximum(np.diff(offsets[0 : len(offsets)]), 1)  # 0, 0 means none, also in an empty text
    wrong = np.flatnonzero((first < 0) | (last < first) | (last >= tokens))
    if len(wrong):
        at = int(wrong[0])
        yield f"shard {path}: /spans[{at}] goes from {first[at]} to {last[at]}, but the text has {tokens[at]} tokens"


def _wrong_questions(path: Path, datasets: dict[str, np.ndarray | ReadThrough]) -> Iterator[str]:
    """Offsets of questions, the places of windows, and what is said of each question."""
    whole = {name: values[0 : len(values)] for name, values in datasets.items()}
    offsets, windows = whole["question_offsets"], whole["windows"]
    wrong = list(_wrong_offsets(path, "question_offsets", offsets, len(windows), "windows"))
    for name in ("char", "text"):
        wrong += _wrong_offsets(path, f"{name}_offsets", whole[f"{name}_offsets"], len(whole[f"{name}s"]), f"{name}s")
        if not wrong and len(whole[f"{name}_offsets"]) != len(offsets):
            wrong.append(f"shard {path}: /{name}_offsets are not of its {len(offsets) - 1} questions")
    yield from wrong
    if wrong:
        return
    tokens = np.repeat(np.diff(whole["char_offsets"]), np.diff(offsets))  # of each window's paragraph
    lengths = np.diff(whole["doc_offsets"])
    first, begin = windows.T
    odd = np.flatnonzero((first < 1) | (first >= lengths) | (begin < 0) | (begin + lengths - first - 1 > tokens))
    if len(odd):
        at = int(odd[0])
        yield f"shard {path}: /windows[{at}] is {windows[at].tolist()}, beyond its paragraph of {tokens[at]} tokens"
    for number, (start, end) in enumerate(pairwise(whole["text_offsets"].tolist())):
        try:
            said = question_of(whole["texts"][start:end])
        except (ValueError, RecursionError) as error:
            yield f"shard {path}: /texts of question {number} are none: {error}"
            return
        chars = whole["chars"][whole["char_offsets"][number] : whole["char_offsets"][number + 1]]
        most = len(said.context)
        if len(chars) and (chars.min() < 0 or (chars[:, 1] < chars[:, 0]).any() or chars.max() > most):
            yield f"shard {path}: /chars of question {number} are beyond its paragraph of {most} characters"
            return
