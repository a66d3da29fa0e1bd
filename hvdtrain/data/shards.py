"""Token shards: the HDF5 format, its writer and its reader, side by side.

    DIR/tokenizer.json    Hugging Face `tokenizers` file; its SHA-256 is in the manifest
    DIR/train-00000.h5    /tokens       uint16 (uint32 where the vocabulary needs it), contiguous, native, unfiltered
    DIR/val-00000.h5      /doc_offsets  int64 [documents + 1]; document i is tokens[doc_offsets[i]:doc_offsets[i + 1]]
    DIR/manifest.json     written last; a folder without it holds nothing that counts

``/tokens`` is contiguous so that a reader can ask HDF5 once where its bytes lie and map them into memory: no HDF5 lock,
safe under fork and threads, no copy. The manifest's block digests stand in for HDF5's checksums, which need chunks.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hvdtrain.errors import ConfigError, DataError, OutputError

FORMAT_VERSION = 1
BLOCK_BYTES = 1 << 24
END_OF_TEXT_TOKENS = ("<|endoftext|>", "</s>", "[SEP]")  # the first that a tokenizer has ends each document
SPLITS = ("train", "val", "test")
_STRICT = ConfigDict(strict=True, extra="forbid")  # a manifest is read to the letter


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard. ``block_sha256``: one digest per BLOCK_BYTES of the file."""

    file: str
    split: Literal["train", "val", "test"]
    tokens: Annotated[int, Field(ge=0)]
    documents: Annotated[int, Field(ge=0)]
    file_bytes: Annotated[int, Field(ge=0)]
    block_sha256: tuple[str, ...]

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Manifest:
    """The list of what is whole. ``source``: what the shards were made from and how, to know them again."""

    vocab_size: Annotated[int, Field(ge=1)]
    tokenizer_sha256: str
    dtype: Literal["uint16", "uint32"]
    shards: tuple[ShardInfo, ...]
    source: dict[str, Any]
    kind: str = "text"
    version: int = FORMAT_VERSION

    __pydantic_config__ = _STRICT

    @property
    def data_digest(self) -> str:
        """16 hex digits that change with any token of any shard, or with their order."""
        digest = hashlib.sha256(self.tokenizer_sha256.encode())
        for shard in self.shards:
            digest.update(f"{shard.split} {shard.tokens} {' '.join(shard.block_sha256)};".encode())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a run or a model is tied to."""
        names = ("vocab_size", "tokenizer_sha256", "data_digest")
        return {name: getattr(self, name) for name in names}

    def split(self, name: str) -> tuple[ShardInfo, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype of a shard that holds every id below ``vocab_size``."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


# --- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success flush it to disk and rename it, on failure remove it.

    Errors: OutputError (exit 74) with the path and the system's reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Errors: DataError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value


def file_blocks(path: Path) -> tuple[str, ...]:
    """SHA-256 of each BLOCK_BYTES of the file, in order."""
    with open(path, "rb") as file:
        return tuple(hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK_BYTES), b""))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(folder: Path, split: str, number: int, tokens: np.ndarray, doc_offsets: np.ndarray) -> ShardInfo:
    """Write one shard whole and return what the manifest shall say of it.

    tokens: [N] of the shard dtype; doc_offsets: int64 [documents + 1] from 0 to N. The same input gives the same bytes.
    """
    name = f"{split}-{number:05d}.h5"
    path = folder / name
    # Made in memory: HDF5 on a full disk fails twice, the second time in a way that cannot be told from a crash.
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs["hvdtrain_format"] = FORMAT_VERSION
        file.create_dataset("tokens", data=tokens)
        file.create_dataset("doc_offsets", data=doc_offsets.astype(np.int64, copy=False))
    content = image.getbuffer()
    with writing(path) as temporary:
        temporary.write_bytes(content)
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    digests = tuple(hashlib.sha256(block).hexdigest() for block in blocks)
    return ShardInfo(name, split, len(tokens), len(doc_offsets) - 1, len(content), digests)


class SplitWriter:
    """Gathers documents and writes a shard each time ``shard_tokens`` are full. A document is never cut: one that is
    longer than a shard has a shard of its own.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._gathered = 0
        self.shards: list[ShardInfo] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents: tokens, one after another, and int [documents] how many of them each document has."""
        ends = np.cumsum(lengths)
        document, token = 0, 0
        while document < len(ends):
            room = token + self._shard_tokens - self._gathered
            fitting = int(np.searchsorted(ends, room, side="right"))
            if fitting <= document and not self._gathered:
                fitting = document + 1
            if fitting > document:
                end = int(ends[fitting - 1])
                self._tokens.append(tokens[token:end].astype(self.dtype))
                self._lengths.append(lengths[document:fitting])
                self._gathered += end - token
                document, token = fitting, end
            if document < len(ends):
                self.flush()

    def flush(self) -> None:
        """Write what is gathered, if anything."""
        if self._lengths:
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))])
            tokens = np.concatenate(self._tokens)
            self.shards.append(write_shard(self._folder, self._split, len(self.shards), tokens, offsets))
            self._tokens, self._lengths, self._gathered = [], [], 0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last act of a preparation: from now on the shards count."""
    write_json(folder / "manifest.json", asdict(manifest))


