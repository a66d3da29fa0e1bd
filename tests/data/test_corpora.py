"""The folders a run learns from: one or several, known by what they hold, copied to a node's own disk and checked."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from not_here import small_disk
from tiny import documents, labelled, random_tokens, write_corpus, write_data

from hvdtrain.data import corpora as corpora_module
from hvdtrain.data.corpora import Corpora, DataOptions, open_corpora, stage
from hvdtrain.data.shards import read_manifest
from hvdtrain.data.stream import TokenStream
from hvdtrain.errors import ConfigError, DataError, OutputError
from hvdtrain.files import BLOCK_BYTES


def opened(*folders: Path, weights: tuple[float, ...] = ()) -> Corpora:
    if len(folders) == 1 and not weights:
        return open_corpora(DataOptions(dir=str(folders[0])))
    weights = weights or (1.0,) * len(folders)
    return open_corpora(DataOptions(mixture={str(f): w for f, w in zip(folders, weights, strict=True)}))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three corpora of one tokenizer."""
    for number, name in enumerate("abc"):
        tokens = random_tokens(900, seed=number)
        write_data(tmp_path / name, train=[tokens[:400], tokens[400:]], val=[tokens[:50]])
    return [tmp_path / name for name in "abc"]


# --- what a run is tied to ---------------------------------------------------------------------------------------


def test_one_folder_is_what_its_manifest_says(folders: list[Path]):
    corpora, manifest = opened(folders[0]), read_manifest(folders[0])
    assert (corpora.entries, corpora.weights) == (((folders[0], manifest),), (1.0,))
    assert corpora.identity() == manifest.identity()
    assert corpora.names == str(folders[0])
    assert opened(folders[0], weights=(0.3,)).data_digest == manifest.data_digest  # a mixture of one


def test_a_mixture_is_known_by_contents_weights_and_order(folders: list[Path]):
    a, b, c = folders
    mixtures = [
        opened(a, b),
        opened(b, a),
        opened(a, c),
        opened(a, b, c),
        opened(a, b, weights=(1.0, 2.0)),
        opened(a, b, weights=(2.0, 1.0)),
        opened(a, b, weights=(1.0, 1.0 + 2**-52)),
    ]
    assert len({corpora.data_digest for corpora in mixtures}) == len(mixtures)
    assert all(corpora.identity()["data_digest"] == corpora.data_digest for corpora in mixtures)
    assert mixtures[0].identity().keys() == {"vocab_size", "tokenizer_sha256", "data_digest"}
    assert mixtures[3].names == f"{a}, {b}, {c}"
    assert mixtures[4].weights == (1.0, 2.0)


def test_the_place_is_no_part_of_it(folders: list[Path]):
    """A resumed run may find its data elsewhere: on a node's own disk, say."""
    before = opened(*folders[:2]).identity()
    moved = folders[0].rename(folders[0].with_name("moved"))
    assert opened(moved, folders[1]).identity() == before


def test_what_cannot_be_mixed(tmp_path: Path):
    write_data(tmp_path / "a", train=[range(30)])
    write_data(tmp_path / "larger", 51, train=[range(30)])
    (tmp_path / "other").mkdir()
    labels = {"train": [labelled([([1, 2], 0)])]}
    write_corpus(tmp_path / "labels", labels, kind="labels", label_names=("x", "y"))
    write_corpus(tmp_path / "swapped", labels, kind="labels", label_names=("y", "x"))
    for folder, end in (("ends with 0", 0), ("ends with 3", 3)):  # one tokenizer, and another --eos
        write_corpus(tmp_path / folder, labels, kind="labels", label_names=("x", "y"), special_tokens={"eos": end})
    for first, second, key in [
        ("a", "larger", "tokenizer_sha256"),
        ("a", "labels", "kind"),
        ("labels", "swapped", "label_names"),
        ("ends with 0", "ends with 3", "special_tokens"),
    ]:
        with pytest.raises(DataError) as caught:
            opened(tmp_path / first, tmp_path / second)
        assert f"{tmp_path}/{first} and {tmp_path}/{second} cannot be mixed: they differ in {key}" in str(caught.value)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_weights_are_above_0(folders: list[Path], weight: float):
    with pytest.raises(ConfigError, match="weights must be above 0"):
        opened(*folders[:2], weights=(1.0, weight))


