"""Token shards: the HDF5 format, its writer and how a shard is mapped into memory, side by side.

    DIR/tokenizer.json    Hugging Face `tokenizers` file; its SHA-256 is in the manifest
    DIR/train-00000.h5    one shard; what it holds depends on the manifest's kind:
      text      /tokens [N], /doc_offsets [D + 1]     document i is tokens[doc_offsets[i]:doc_offsets[i + 1]]
      pairs     /source_tokens, /source_doc_offsets, /target_tokens, /target_doc_offsets
      labels    /tokens, /doc_offsets, /labels [D]    numbers into the manifest's label_names
                of version 2 a text may have several: /labels [N], /label_offsets [D + 1]
      qa        /tokens, /doc_offsets, /spans [D, 2], /examples [D]    first and last token of the answer (0, 0: none)
                of version 2 also what a score needs; a document is a window, and the windows of question j are the
                documents question_offsets[j]:question_offsets[j + 1]
                /question_offsets [Q + 1]
                /windows [D, 2]                       the paragraph's first token in the row, and which of its tokens
                /chars [N, 2], /char_offsets [Q + 1]  of each of a question's paragraph's tokens: first character in
                                                      the paragraph, and the one behind its last
                /texts [N], /text_offsets [Q + 1]     of each question a JSON object in UTF-8: id, context, answers (a
                                                      list of all texts, empty where there is none; null: not told)
    DIR/train-00000_001.h5  another of the same input, which was compressed and could not be cut beforehand
    DIR/manifest.json     written last; a folder without it holds nothing that counts

Tokens are uint16 (uint32 where the vocabulary needs it), chars int32, texts uint8, all else int64. Every dataset is
contiguous, native and unfiltered, so that a reader can ask HDF5 once where its bytes lie and map them into memory: no
HDF5 lock, safe under fork and threads, no copy. The manifest's block digests stand in for HDF5's checksums, which need
chunks.
"""

import ctypes
import hashlib
import io
import json
import mmap
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from h5py._objects import phil
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hvdtrain.errors import DataError
from hvdtrain.files import BLOCK_BYTES, again, fields_sha256, file_sha256, read_text, seen, write, write_json

# By kind, the first for all that it can say: so what older readers know is written as they know it.
FORMAT_VERSIONS: dict[str, tuple[int, ...]] = {"text": (1,), "pairs": (1,), "labels": (1, 2), "qa": (1, 2)}
SPLITS = ("train", "val", "test")
SHARD_NAME = re.compile(r"(train|val|test)-\d{5,}(_\d{3,})?\.h5")
_STRICT = ConfigDict(strict=True, extra="forbid")  # a manifest is read to the letter


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard. ``block_sha256``: one digest per BLOCK_BYTES of the file.

    ``tokens``: those of the source, where there are pairs; ``target_tokens``: those of the target.
    """

    file: str
    split: Literal["train", "val", "test"]
    tokens: Annotated[int, Field(ge=0)]
    documents: Annotated[int, Field(ge=0)]
    file_bytes: Annotated[int, Field(ge=0)]
    block_sha256: tuple[str, ...]
    target_tokens: Annotated[int, Field(ge=0)] = 0

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Manifest:
    """The list of what is whole. ``source``: what the shards were made from and how, to know them again.

    ``special_tokens``: role (eos, pad, bos, unk, mask, sep, cls) -> id, for the roles that the tokenizer has.
    """

    vocab_size: Annotated[int, Field(ge=1)]
    tokenizer_sha256: str
    dtype: Literal["uint16", "uint32"]
    shards: tuple[ShardInfo, ...]
    source: dict[str, Any]
    kind: Literal["text", "pairs", "labels", "qa"] = "text"
    special_tokens: dict[str, int] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    version: int = 1

    __pydantic_config__ = _STRICT

    @property
    def data_digest(self) -> str:
        """16 hex digits that change with any token of any shard, or with their order."""
        digest = hashlib.sha256(self.tokenizer_sha256.encode())
        for shard in self.shards:
            digest.update(f"{shard.split} {shard.tokens} {' '.join(shard.block_sha256)};".encode())
        digest.update("".join(f"{name}\0" for name in self.label_names).encode())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a run or a model is tied to."""
        names = ("vocab_size", "tokenizer_sha256", "data_digest")
        key = "several_of_label_names" if self.has_several_labels else "label_names"
        labels = {key: list(self.label_names)} if self.label_names else {}
        return {name: getattr(self, name) for name in names} | labels

    @property
    def has_several_labels(self) -> bool:
        """May a text have several labels, or none?"""
        return self.kind == "labels" and self.version > 1

    @property
    def has_questions(self) -> bool:
        """Do the shards hold what questions are scored by: ids, answers, characters?"""
        return self.kind == "qa" and self.version > 1

    def split(self, name: str) -> tuple[ShardInfo, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)


