"""The folders of shards that a run learns from: one, or several mixed by weight. Opened, checked, staged."""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hvdtrain.data.check import check_shards
from hvdtrain.data.shards import Manifest, ShardInfo, check_files, read_manifest
from hvdtrain.errors import ConfigError, DataError, OutputError
from hvdtrain.files import BLOCK_BYTES, exists, make_folder, read_block, write, write_json
from hvdtrain.options import Options, option


class DataOptions(Options):
    dir: str = option("data/text", "folder of shards made by data_prep")
    mixture: dict[str, float] = option(
        {}, "instead of dir: several folders and their weights, {data/a: 0.7, data/b: 0.3}"
    )
    verify: Literal["full", "sizes"] = option(
        "full", "before the first step: full: every digest and token, shared by the ranks; sizes: only the files' sizes"
    )
    stage: str = option(
        "", "folder on each node's own disk to copy the shards to first; empty: read them where they are"
    )


@dataclass(frozen=True)
class Corpora:
    """Folders with their manifests, and the weight of each where there are several."""

    entries: tuple[tuple[Path, Manifest], ...]
    weights: tuple[float, ...]

    @property
    def manifest(self) -> Manifest:
        """That of the first; tokenizer, kind and special tokens are those of all."""
        return self.entries[0][1]

    @property
    def data_digest(self) -> str:
        if len(self.entries) == 1:
            return self.manifest.data_digest
        parts = [f"{m.data_digest} {w!r}" for (_, m), w in zip(self.entries, self.weights, strict=True)]
        return hashlib.sha256(";".join(parts).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a run or a model is tied to."""
        return {**self.manifest.identity(), "data_digest": self.data_digest}

    @property
    def names(self) -> str:
        return ", ".join(str(folder) for folder, _ in self.entries)


@dataclass(frozen=True)
class CorpusFacts:
    """What the data say of a run's size. 0: not known, and left out of the estimate.

    ``longest``: tokens of the longest row that is trained on, where rows have lengths of their own; 0: the context.
    ``shard_bytes``, ``documents``: of all shards.
    """

    vocab_size: int
    classes: int = 2
    longest: int = 0
    train_tokens: int = 0
    shard_bytes: int = 0
    documents: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> "CorpusFacts":
        """Words and classes alone."""
        return cls(manifest.vocab_size, max(1, len(manifest.label_names)))


def open_corpora(options: DataOptions) -> Corpora:
    """Read and check manifests, tokenizers and the files' sizes; no shard is opened. Errors: see ``open_folders``."""
    if any(not weight > 0 for weight in options.mixture.values()):
        raise ConfigError(f"data.mixture={options.mixture}: weights must be above 0")
    return open_folders(folders_of(options), tuple(options.mixture.values()) or (1.0,))


def open_folders(folders: Sequence[Path], weights: tuple[float, ...]) -> Corpora:
    """``open_corpora`` of any folders, a weight for each.

    Errors: DataError where one is missing or damaged, or they were made with different tokenizers.
    """
    entries = []
    for folder in folders:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        entries.append((folder, manifest))
    first = entries[0][1]
    for folder, manifest in entries[1:]:
        for key in ("tokenizer_sha256", "kind", "special_tokens", "label_names"):
            if getattr(manifest, key) != getattr(first, key):
                raise DataError(
                    f"{folders[0]} and {folder} cannot be mixed: they differ in {key}; "
                    "prepare both alike, with one tokenizer"
                )
    return Corpora(tuple(entries), weights)


def folders_of(options: DataOptions) -> list[Path]:
    """As they are written there, in order."""
    return [Path(name) for name in options.mixture or [options.dir]]


def check_corpora(corpora: Corpora, rank: int, size: int, threads: int) -> None:
    """Check this rank's part of all shards to the last bit (local). Errors: DataError naming shard, block and byte."""
    shards = [(folder, manifest, info) for folder, manifest in corpora.entries for info in manifest.shards]
    for folder, manifest in corpora.entries:
        mine = [info for at, (owner, _, info) in enumerate(shards) if owner == folder and at % size == rank]
        if problems := check_shards(folder, manifest, mine, threads):
            more = f" (and {len(problems) - 1} more: python -m data_prep verify {folder})" if len(problems) > 1 else ""
            raise DataError(problems[0] + more)


def stage(
    corpora: Corpora, target: Path, is_first_of_node: bool, meet: Callable[[Callable[[], None]], None]
) -> Corpora:
    """Copy the shards to a folder on the node's own disk, and read them there from now on (collective).

    One rank a node copies, checking each block's digest on the way; the others wait in ``meet``, which runs a function
    on every rank and fails on all where it fails on one. What is there already, and whole in size, is kept.
    Errors: OutputError where the disk has no room; DataError where a shard is damaged.
    """
    places = [target / manifest.data_digest for _, manifest in corpora.entries]

    def copy() -> None:
        if is_first_of_node:
            _check_room(corpora, places, target)
            for (folder, manifest), place in zip(corpora.entries, places, strict=True):
                _copy_folder(folder, manifest, place)

    meet(copy)
    entries = tuple((place, manifest) for place, (_, manifest) in zip(places, corpora.entries, strict=True))

    def look() -> None:
        for place, manifest in entries:
            check_files(place, manifest)

    meet(look)
    return replace(corpora, entries=entries)


def _check_room(corpora: Corpora, places: Sequence[Path], target: Path) -> None:
    try:
        make_folder(target)
        free = shutil.disk_usage(target).free
    except OSError as error:
        raise OutputError(f"cannot stage to {target} on {socket.gethostname()}: {error.strerror}") from None
    wanted = 0
    for (_, manifest), place in zip(corpora.entries, places, strict=True):
        wanted += sum(info.file_bytes for info in manifest.shards if not _is_there(place, info))
    if wanted > free:
        raise OutputError(
            f"cannot stage to {target} on {socket.gethostname()}: the shards need {wanted / 1e9:.2f} GB more and "
            f"{free / 1e9:.2f} GB are free; choose another data.stage, or leave it empty"
        )


def _copy_folder(folder: Path, manifest: Manifest, place: Path) -> None:
    try:
        make_folder(place)
    except OSError as error:
        raise OutputError(f"cannot write to {place}: {error.strerror}") from None
    write(place / "tokenizer.json", partial(shutil.copyfile, folder / "tokenizer.json"))
    for info in manifest.shards:
        if not _is_there(place, info):
            write(place / info.file, partial(_copy_shard, folder / info.file, info))
    write_json(place / "source.json", {"copy_of": str(folder.resolve()), "host": socket.gethostname()})


def _is_there(place: Path, info: ShardInfo) -> bool:
    path = place / info.file
    return exists(path) and path.stat().st_size == info.file_bytes


def _copy_shard(path: Path, info: ShardInfo, to: Path) -> None:
    with open(to, "wb", buffering=0) as copy:
        for block in _whole_blocks(path, info):
            view = memoryview(block)
            while view:
                view = view[copy.write(view) :]


def _whole_blocks(path: Path, info: ShardInfo) -> Iterator[bytes]:
    """A shard block by block, each checked. Errors: DataError; what is raised for the copy is about the copy."""
    try:
        for number, known in enumerate(info.block_sha256):
            block = read_block(path, number)
            if hashlib.sha256(block).hexdigest() != known:
                first = number * BLOCK_BYTES
                raise DataError(
                    f"shard {path} is damaged in block {number}, bytes {first} to {first + len(block) - 1}: "
                    "they are not those that were written (SHA-256)"
                )
            yield block
        with open(path, "rb") as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from None