def test_every_folder_is_looked_at(folders: list[Path]):
    os.truncate(folders[1] / "val-00000.h5", 10)
    with pytest.raises(DataError, match=f"shard {folders[1]}/val-00000.h5 has 10 bytes"):
        opened(*folders)
    with pytest.raises(DataError, match="there is no such folder"):
        opened(folders[0], folders[0] / "gone")


# --- staging -----------------------------------------------------------------------------------------------------


def meet(function: Callable[[], None]) -> None:
    """Of one rank alone."""
    function()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def place_of(corpora: Corpora, target: Path) -> Path:
    return target / corpora.manifest.data_digest


def test_what_is_staged_is_read_there(folders: list[Path], tmp_path: Path):
    corpora, target = opened(folders[0]), tmp_path / "node" / "disk"
    staged = stage(corpora, target, True, meet)
    place = place_of(corpora, target)
    assert staged.entries == ((place, corpora.manifest),)
    assert staged.identity() == corpora.identity()
    files = tree(place)
    source = json.loads(files.pop("source.json"))
    assert source["copy_of"] == str(folders[0])
    original = tree(folders[0])
    del original["manifest.json"]
    assert files == original
    shutil.rmtree(folders[0])
    assert TokenStream(staged.entries, "train").slice(0, 900).tolist() == random_tokens(900, seed=0).tolist()


def test_a_mixture_is_staged_folder_by_folder(folders: list[Path], tmp_path: Path):
    """Each under its own digest, so that another mixture may use it too."""
    target = tmp_path / "disk"
    both = stage(opened(*folders[:2], weights=(1.0, 3.0)), target, True, meet)
    assert [folder.name for folder, _ in both.entries] == [read_manifest(f).data_digest for f in folders[:2]]
    assert both.weights == (1.0, 3.0)
    before = {path: path.stat().st_ino for path in target.rglob("*.h5")}
    others = stage(opened(*folders[1:]), target, True, meet)
    assert {path: path.stat().st_ino for path in before} == before
    assert others.entries[0] == both.entries[1]
    assert len(list(target.iterdir())) == 3


def test_a_second_stage_uses_what_is_there(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also on a full disk; but what is not of the right size is copied again."""
    corpora, target = opened(folders[0]), tmp_path / "disk"
    stage(corpora, target, True, meet)
    before = {path.name: path.stat().st_ino for path in place_of(corpora, target).glob("*.h5")}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free_bytes(0))
    stage(corpora, target, True, meet)
    assert {path.name: path.stat().st_ino for path in place_of(corpora, target).glob("*.h5")} == before
    monkeypatch.undo()
    os.truncate(place_of(corpora, target) / "train-00001.h5", 100)
    stage(corpora, target, True, meet)
    after = {path.name: path.stat().st_ino for path in place_of(corpora, target).glob("*.h5")}
    assert {name for name in before if before[name] != after[name]} == {"train-00001.h5"}
    assert tree(place_of(corpora, target))["train-00001.h5"] == (folders[0] / "train-00001.h5").read_bytes()


def test_damage_is_found_while_copying(tmp_path: Path):
    """Named by shard, block and byte; no part of the damaged shard stays, the whole ones before it do."""
    write_data(tmp_path / "data", train=[range(40), np.zeros(BLOCK_BYTES // 2 + 10, np.uint16), range(30)])
    corpora, target = opened(tmp_path / "data"), tmp_path / "disk"
    path = tmp_path / "data/train-00001.h5"
    with open(path, "r+b") as file:
        file.seek(BLOCK_BYTES + 7)
        file.write(b"\x01")
    with pytest.raises(DataError) as caught:
        stage(corpora, target, True, meet)
    last = path.stat().st_size - 1
    assert f"shard {path} is damaged in block 1, bytes {BLOCK_BYTES} to {last}" in str(caught.value)
    assert tree(place_of(corpora, target)).keys() == {"tokenizer.json", "train-00000.h5"}


def test_a_shard_that_is_gone_when_it_is_copied(folders: list[Path], tmp_path: Path):
    """It is the data that are at fault, not the place they are copied to."""
    corpora = opened(folders[0])
    (folders[0] / "train-00001.h5").unlink()
    with pytest.raises(DataError, match=f"cannot read shard {folders[0]}/train-00001.h5: No such file or directory"):
        stage(corpora, tmp_path / "disk", True, meet)
    assert "train-00001.h5" not in tree(place_of(corpora, tmp_path / "disk"))


def test_a_strange_shard_at_the_place(folders: list[Path], tmp_path: Path):
    corpora, target = opened(folders[0]), tmp_path / "disk"
    place_of(corpora, target).mkdir(parents=True)
    (place_of(corpora, target) / "train-00009.h5").touch()
    with pytest.raises(DataError, match=r"train-00009\.h5 is not listed in the manifest"):
        stage(corpora, target, True, meet)


def free_bytes(count: int) -> object:
    return shutil._ntuple_diskusage(1 << 40, (1 << 40) - count, count)


def test_no_room(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Known before the first byte is copied; what is there already needs none."""
    corpora, target = opened(*folders[:2]), tmp_path / "disk"
    wanted = sum(info.file_bytes for _, manifest in corpora.entries for info in manifest.shards)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free_bytes(wanted - 1))
    with pytest.raises(
        OutputError, match=f"cannot stage to {target} on .*: the shards need 0.00 GB more and 0.00 GB are"
    ):
        stage(corpora, target, True, meet)
    assert tree(target) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free_bytes(wanted))
    stage(corpora, target, True, meet)