# --- reading -----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json`` and the tokenizer beside it; touches no shard.

    Errors: DataError where there is none, or it is damaged, of a newer format, or the tokenizer is another one.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text)["version"]
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format version {version}; this hvdtrain reads {FORMAT_VERSION}")
        manifest = TypeAdapter(Manifest).validate_json(text)
    except FileNotFoundError:
        hint = "" if folder.is_dir() else " (there is no such folder)"
        raise DataError(
            f"no shards in {folder}{hint}: manifest.json is missing; make them with "
            f"`python -m data_prep text --input PATH --tokenizer FILE --out {folder}`"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path} is damaged ({place} is {first['input']!r}: {first['msg']}); prepare the shards again"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the shards again") from None
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file:
            raise DataError(f"{path} names a shard outside its folder: {shard.file!r}")
    check_tokenizer(folder, manifest)
    return manifest


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Errors: DataError where ``tokenizer.json`` is missing or is not the one that made the shards."""
    path = folder / "tokenizer.json"
    try:
        vocab_size = tokenizer_vocab_size(path)
        digest = file_sha256(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; it belongs to the shards") from None
    if vocab_size != manifest.vocab_size:
        raise DataError(
            f"vocabulary mismatch: the shards in {folder} were made with {manifest.vocab_size} tokens, "
            f"but {path} has {vocab_size}; prepare the shards again with this tokenizer, or put theirs back"
        )
    if digest != manifest.tokenizer_sha256:
        raise DataError(
            f"{path} is not the tokenizer that made the shards: its SHA-256 begins with {digest[:12]}, the manifest "
            f"says {manifest.tokenizer_sha256[:12]}; prepare the shards again, or put their tokenizer back"
        )


def tokenizer_vocab_size(path: Path) -> int:
    """Highest token id plus one, read from a Hugging Face `tokenizers` file without loading it."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        vocab = fields["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return max(ids + [token["id"] for token in fields.get("added_tokens", [])]) + 1
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a tokenizer file ({type(error).__name__}: {error})") from None


def map_tokens(path: Path, tokens: int, dtype: str) -> np.ndarray:
    """Map ``/tokens`` of one shard into memory, read-only: [tokens] of ``dtype``.

    HDF5 is asked once, for the place of the bytes; after that it is out of the way. A shard that someone else wrote
    chunked or compressed is refused here.
    Errors: DataError naming the file.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            dataset = file["tokens"]
            offset, shape, found = dataset.id.get_offset(), dataset.shape, dataset.dtype
    except FileNotFoundError:
        raise DataError(f"shard {path} is listed in the manifest but is missing") from None
    except (OSError, KeyError, AttributeError) as error:
        raise DataError(f"shard {path} cannot be read as HDF5 with /tokens: {error}") from None
    if shape != (tokens,) or found != np.dtype(dtype):
        raise DataError(f"shard {path} holds {found} {shape}, but the manifest says {dtype} ({tokens},)")
    if tokens == 0:
        return np.empty(0, dtype)
    if offset is None:
        raise DataError(f"shard {path} is chunked or compressed; hvdtrain reads contiguous shards: prepare it again")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


class TokenStream:
    """All tokens of one split as one long line, mapped from its shards.

    ``len(stream)`` is the number of tokens. Opening reads headers only. Safe under fork and threads.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str):
        if split not in SPLITS:
            raise ConfigError(f"no split {split!r}; there are: {', '.join(SPLITS)}")
        infos = manifest.split(split)
        if not infos:
            present = sorted({shard.split for shard in manifest.shards}) or ["none"]
            raise DataError(f"{folder} has no {split} shards; it has: {', '.join(present)}")
        for info in infos:
            path = folder / info.file
            if path.exists() and path.stat().st_size != info.file_bytes:
                raise DataError(
                    f"shard {path} has {path.stat().st_size} bytes, the manifest says {info.file_bytes}: "
                    "it is truncated or was replaced"
                )
        # Plain arrays over the maps: numpy's memmap class itself makes each access slower.
        self._shards = [np.asarray(map_tokens(folder / info.file, info.tokens, manifest.dtype)) for info in infos]
        self._views: dict[tuple[int, int], np.ndarray] = {}
        self._ends = np.cumsum([info.tokens for info in infos])
        self.dtype = np.dtype(manifest.dtype)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """``out[i] = stream[starts[i] : starts[i] + length]``: [len(starts), length] of the shard dtype.

        One vectorised gather per shard; only windows that cross a shard's end are put together piece by piece.
        """
        if len(self._shards) == 1:
            return self._view(0, length)[starts]
        out = np.empty((len(starts), length), self.dtype)
        shard_of = np.searchsorted(self._ends, starts, side="right")
        ends_in = np.searchsorted(self._ends, starts + (length - 1), side="right")
        for number in np.unique(shard_of):
            rows = np.flatnonzero((shard_of == number) & (ends_in == number))
            if len(rows):
                first = self._ends[number] - len(self._shards[number])
                out[rows] = self._view(number, length)[starts[rows] - first]
        for row in np.flatnonzero(shard_of != ends_in):
            out[row] = self._slice(int(starts[row]), length)
        return out

    def _view(self, number: int, length: int) -> np.ndarray:
        """All windows of one shard, [tokens - length + 1, length], no copy; kept, for numpy is slow to make it."""
        if (number, length) not in self._views:
            view = np.lib.stride_tricks.sliding_window_view(self._shards[number], length)
            self._views[number, length] = view
        return self._views[number, length]

    def _slice(self, start: int, length: int) -> np.ndarray:
        pieces = []
        for end, shard in zip(self._ends, self._shards, strict=True):
            first = end - len(shard)
            if start < end and start + length > first:
                pieces.append(shard[max(0, start - first) : start + length - first])
        return np.concatenate(pieces)
