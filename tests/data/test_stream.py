"""A split as one line of tokens: across shards, from several folders, mapped or read through HDF5, in any process."""

import multiprocessing
import os
import pickle
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import multiply, random_tokens, rewrite, seal, write_data

from hvdtrain.data.shards import Manifest
from hvdtrain.data.stream import TokenStream, read_through_note
from hvdtrain.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
STORED = {"chunked": {"chunk": 7}, "gzip": {"chunk": 64, "compression": "gzip", "shuffle": True}}

WAIT_S = 20


def in_child(function: Callable[[], Any]) -> Any:
    """What ``function`` returns in a forked process."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        answer: Any = None
        try:
            answer = function()
        except BaseException as error:  # nothing of the test may go on in the child
            answer = error
        os.write(writer, pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        if not select.select([pipe], [], [], WAIT_S)[0]:
            os.kill(pid, signal.SIGKILL)
        content = pipe.read()
    os.waitpid(pid, 0)
    assert content, f"the child did not answer within {WAIT_S} s"
    answer = pickle.loads(content)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def chunked(folder: Path, manifest: Manifest, numbers: list[int], **how) -> Manifest:
    """Some shards stored by hand in another way, and the manifest made right for it."""
    for number in numbers:
        rewrite(folder / manifest.shards[number].file, **how)
    return seal(folder)


# --- one line ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any), st.data())
def test_windows_cross_shards(sizes: list[int], data: st.DataObject):
    """Even where a window spans several shards that are shorter than it, or empty, or cannot be mapped."""
    line = random_tokens(sum(sizes), 50, seed=len(sizes))
    pieces = np.split(line, np.cumsum(sizes)[:-1])
    length = data.draw(st.integers(1, len(line)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(line) - length), max_size=20)), dtype=np.int64)
    strange = data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = chunked(folder, write_data(folder, train=pieces), sorted(strange), chunk=3)
        stream = TokenStream([(folder, manifest)], "train")
        windows = stream.windows(starts, length)
        slices = [stream.slice(start, length).tolist() for start in starts]
    expected = [line[start : start + length].tolist() for start in starts]
    assert len(stream) == len(line)
    assert windows.dtype == np.uint16
    assert windows.tolist() == slices == expected


@pytest.mark.parametrize(
    "pieces", [[[1, 2], [], [3, 4]], [[], [1, 2, 3, 4]], [[1, 2, 3, 4], [], []], [[], [1], [], [2, 3, 4]]]
)
def test_empty_shards(tmp_path: Path, pieces: list[list[int]]):
    stream = TokenStream([(tmp_path, write_data(tmp_path, train=pieces))], "train")
    assert stream.windows(np.array([0, 1]), 3).tolist() == [[1, 2, 3], [2, 3, 4]]
    assert stream.slice(0, 4).tolist() == [1, 2, 3, 4]
    assert stream.slice(3, 1).tolist() == [4]
    assert stream.read_through == []


def test_large_vocabularies(tmp_path: Path):
    """uint32, over several shards."""
    tokens = random_tokens(90, 200_000)
    manifest = write_data(tmp_path, 200_000, train=[tokens[:40], tokens[40:]])
    windows = TokenStream([(tmp_path, manifest)], "train").windows(np.arange(60), 31)
    assert windows.dtype == np.uint32
    assert windows.tolist() == [tokens[start : start + 31].tolist() for start in range(60)]


def test_folders_follow_one_another(tmp_path: Path):
    """Each from its base on; val and train apart."""
    a = write_data(tmp_path / "a", train=[range(5), range(5, 8)], val=[[40, 41]])
    b = write_data(tmp_path / "b", train=[range(20, 26)], val=[[42]])
    corpora = [(tmp_path / "a", a), (tmp_path / "b", b)]
    stream = TokenStream(corpora, "train")
    assert stream.bases.tolist() == [0, 8, 14]
    assert stream.windows(np.array([0, 7, 8]), 6).tolist() == [
        [0, 1, 2, 3, 4, 5], [7, 20, 21, 22, 23, 24], [20, 21, 22, 23, 24, 25]
    ]  # fmt: skip
    assert TokenStream(corpora, "val").slice(0, 3).tolist() == [40, 41, 42]


def test_splits_that_are_not_there(tmp_path: Path):
    corpora = [(tmp_path, write_data(tmp_path, train=[range(30)], val=[range(10)]))]
    with pytest.raises(DataError, match="has no test shards; it has: train, val"):
        TokenStream(corpora, "test")
    with pytest.raises(ConfigError, match="no split 'dev'; there are: train, val, test"):
        TokenStream(corpora, "dev")


def test_a_shard_is_opened_when_its_tokens_are_wanted(tmp_path: Path):
    manifest = write_data(tmp_path, train=[range(10), range(10, 20), range(20, 30)])
    stream = TokenStream([(tmp_path, manifest)], "train")
    (tmp_path / "train-00001.h5").unlink()
    assert stream.windows(np.array([0, 4, 21]), 5).tolist() == [[*range(5)], [*range(4, 9)], [*range(21, 26)]]
    with pytest.raises(DataError, match=r"train-00001\.h5 is listed in the manifest but is missing"):
        stream.windows(np.array([7]), 5)


# --- what cannot be mapped ---------------------------------------------------------------------------------------


@pytest.fixture(params=STORED)
def strange(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[TokenStream, np.ndarray]:
    """Three shards, the second stored otherwise; and all tokens."""
    tokens = random_tokens(900)
    manifest = write_data(tmp_path, train=[tokens[:300], tokens[300:600], tokens[600:]])
    return TokenStream([(tmp_path, chunked(tmp_path, manifest, [1], **STORED[request.param]))], "train"), tokens


def check(stream: TokenStream, tokens: np.ndarray, seed: int = 0) -> int:
    """Windows everywhere are right; how many were compared."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - 50, 60)
    found = stream.windows(starts, 50)
    return sum(np.array_equal(row, tokens[start : start + 50]) for row, start in zip(found, starts, strict=True))


