"""Token shards: what is written is read, exactly. And the memory map under it: read-only, no file kept open."""

import fcntl
import gc
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents, labelled, pairs, random_tokens, rewrite, seal, write_corpus, write_data

from hvdtrain.data.shards import (
    ReadThrough,
    check_files,
    map_file,
    map_shard,
    offsets_of,
    read_manifest,
    token_dtype,
    write_shard,
)
from hvdtrain.data.stream import TokenStream
from hvdtrain.files import BLOCK_BYTES, file_blocks, file_sha256

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("vocab_size", [2, 50, 65_536, 65_537, 200_000])
def test_every_id_survives(tmp_path: Path, vocab_size: int):
    tokens = random_tokens(1000, vocab_size)
    tokens[:3] = 0, vocab_size - 1, vocab_size // 2
    write_data(tmp_path, vocab_size, train=[tokens], val=[tokens[:5]])
    manifest = read_manifest(tmp_path)
    check_files(tmp_path, manifest)
    stream = TokenStream([(tmp_path, manifest)], "train")
    assert stream.dtype == token_dtype(vocab_size) == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    assert np.array_equal(stream.windows(np.array([0]), 1000)[0], tokens)
    assert len(TokenStream([(tmp_path, manifest)], "val")) == 5
    assert (manifest.vocab_size, manifest.split("test"), len(stream)) == (vocab_size, (), 1000)


def test_the_file_is_plain_hdf5(tmp_path: Path):
    """Contiguous, native, unfiltered: any HDF5 tool reads it, and memory maps find it."""
    datasets = {"tokens": np.arange(10, dtype=np.uint16), "doc_offsets": np.array([0, 4, 10])}
    info = write_shard(tmp_path, "val", 7, datasets)
    with h5py.File(tmp_path / "val-00007.h5") as file:
        assert (file["tokens"].chunks, file["tokens"].compression, file["tokens"].dtype) == (None, None, np.uint16)
        assert (file["doc_offsets"][:].tolist(), file["doc_offsets"].dtype) == ([0, 4, 10], np.int64)
    assert (info.file, info.tokens, info.documents, info.file_bytes) == (
        "val-00007.h5", 10, 2, (tmp_path / "val-00007.h5").stat().st_size
    )  # fmt: skip
    mapped = map_shard(tmp_path, info, write_corpus(tmp_path, {}))
    assert {name: values.tolist() for name, values in mapped.items()} == {
        "tokens": list(range(10)), "doc_offsets": [0, 4, 10]
    }  # fmt: skip
    for values in mapped.values():
        assert not values.flags.writeable
        assert not values.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


KINDS = {
    "text": {"tokens": 5, "documents": 2, "target_tokens": 0},
    "pairs": {"tokens": 3, "documents": 2, "target_tokens": 4},
    "labels": {"tokens": 5, "documents": 2, "target_tokens": 0},
    "qa": {"tokens": 5, "documents": 2, "target_tokens": 0},
}


def datasets_of(kind: str, vocab_size: int = 50) -> dict[str, np.ndarray]:
    texts = [[1, 2, 3], [4, vocab_size - 1]]
    match kind:
        case "pairs":
            return pairs([([1, 2], [3]), ([4], [5, 6, vocab_size - 1])], vocab_size)
        case "labels":
            return labelled(list(zip(texts, [1, 0], strict=True)), vocab_size)
        case "qa":
            return {**documents(texts, vocab_size), "spans": np.array([[0, 2], [0, 0]]), "examples": np.array([7, 7])}
        case _:
            return documents(texts, vocab_size)


