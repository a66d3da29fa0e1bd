"""Plain text -> token shards for language models. Each document ends with the end-of-text token."""

import fcntl
import hashlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.corpus import InputFile, corpus_sha256, read_text
from data_prep.encoder import Encoder
from data_prep.tokenizer import load_tokenizer
from hvdtrain.data.shards import (
    Manifest,
    SplitWriter,
    file_sha256,
    read_manifest,
    tokenizer_vocab_size,
    write_manifest,
    writing,
)
from hvdtrain.errors import ConfigError, DataError, OutputError

_BATCH_BYTES = 1 << 23  # of text encoded at once; bounds the memory
_SAMPLE_FILES = 32
_OURS = re.compile(r"(train|val)-\d{5}\.h5|\.((train|val)-\d{5}\.h5|manifest\.json|tokenizer\.json)\.\d+\.tmp")


@dataclass(frozen=True)
class TextOptions:
    """``val_split``: ``hash`` sends each document to validation by a digest of its text, whatever else there is;
    ``tail`` takes the last ``val_fraction`` of the bytes and cuts a document where it must.
    """

    val_fraction: float = 0.01
    val_split: str = "hash"
    shard_tokens: int = 1 << 26


def prepare_text(
    files: Sequence[InputFile], tokenizer_path: Path, out: Path, options: TextOptions
) -> tuple[Manifest, bool]:
    """Write shards, tokenizer and manifest into ``out``; returns the manifest and whether it was there before.

    A preparation that was interrupted is begun anew; one that is complete and of the same input is kept.
    Errors: DataError for bad text, ConfigError where ``out`` holds other shards, OutputError when writing fails.
    """
    _, end_of_text = load_tokenizer(tokenizer_path)
    source = {
        "corpus_sha256": corpus_sha256(files),
        "tokenizer_sha256": file_sha256(tokenizer_path),
        "val_fraction": options.val_fraction,
        "val_split": options.val_split,
        "shard_tokens": options.shard_tokens,
    }
    with _locked(out):
        if (out / "manifest.json").exists():
            return _reuse(out, source), True
        for path in out.iterdir():
            if _OURS.fullmatch(path.name):  # of a preparation that was interrupted
                path.unlink()
        encoder = Encoder(tokenizer_path, _sample(files))
        if encoder.note:
            print(f"data_prep: note: {encoder.note}; tokenizers does the work", file=sys.stderr)
        return _write(files, encoder, end_of_text, tokenizer_path, out, source, options), False


def _write(
    files: Sequence[InputFile],
    encoder: Encoder,
    end_of_text: int,
    tokenizer_path: Path,
    out: Path,
    source: dict,
    options: TextOptions,
) -> Manifest:
    if tokenizer_path.resolve() != (out / "tokenizer.json").resolve():
        with writing(out / "tokenizer.json") as temporary:
            shutil.copyfile(tokenizer_path, temporary)
    vocab_size = tokenizer_vocab_size(out / "tokenizer.json")
    writers = {name: SplitWriter(out, name, vocab_size, options.shard_tokens) for name in ("train", "val")}
    pieces = _split_by_hash(files, options) if options.val_split == "hash" else _split_tail(files, options)
    text_bytes = sum(file.bytes for file in files)
    documents = 0
    with tqdm(total=text_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), desc="tokenising") as bar:
        for batch in _batches(pieces):
            texts = [text for _, text in batch]
            ids, offsets = encoder.encode(texts)
            tokens = np.insert(ids, offsets[1:], end_of_text)  # one after each document
            lengths = np.diff(offsets) + 1
            for name, writer in writers.items():
                chosen = np.array([split == name for split, _ in batch])
                if chosen.any():
                    writer.add(tokens[np.repeat(chosen, lengths)], lengths[chosen])
            documents += len(texts)
            bar.update(sum(map(len, texts)))
    for writer in writers.values():
        writer.flush()
    manifest = Manifest(
        vocab_size=vocab_size,
        tokenizer_sha256=file_sha256(out / "tokenizer.json"),
        dtype=writers["train"].dtype.name,
        shards=tuple(shard for writer in writers.values() for shard in writer.shards),
        source={**source, "files": len(files), "text_bytes": text_bytes, "documents": documents},
    )
    write_manifest(out, manifest)
    return manifest


def _sample(files: Sequence[InputFile]) -> list[bytes]:
    """Texts spread evenly over the corpus, to compare tokenizer libraries on."""
    step = max(1, len(files) // _SAMPLE_FILES)
    return [read_text(file.path) for file in files[::step] if file.bytes]


def _split_by_hash(files: Sequence[InputFile], options: TextOptions) -> Iterator[tuple[str, bytes]]:
    limit = int(options.val_fraction * (1 << 64))
    for file in files:
        if text := read_text(file.path):
            number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
            yield ("val" if number < limit else "train"), text


def _split_tail(files: Sequence[InputFile], options: TextOptions) -> Iterator[tuple[str, bytes]]:
    """The cut falls at a byte of the whole corpus, moved on to the next character where it would split one."""
    train_left = int(sum(file.bytes for file in files) * (1 - options.val_fraction))
    for file in files:
        raw = read_text(file.path)
        cut = min(len(raw), max(0, train_left))
        while 0 < cut < len(raw) and raw[cut] & 0xC0 == 0x80:
            cut += 1
        train_left -= len(raw)
        for split, part in (("train", raw[:cut]), ("val", raw[cut:])):
            if part:
                yield split, part


def _batches(pieces: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reuse(out: Path, source: dict) -> Manifest:
    manifest = read_manifest(out)
    changed = [key for key, value in source.items() if manifest.source.get(key) != value]
    if changed:
        raise ConfigError(
            f"{out} already holds shards made otherwise (differing: {', '.join(changed)}); "
            "choose another --out, or remove that folder"
        )
    for shard in manifest.shards:
        path = out / shard.file
        if not path.exists() or path.stat().st_size != shard.file_bytes:
            raise DataError(
                f"{path} is listed in the manifest but missing or truncated; remove {out} and prepare again"
            )
    return manifest


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One preparation at a time in a folder. The lock goes with the process, however that ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is preparing {out}; data_prep runs as one process") from None
        yield