def test_a_place_that_cannot_be(folders: list[Path], tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"cannot stage to {tmp_path}/file/disk on .*: Not a directory"):
        stage(opened(folders[0]), tmp_path / "file" / "disk", True, meet)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_small_disk(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real one: refused beforehand; and where another filled it meanwhile, nothing half-copied stays."""
    write_data(tmp_path / "data", train=[np.zeros(200_000, np.uint16), np.zeros(450_000, np.uint16)])
    corpora = opened(tmp_path / "data")
    with pytest.raises(OutputError, match=f"cannot stage to {disk} on .*: the shards need 0.00 GB more"):
        stage(corpora, disk, True, meet)
    assert tree(disk) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free_bytes(1 << 30))
    with pytest.raises(OutputError, match=r"cannot write .*train-00001\.h5: No space left on device"):
        stage(corpora, disk, True, meet)
    assert tree(place_of(corpora, disk)).keys() == {"tokenizer.json", "train-00000.h5"}


# --- several ranks and processes ---------------------------------------------------------------------------------


def test_only_the_first_rank_of_a_node_copies(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four ranks on two nodes with a disk each; none looks for the files before all that copy are through."""
    corpora, together = opened(folders[0]), threading.Barrier(4)
    copied, found = [], {}
    copy_folder = corpora_module._copy_folder

    def slowly(*args) -> None:
        copied.append(threading.current_thread().name)
        time.sleep(0.05)
        copy_folder(*args)

    def meet(function: Callable[[], None]) -> None:
        function()
        together.wait(10)

    def rank(number: int) -> None:
        node = tmp_path / f"node{number // 2}"
        found[number] = stage(corpora, node, number % 2 == 0, meet).entries[0][0]

    monkeypatch.setattr(corpora_module, "_copy_folder", slowly)
    ranks = [threading.Thread(target=rank, args=(number,), name=str(number)) for number in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert sorted(copied) == ["0", "2"]
    assert found == {number: place_of(corpora, tmp_path / f"node{number // 2}") for number in range(4)}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: this process has threads
def test_two_jobs_stage_the_same_at_once(tmp_path: Path):
    """Both succeed, and what is left is whole."""
    texts = [[random_tokens(1000, seed=100 * shard + n).tolist() for n in range(30)] for shard in range(6)]
    write_corpus(tmp_path / "data", {"train": [documents(shard) for shard in texts]})
    corpora, target = opened(tmp_path / "data"), tmp_path / "disk"
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def job() -> None:
        together.wait()
        staged = stage(corpora, target, True, meet)
        line = [token for shard in texts for text in shard for token in text]
        os._exit(TokenStream(staged.entries, "train").slice(0, len(line)).tolist() != line)

    jobs = [context.Process(target=job) for _ in range(2)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
    assert [process.exitcode for process in jobs] == [0, 0]
    place = place_of(corpora, target)
    assert sorted(path.name for path in place.iterdir()) == sorted(
        [*(info.file for info in corpora.manifest.shards), "source.json", "tokenizer.json"]
    )