@pytest.mark.parametrize("vocab_size", [50, 70_000])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_shard(tmp_path: Path, kind: str, vocab_size: int):
    """What was written is mapped, and the manifest counts it."""
    datasets = datasets_of(kind, vocab_size)
    write_corpus(tmp_path, {"train": [datasets]}, vocab_size, kind=kind)
    manifest = read_manifest(tmp_path)
    (info,) = manifest.shards
    assert {name: getattr(info, name) for name in KINDS[kind]} == KINDS[kind]
    mapped = map_shard(tmp_path, info, manifest)
    assert mapped.keys() == datasets.keys()
    for name, values in datasets.items():
        assert mapped[name].dtype == values.dtype
        assert np.array_equal(mapped[name], values)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 49), max_size=30), max_size=40))
def test_a_document_is_where_its_offsets_say(texts: list[list[int]]):
    with tempfile.TemporaryDirectory() as name:
        manifest = write_corpus(Path(name), {"train": [documents(texts)]})
        shard = map_shard(Path(name), manifest.shards[0], manifest)
        found = [shard["tokens"][a:b].tolist() for a, b in pairwise(shard[offsets_of("tokens")])]
    assert found == texts


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
    for number, names in enumerate([("a", "b"), ("b", "a"), ("ab",)]):
        splits = {"train": [labelled([(tokens, 0)])]}
        manifest = write_corpus(tmp_path / f"names{number}", splits, kind="labels", label_names=names)
        digests.append(manifest.data_digest)
    assert len(set(digests)) == len(digests)
    assert write_data(tmp_path / "again", train=[tokens]).data_digest == digests[0]


def test_blocks_cover_the_whole_file(tmp_path: Path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * BLOCK_BYTES + b"y")
    whole, short = file_blocks(path)
    path.write_bytes(b"y")
    assert (file_blocks(path), file_sha256(path)) == ((short,), short)
    assert whole != short


def test_a_reader_asks_for_no_lock(tmp_path: Path):
    """Thousands of ranks read the same file, and some file systems cannot lock."""
    manifest = write_data(tmp_path, train=[range(40)])
    with open(tmp_path / "train-00000.h5", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert map_shard(tmp_path, manifest.shards[0], manifest)["tokens"][39] == 39
    rewrite(tmp_path / "train-00000.h5", chunk=9)
    manifest = seal(tmp_path)
    with open(tmp_path / "train-00000.h5", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        tokens = map_shard(tmp_path, manifest.shards[0], manifest)["tokens"]
        assert isinstance(tokens, ReadThrough)
        assert tokens[39:40] == [39]


# --- the map -----------------------------------------------------------------------------------------------------


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_map_keeps_no_file_open_and_goes_with_its_last_array(tmp_path: Path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 100)
    before = open_files()
    content = map_file(path)
    assert open_files() == before
    assert content.tobytes() == path.read_bytes()
    part = content[1000:2000].view(np.uint16)[::2]
    del content
    gc.collect()
    assert is_mapped(path)
    assert part[3] == 244 + 245 * 256
    del part
    assert not is_mapped(path)


def test_the_arrays_of_a_shard_share_a_map_and_outlive_one_another(tmp_path: Path):
    manifest = write_data(tmp_path, train=[range(40)])
    path = tmp_path / "train-00000.h5"
    shard = map_shard(tmp_path, manifest.shards[0], manifest)
    assert Path("/proc/self/maps").read_text().count(str(path)) == 1
    tokens = shard.pop("tokens")
    del shard
    assert is_mapped(path)
    path.unlink()  # the bytes stay as long as they are mapped
    assert tokens.tolist() == list(range(40))
    del tokens
    assert not is_mapped(path)


def test_an_empty_file_is_an_empty_array(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert map_file(tmp_path / "empty").size == 0


def test_a_process_may_end_while_a_map_is_read(tmp_path: Path):
    """The map was let go at exit, before the threads that read from it: a run that had ended well crashed."""
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    code = """
import atexit, sys
kept = []
atexit.register(lambda: print(int(kept[0][77]), flush=True))  # the first to be told is the last to run
from pathlib import Path
from hvdtrain.data.shards import map_file
kept.append(map_file(Path(sys.argv[1])))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bytes")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "77\n", "")