TOKENS_OF = {"text": ("tokens",), "pairs": ("source_tokens", "target_tokens"), "labels": ("tokens",), "qa": ("tokens",)}


# Beside tokens: (kind, version) -> dataset -> shape and dtype. None: any length; _D: as many as there are documents.
_D, _D_AND_1 = -1, -2
_INT64, _INT32, _UINT8 = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint8)
Shape = tuple[int | None, ...]
_SPANS: dict[str, tuple[Shape, np.dtype]] = {"spans": ((_D, 2), _INT64), "examples": ((_D,), _INT64)}
_MORE: dict[tuple[str, int], dict[str, tuple[Shape, np.dtype]]] = {
    ("labels", 1): {"labels": ((_D,), _INT64)},
    ("labels", 2): {"labels": ((None,), _INT64), "label_offsets": ((_D_AND_1,), _INT64)},
    ("qa", 1): _SPANS,
    ("qa", 2): {
        **_SPANS,
        "windows": ((_D, 2), _INT64),
        "question_offsets": ((None,), _INT64),
        "chars": ((None, 2), _INT32),
        "char_offsets": ((None,), _INT64),
        "texts": ((None,), _UINT8),
        "text_offsets": ((None,), _INT64),
    },
}


def frame_tokens(special: Mapping[str, int]) -> tuple[int, int]:
    """Ids of what stands before a text and after it, from those that the tokenizer has (role -> id)."""
    first = next(special[role] for role in ("cls", "bos", "eos") if role in special)
    last = next(special[role] for role in ("sep", "eos") if role in special)
    return first, last


def target_begin(special: Mapping[str, int]) -> int | None:
    """Id of what stands before each target of a pair: what begins a text, or else what ends one (role -> id)."""
    return special.get("bos", special.get("eos"))


def has_labels(kind: str) -> bool:
    """Does the manifest of such shards name labels?"""
    return kind == "labels"


def offsets_of(tokens: str) -> str:
    """The name of the offsets that belong to a dataset of tokens."""
    return tokens.replace("tokens", "doc_offsets")


def expected_datasets(info: ShardInfo, manifest: Manifest) -> dict[str, tuple[Shape, np.dtype]]:
    """What a shard must hold: name -> shape (None: any length) and dtype."""
    found: dict[str, tuple[Shape, np.dtype]] = {}
    for name, count in zip(TOKENS_OF[manifest.kind], (info.tokens, info.target_tokens), strict=False):
        found[name] = ((count,), np.dtype(manifest.dtype))
        found[offsets_of(name)] = ((info.documents + 1,), _INT64)
    for name, (shape, dtype) in _MORE.get((manifest.kind, manifest.version), {}).items():
        counted = {_D: info.documents, _D_AND_1: info.documents + 1}
        found[name] = (tuple(counted.get(length, length) for length in shape), dtype)
    return found


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype of a shard that holds every id below ``vocab_size``."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


# --- writing -----------------------------------------------------------------------------------------------------


