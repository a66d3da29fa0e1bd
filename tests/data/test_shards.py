"""Token shards: what is written is read, exactly."""

import fcntl
import tempfile
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_tokens, write_data

from hvdtrain.data.shards import (
    BLOCK_BYTES,
    SplitWriter,
    TokenStream,
    file_blocks,
    file_sha256,
    map_tokens,
    read_manifest,
    token_dtype,
    write_shard,
)


@pytest.mark.parametrize("vocab_size", [2, 50, 65_536, 65_537, 200_000])
def test_every_id_survives(tmp_path: Path, vocab_size: int):
    tokens = random_tokens(1000, vocab_size)
    tokens[:3] = 0, vocab_size - 1, vocab_size // 2
    write_data(tmp_path, vocab_size, train=[tokens], val=[tokens[:5]])
    manifest = read_manifest(tmp_path)
    stream = TokenStream(tmp_path, manifest, "train")
    assert stream.dtype == token_dtype(vocab_size) == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    assert np.array_equal(stream.windows(np.array([0]), 1000)[0], tokens)
    assert len(TokenStream(tmp_path, manifest, "val")) == 5
    assert (manifest.vocab_size, manifest.split("test"), len(stream)) == (vocab_size, (), 1000)


def test_the_file_is_plain_hdf5(tmp_path: Path):
    """Contiguous, native, unfiltered: any HDF5 tool reads it, and memory maps find it."""
    info = write_shard(tmp_path, "val", 7, np.arange(10, dtype=np.uint16), np.array([0, 4, 10]))
    with h5py.File(tmp_path / "val-00007.h5") as file:
        assert (file["tokens"].chunks, file["tokens"].compression, file["tokens"].dtype) == (None, None, np.uint16)
        assert (file["doc_offsets"][:].tolist(), file["doc_offsets"].dtype) == ([0, 4, 10], np.int64)
    assert (info.file, info.tokens, info.documents, info.file_bytes) == (
        "val-00007.h5", 10, 2, (tmp_path / "val-00007.h5").stat().st_size
    )  # fmt: skip
    mapped = map_tokens(tmp_path / "val-00007.h5", 10, "uint16")
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    tokens = random_tokens(5000)
    for name in ("a", "b"):
        write_data(tmp_path / name, train=[tokens[:3000], tokens[3000:]], val=[tokens[:50]])
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_the_digest_sees_every_token_and_the_order(tmp_path: Path):
    tokens = random_tokens(100)
    other = tokens.copy()
    other[99] ^= 1
    pieces = [[tokens], [other], [tokens[:50], tokens[50:]], [tokens[50:], tokens[:50]]]
    digests = [write_data(tmp_path / str(n), train=piece).data_digest for n, piece in enumerate(pieces)]
    digests.append(write_data(tmp_path / "val", val=[tokens]).data_digest)
    digests.append(write_data(tmp_path / "vocab", 51, train=[tokens]).data_digest)
    assert len(set(digests)) == len(digests)
    assert write_data(tmp_path / "again", train=[tokens]).data_digest == digests[0]


def test_blocks_cover_the_whole_file(tmp_path: Path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * BLOCK_BYTES + b"y")
    whole, short = file_blocks(path)
    path.write_bytes(b"y")
    assert (file_blocks(path), file_sha256(path)) == ((short,), short)
    assert whole != short


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_a_document_is_never_cut(lengths: list[int], shard_tokens: int):
    with tempfile.TemporaryDirectory() as name:
        writer = SplitWriter(Path(name), "train", 50, shard_tokens)
        documents = [random_tokens(length, seed=number) for number, length in enumerate(lengths)]
        for document in documents:
            writer.add(document, np.array([len(document)]))
        writer.flush()
        writer.flush()  # nothing left: writes nothing
        found = []
        for number, info in enumerate(writer.shards):
            with h5py.File(Path(name) / info.file) as file:
                ends = file["doc_offsets"][:]
                found += [file["tokens"][a:b] for a, b in pairwise(ends)]
            assert info.file == f"train-{number:05d}.h5"
            assert info.tokens <= shard_tokens or info.documents == 1
    assert [list(document) for document in found] == [list(document) for document in documents]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.data())
def test_windows_cross_shards(sizes: list[int], data: st.DataObject):
    """Even where a window spans several shards that are shorter than it."""
    line = random_tokens(sum(sizes), 50, seed=len(sizes))
    pieces = np.split(line, np.cumsum(sizes)[:-1])
    length = data.draw(st.integers(1, len(line)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(line) - length), max_size=20)), dtype=np.int64)
    with tempfile.TemporaryDirectory() as name:
        stream = TokenStream(Path(name), write_data(Path(name), train=pieces), "train")
        windows = stream.windows(starts, length)
    assert windows.dtype == np.uint16
    assert windows.tolist() == [line[start : start + length].tolist() for start in starts]


def test_an_empty_shard_between_others(tmp_path: Path):
    stream = TokenStream(tmp_path, write_data(tmp_path, train=[[1, 2], [], [3, 4]]), "train")
    assert stream.windows(np.array([0, 1]), 3).tolist() == [[1, 2, 3], [2, 3, 4]]


def test_a_reader_asks_for_no_lock(tmp_path: Path):
    """Thousands of ranks read the same file, and some file systems cannot lock."""
    info = write_shard(tmp_path, "train", 0, np.arange(40, dtype=np.uint16), np.array([0, 40]))
    with open(tmp_path / info.file, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert map_tokens(tmp_path / info.file, 40, "uint16")[39] == 39