def test_chunked_and_compressed_shards_give_the_same_windows(strange: tuple[TokenStream, np.ndarray]):
    assert check(*strange) == 60


def test_they_are_named(tmp_path: Path):
    """All that were opened, and the first of each folder without being asked for its tokens."""
    streams = {}
    for name, numbers in {"a": [0, 2], "b": [1], "c": [0, 1, 2]}.items():
        folder = tmp_path / name
        manifest = write_data(folder, train=[range(10), range(10), range(10)])
        streams[name] = folder, chunked(folder, manifest, numbers, chunk=5)
    stream = TokenStream(list(streams.values()), "train")
    assert stream.read_through == [tmp_path / "a/train-00000.h5", tmp_path / "c/train-00000.h5"]
    stream.windows(np.arange(85), 6)
    everything = [("a", 0), ("a", 2), ("b", 1), ("c", 0), ("c", 1), ("c", 2)]
    assert stream.read_through == [tmp_path / name / f"train-0000{number}.h5" for name, number in everything]
    (note,) = read_through_note(stream.read_through)
    assert f"read through HDF5, which is slower: {tmp_path}/a/train-00000.h5 and 5 others;" in note
    assert read_through_note([]) == []


def test_eight_threads_at_once(strange: tuple[TokenStream, np.ndarray]):
    stream, tokens = strange
    found: list[int] = []
    threads = [threading.Thread(target=lambda n=n: found.append(check(stream, tokens, n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [60] * 8


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: this process has threads
def test_after_a_fork(strange: tuple[TokenStream, np.ndarray]):
    """Child, parent and grandchild, each of which goes on with what the one before had opened."""
    stream, tokens = strange
    assert in_child(lambda: check(stream, tokens, 1)) == 60  # opened there for the first time
    assert check(stream, tokens, 2) == 60
    assert in_child(lambda: (check(stream, tokens, 3), in_child(lambda: check(stream, tokens, 4)))) == (60, 60)
    assert check(stream, tokens, 5) == 60
    handle = stream._shard(1)._file.id.id
    assert in_child(lambda: (check(stream, tokens), stream._shard(1)._file.id.id != handle)) == (60, True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_children_and_parent_read_at_the_same_time(strange: tuple[TokenStream, np.ndarray]):
    """A handle that crossed a fork would share its place in the file with the others."""
    stream, tokens = strange
    check(stream, tokens)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=lambda n=n: sys.exit(_wrong(stream, tokens, n))) for n in range(3)]
    for child in children:
        child.start()
    assert _wrong(stream, tokens, 9) == 0
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]


def _wrong(stream: TokenStream, tokens: np.ndarray, seed: int) -> int:
    return int(any(check(stream, tokens, 100 * seed + turn) != 60 for turn in range(20)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_a_thread_reads(tmp_path: Path):
    """The loader's thread reads nearly all the time: a child born then waited for ever for a lock that it held."""
    tokens = random_tokens(100_000)
    manifest = chunked(tmp_path, write_data(tmp_path, train=[tokens]), [0], chunk=100_000, compression="gzip")
    stream, stop = TokenStream([(tmp_path, manifest)], "train"), threading.Event()

    def read() -> None:
        while not stop.is_set():
            check(stream, tokens)

    check(stream, tokens)  # numpy's late imports are behind us: those have a lock of their own
    thread = threading.Thread(target=read)
    thread.start()
    try:
        for turn in range(5):
            found = in_child(lambda start=1000 * turn: stream.slice(start, 7))
            assert np.array_equal(found, tokens[1000 * turn :][:7])
    finally:
        stop.set()
        thread.join()


def test_in_a_spawned_process(strange: tuple[TokenStream, np.ndarray]):
    """Sent over as folders and manifests, not as tokens: it maps the shards there anew."""
    stream, tokens = strange
    check(stream, tokens)
    assert len(pickle.dumps(stream)) < 3000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(stream.windows, (np.arange(0, 850, 10), 50))
    assert np.array_equal(found, stream.windows(np.arange(0, 850, 10), 50))


def test_a_damaged_chunk_is_a_data_error(tmp_path: Path):
    """Read without a check of the digests before (data.verify=sizes): gzip notices, and we say in which shard."""
    manifest = write_data(tmp_path, train=[random_tokens(5000)])
    manifest = chunked(tmp_path, manifest, [0], chunk=5000, compression="gzip")
    path = tmp_path / "train-00000.h5"
    with h5py.File(path) as file:
        chunk = file["tokens"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    middle = chunk.byte_offset + chunk.size // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read /tokens of shard {path} through HDF5: "):
        TokenStream([(tmp_path, manifest)], "train").slice(0, 5000)


# --- many shards -------------------------------------------------------------------------------------------------

FEW_FILES = """
import resource, sys
from pathlib import Path
import numpy as np
from hvdtrain.data.shards import read_manifest
from hvdtrain.data.stream import TokenStream
folder = Path(sys.argv[1])
stream = TokenStream([(folder, read_manifest(folder))], "train")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(stream.windows(np.arange(0, len(stream) - 20, 20), 20).sum(), len(stream.read_through))
"""


def few_files(folder: Path) -> subprocess.CompletedProcess[str]:
    """300 shards read by a process that may have 64 files open."""
    return subprocess.run([sys.executable, "-c", FEW_FILES, str(folder)], capture_output=True, text=True, cwd=ROOT)


def test_more_shards_than_a_process_may_open_files(tmp_path: Path):
    """A map keeps no file open; Python's own mmap would."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 64
    tokens = [*range(10), *range(20, 35)]  # some windows of 20 end within a shard, some beyond
    write_data(tmp_path, train=[tokens])
    multiply(tmp_path, 300)
    done = few_files(tmp_path)
    line = np.tile(tokens, 300)
    assert (done.stdout, done.stderr) == (f"{line[: len(line) - 20].sum()} 0\n", "")


def test_too_many_that_cannot_be_mapped(tmp_path: Path):
    """These do stay open: to open them anew for each row would be hard on a cluster's file server. A clear end."""
    chunked(tmp_path, write_data(tmp_path, train=[range(25)]), [0], chunk=5)
    multiply(tmp_path, 100, shutil.copyfile)
    done = few_files(tmp_path)
    assert "DataError: " in done.stderr
    assert "Too many open files" in done.stderr