def write_shard(folder: Path, split: str, number: int, datasets: Mapping[str, np.ndarray], part: int = 0) -> ShardInfo:
    """Write one shard whole and return what the manifest shall say of it. The same input gives the same bytes.

    part: counts the shards that have this number, from 0.
    datasets: as the format says, tokens in the shard's dtype, offsets int64 from 0 to the number of tokens.
    """
    name = f"{split}-{number:05d}.h5" if not part else f"{split}-{number:05d}_{part:03d}.h5"
    path = folder / name
    # Made in memory: HDF5 on a full disk fails twice, the second time in a way that cannot be told from a crash.
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs["hvdtrain_format"] = 1  # of the file; what it holds is told by the manifest
        for key, values in datasets.items():
            file.create_dataset(key, data=values)
    content = image.getbuffer()
    write(path, lambda temporary: temporary.write_bytes(content))
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    digests = tuple(hashlib.sha256(block).hexdigest() for block in blocks)
    tokens, *targets = (len(datasets[key]) for key in datasets if key.endswith("tokens"))
    documents = next(len(datasets[key]) - 1 for key in datasets if key.endswith("doc_offsets"))
    return ShardInfo(name, split, tokens, documents, len(content), digests, *targets)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last act of a preparation: from now on the shards count."""
    fields = json.loads(json.dumps(asdict(manifest)))
    write_json(folder / "manifest.json", {**fields, "manifest_sha256": fields_sha256(fields)})


# --- reading -----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json`` and the tokenizer beside it; touches no shard.

    Errors: DataError where there is none, or it is damaged, of a newer format, or the tokenizer is another one.
    """
    path = folder / "manifest.json"
    try:
        fields = json.loads(read_text(path))
        version = fields["version"]
        known_versions = FORMAT_VERSIONS.get(fields.get("kind", "text"), (1,))
        if version not in known_versions:
            raise DataError(
                f"{path} has format version {version}; this hvdtrain reads {' and '.join(map(str, known_versions))}"
            )
        known = fields.pop("manifest_sha256", None)  # shards of before it was written have none
        manifest = TypeAdapter(Manifest).validate_json(json.dumps(fields))
    except FileNotFoundError:
        hint = "" if seen(folder) else " (there is no such folder)"
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
            f"{path} is damaged ({place} is {first['input']!r:.200}: {first['msg']}); prepare the shards again"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the shards again") from None
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file:
            raise DataError(f"{path} names a shard outside its folder: {shard.file!r}")
    check_tokenizer(folder, manifest)
    if known is not None and known != fields_sha256(fields):
        raise DataError(f"{path} is damaged (it does not match its own digest); prepare the shards again")
    return manifest


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Errors: DataError where ``tokenizer.json`` is missing or is not the one that made the shards."""
    path = folder / "tokenizer.json"
    try:
        vocab_size = tokenizer_vocab_size(path)
        digest = file_sha256(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; it belongs to the shards") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
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
        return vocab_size_of(json.loads(read_text(path)))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a tokenizer file ({type(error).__name__}: {error})") from None


def vocab_size_of(fields: Mapping[str, Any]) -> int:
    """The same from the fields of such a file."""
    vocab = fields["model"]["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    return max(ids + [token["id"] for token in fields.get("added_tokens", [])]) + 1


def check_files(folder: Path, manifest: Manifest) -> None:
    """Is every listed shard there, of its size, and none beside them? One look at the folder, no shard is opened.

    Errors: DataError naming the first shard of which that is not so.
    """
    for problem in file_problems(folder, manifest):
        raise DataError(problem)


def file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What ``check_files`` finds: missing, truncated or replaced, and strange shards, one after another."""
    try:
        sizes = again(lambda: _sizes(folder), folder)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None
    for info in manifest.shards:
        size = sizes.pop(info.file, None)
        if size is None:
            yield f"shard {folder / info.file} is listed in the manifest but is missing"
        elif size != info.file_bytes:
            yield (
                f"shard {folder / info.file} has {size} bytes, the manifest says {info.file_bytes}: "
                "it is truncated or was replaced"
            )
    for name in sorted(sizes):
        yield f"shard {folder / name} is not listed in the manifest: it belongs to another preparation; remove it"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each shard in a folder, by its name."""
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if SHARD_NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # a link that leads nowhere
                    sizes[entry.name] = entry.stat().st_size
    return sizes


class ReadThrough:
    """A dataset that cannot be mapped (chunked, compressed): ``part[a:b]`` reads through HDF5.

    The file is opened anew in each process, for a handle must not cross a fork. One thread reads at a time, under the
    lock of h5py, which sees to it that a child born meanwhile does not wait for it for ever.
    Errors: DataError naming the file.
    """

    def __init__(self, path: Path, name: str, length: int):
        self._path, self._name, self._length = path, name, length
        self._pid, self._file = 0, None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        with phil:
            try:
                if self._pid != os.getpid():
                    self._file, self._pid = _open_shard(self._path), os.getpid()
                return self._file[self._name][part]
            except (OSError, KeyError, RuntimeError) as error:
                raise DataError(f"cannot read /{self._name} of shard {self._path} through HDF5: {error}") from None


def map_shard(folder: Path, info: ShardInfo, manifest: Manifest) -> dict[str, np.ndarray | ReadThrough]:
    """The datasets of one shard, read-only. HDF5 is asked once where they lie; after that it is out of the way.

    A dataset that someone else wrote chunked or compressed comes as ``ReadThrough``.
    Errors: DataError naming the file.
    """
    path = folder / info.file
    found: dict[str, np.ndarray | ReadThrough] = {}
    places: dict[str, int | None] = {}
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    try:
        with _open_shard(path) as file:
            for name, dataset in file.items():
                places[name], shapes[name] = dataset.id.get_offset(), (dataset.shape, dataset.dtype)
    except FileNotFoundError:
        raise DataError(f"shard {path} is listed in the manifest but is missing") from None
    except (OSError, KeyError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"shard {path} cannot be read as HDF5: {error}") from None
    content = None
    for name, (expected, dtype) in expected_datasets(info, manifest).items():
        if name not in shapes:
            there = ", ".join(sorted(map(str, shapes))) or "nothing"  # a damaged name may be bytes
            raise DataError(f"shard {path} has no /{name}; it holds {there}")
        shape, kind = shapes[name]
        if len(shape) == len(expected):
            expected = tuple(there if length is None else length for there, length in zip(shape, expected, strict=True))
        if (shape, kind) != (expected, dtype):
            raise DataError(f"shard {path} holds /{name} {kind} {shape}, but the manifest says {dtype} {expected}")
        size = int(np.prod(shape))
        if size == 0:
            found[name] = np.empty(shape, dtype)
        elif places[name] is None:
            found[name] = ReadThrough(path, name, shape[0])
        else:
            content = map_file(path) if content is None else content
            end = places[name] + size * dtype.itemsize
            if end > len(content):
                raise DataError(f"shard {path} ends before its /{name} does: it is truncated")
            found[name] = content[places[name] : end].view(dtype).reshape(shape)
    return found


def _open_shard(path: Path) -> h5py.File:
    return again(lambda: h5py.File(path, "r", locking=False), path)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_file(path: Path) -> np.ndarray:
    """A file's bytes, mapped read-only: uint8 [size]. Unmapped when the last array on it is gone.

    Unlike Python's own mmap it keeps no file open: ten thousand shards would exceed the limit on open files.
    """
    try:
        handle = again(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    try:
        size = os.fstat(handle).st_size
        if size == 0:
            return np.empty(0, np.uint8)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    finally:
        os.close(handle)
    if address in (None, ctypes.c_void_p(-1).value):
        raise DataError(f"cannot map {path} into memory: {os.strerror(ctypes.get_errno())}")
    memory = (ctypes.c_uint8 * size).from_address(address)
    # Not at exit: a thread may still be reading, and would crash the process that has just ended well.
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    content = np.frombuffer(memory, np.uint8)
    content.flags.writeable = False
    return content
