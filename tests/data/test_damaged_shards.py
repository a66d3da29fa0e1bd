"""Token shards that are damaged, missing or could not be written: one error that names the file."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    asked,
    documents,
    labelled,
    pairs,
    random_tokens,
    rewrite,
    seal,
    several,
    write_corpus,
    write_data,
    write_tokenizer,
)

from hvdtrain.data.check import _damaged_blocks, check_shards
from hvdtrain.data.corpora import Corpora, check_corpora
from hvdtrain.data.shards import Manifest, check_files, file_problems, map_shard, read_manifest, write_shard
from hvdtrain.data.stream import TokenStream
from hvdtrain.errors import DataError, OutputError
from hvdtrain.files import BLOCK_BYTES, read_json, write, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path, train=[range(30), range(20)], val=[range(10)])
    return tmp_path


def read_all(folder: Path) -> None:
    """What a run does without looking at the digests."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    stream = TokenStream([(folder, manifest)], "train")
    stream.slice(0, len(stream))


def edit(folder: Path, **changes) -> None:
    """A manifest that says something else, and nothing of its own digest."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text()) | changes
    del fields["manifest_sha256"]
    path.write_text(json.dumps(fields))


def shard_entry(folder: Path, **changes) -> list[dict]:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return [{**shards[0], **changes}, *shards[1:]]


def other_corpus(folder: Path) -> Path:
    """Of the same tokenizer."""
    write_data(folder / "other", train=[range(40), range(20)], val=[range(10)])
    return folder / "other"


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no shards in {f}: manifest.json is missing"),
    "no folder": (lambda f: shutil.rmtree(f), "no shards in {f} (there is no such folder)"),
    "not JSON": (lambda f: (f / "manifest.json").write_text('{"version": 1,'), "{f}/manifest.json is damaged"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "{f}/manifest.json is damaged"),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "{f}/manifest.json is damaged"),
    "very deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "{f}/manifest.json is damaged"),
    "a folder": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
        "cannot read {f}/manifest.json: Is a directory",
    ),
    "a lost field": (lambda f: edit(f, shards=[{"file": "x"}]), "{f}/manifest.json is damaged"),
    "a strange field": (lambda f: edit(f, colour="red"), "{f}/manifest.json is damaged"),
    "newer format": (lambda f: edit(f, version=2), "{f}/manifest.json has format version 2; this hvdtrain reads 1"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "{f}/tokenizer.json is missing"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "{f}/tokenizer.json is not a tokenizer"),
    "other vocabulary": (
        lambda f: write_tokenizer(f / "tokenizer.json", 51),
        "the shards in {f} were made with 50 tokens, but {f}/tokenizer.json has 51",
    ),
    "swapped tokenizer": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("t3", "s3")),
        "{f}/tokenizer.json is not the tokenizer that made the shards",
    ),
    "a path": (lambda f: edit(f, shards=shard_entry(f, file="../secret.h5")), "outside its folder: '../secret.h5'"),
    "absolute": (lambda f: edit(f, shards=shard_entry(f, file="/etc/passwd")), "outside its folder: '/etc/passwd'"),
    "no shard": (lambda f: (f / "train-00001.h5").unlink(), "shard {f}/train-00001.h5 is listed in the manifest but"),
    "a dead link": (
        lambda f: ((f / "train-00001.h5").unlink(), (f / "train-00001.h5").symlink_to("gone.h5")),
        "shard {f}/train-00001.h5 is listed in the manifest but is missing",
    ),
    "one too many": (
        lambda f: shutil.copy(f / "train-00001.h5", f / "train-00002.h5"),
        "shard {f}/train-00002.h5 is not listed in the manifest: it belongs to another preparation; remove it",
    ),
    "listed twice": (
        lambda f: edit(f, shards=shard_entry(f, file="train-00001.h5")),
        "shard {f}/train-00001.h5 has",
    ),
    "another corpus": (
        lambda f: shutil.copy(other_corpus(f) / "manifest.json", f),
        "shard {f}/train-00000.h5 has",
    ),
    "another kind": (
        lambda f: edit(f, kind="labels"),
        "shard {f}/train-00000.h5 has no /labels; it holds doc_offsets, tokens",
    ),
    "truncated": (lambda f: os.truncate(f / "train-00001.h5", 100), "shard {f}/train-00001.h5 has 100 bytes"),
    "empty": (lambda f: os.truncate(f / "train-00001.h5", 0), "shard {f}/train-00001.h5 has 0 bytes"),
    "longer": (lambda f: os.truncate(f / "train-00000.h5", 1 << 20), "shard {f}/train-00000.h5 has"),
    "not HDF5": (
        lambda f: (f / "train-00000.h5").write_bytes(bytes((f / "train-00000.h5").stat().st_size)),
        "shard {f}/train-00000.h5 cannot be read as HDF5",
    ),
    "other length": (lambda f: edit(f, shards=shard_entry(f, tokens=31)), "but the manifest says uint16 (31,)"),
    "other dtype": (lambda f: edit(f, dtype="uint32"), "but the manifest says uint32 (30,)"),
    "no dtype": (lambda f: edit(f, dtype="banana"), "banana"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_a_data_error_that_names_the_file(folder: Path, damage: str):
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(DataError) as caught:
        read_all(folder)
    assert message.format(f=folder) in str(caught.value)


def test_all_that_is_wrong_with_the_files_is_listed(folder: Path):
    manifest = read_manifest(folder)
    os.truncate(folder / "train-00000.h5", 7)
    (folder / "val-00000.h5").rename(folder / "val-00001.h5")
    shutil.copy(folder / "train-00001.h5", folder / "copy.h5")  # not the name of a shard
    assert [problem.split(":")[0].removeprefix(f"shard {folder}/") for problem in file_problems(folder, manifest)] == [
        f"train-00000.h5 has 7 bytes, the manifest says {manifest.shards[0].file_bytes}",
        "val-00000.h5 is listed in the manifest but is missing",
        "val-00001.h5 is not listed in the manifest",
    ]
    with pytest.raises(DataError, match=f"cannot read {folder}/gone: No such file or directory"):
        check_files(folder / "gone", manifest)


# --- to the last bit ---------------------------------------------------------------------------------------------


def corpus(folder: Path, kind: str) -> Manifest:
    """Two shards of any kind, the second with three documents, of 5, 1 and 4 tokens if they are no windows."""
    texts = [random_tokens(length, seed=length).tolist() for length in (5, 1, 4)]
    version = 1
    match kind:
        case "pairs":
            shards = [pairs([([1], [2])]), pairs(list(zip(texts, texts[::-1], strict=True)))]
        case "labels":
            shards = [labelled([([1], 0)]), labelled(list(zip(texts, (0, 2, 1), strict=True)))]
        case "qa":
            more = [{"spans": np.zeros((n, 2), np.int64), "examples": np.arange(n)} for n in (1, 3)]
            more[1]["spans"][:] = [[1, 3], [0, 0], [3, 3]]
            shards = [{**documents([[1]]), **more[0]}, {**documents(texts), **more[1]}]
        case "several":
            rows = list(zip(texts, ([0, 2], [], [1]), strict=True))
            shards, kind, version = [several([([1], [0])]), several(rows)], "labels", 2
        case "asked":
            shards, kind, version = [asked([("x", ["x"])]), asked([("one two three", ["two"]), ("", [])])], "qa", 2
        case _:
            shards = [documents([[1]]), documents(texts)]
    names = ("a", "b", "c") if kind == "labels" else ()
    return write_corpus(folder, {"train": shards}, kind=kind, label_names=names, version=version)


DATASETS = {
    "text": ("tokens", "doc_offsets"),
    "pairs": ("source_tokens", "source_doc_offsets", "target_tokens", "target_doc_offsets"),
    "labels": ("tokens", "doc_offsets", "labels"),
    "qa": ("tokens", "doc_offsets", "spans", "examples"),
    "several": ("labels", "label_offsets"),
    "asked": ("windows", "question_offsets", "chars", "char_offsets", "texts", "text_offsets"),
}
ALL_DATASETS = [(kind, name) for kind, names in DATASETS.items() for name in names]


def problems_of(folder: Path, manifest: Manifest, threads: int = 1) -> list[str]:
    """What check_shards lists; check_corpora raises the first of them."""
    found = check_shards(folder, manifest, manifest.shards, threads)
    corpora = Corpora(((folder, manifest),), (1.0,))
    if found:
        with pytest.raises(DataError) as caught:
            check_corpora(corpora, 0, 1, threads)
        assert str(caught.value).startswith(found[0])
    else:
        check_corpora(corpora, 0, 1, threads)
    return found


@pytest.mark.parametrize("kind", DATASETS)
def test_whole_shards_have_no_problem(tmp_path: Path, kind: str):
    """However they are stored."""
    manifest = corpus(tmp_path, kind)
    assert problems_of(tmp_path, manifest) == []
    rewrite(tmp_path / "train-00001.h5", chunk=2, compression="gzip")
    assert problems_of(tmp_path, seal(tmp_path), threads=3) == []


@pytest.mark.parametrize(("kind", "name"), ALL_DATASETS)
def test_one_flipped_bit_of_any_dataset(tmp_path: Path, kind: str, name: str):
    manifest = corpus(tmp_path, kind)
    path = tmp_path / "train-00001.h5"
    with h5py.File(path) as file:
        at = file[name].id.get_offset() + file[name].id.get_storage_size() - 1
    flip(path, at, 0)
    last = path.stat().st_size - 1
    assert problems_of(tmp_path, manifest) == [
        f"shard {path} is damaged in block 0, bytes 0 to {last}: they are not those that were written (SHA-256)"
    ]


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_each_damaged_block_is_named(tmp_path: Path):
    manifest = write_data(tmp_path, train=[np.zeros(BLOCK_BYTES + 5000, np.uint16)])
    path = tmp_path / "train-00000.h5"
    for at in (BLOCK_BYTES - 1, 2 * BLOCK_BYTES):
        flip(path, at, 7)
    ranges = (
        f"block 0, bytes 0 to {BLOCK_BYTES - 1}",
        f"block 2, bytes {2 * BLOCK_BYTES} to {path.stat().st_size - 1}",
    )
    found = problems_of(tmp_path, manifest)
    assert [problem.split(":")[0] for problem in found] == [f"shard {path} is damaged in {block}" for block in ranges]


LENGTHS = {
    "empty": (0, "ends at byte 0, the manifest says {size}"),
    "truncated": (100, "is damaged in block 0, bytes 0 to 99"),
    "longer": (10_000, "is damaged in block 0, bytes 0 to 9999"),
    "longer by blocks": (BLOCK_BYTES + 1, "is damaged in block 0"),
}


@pytest.mark.parametrize("length", LENGTHS)
def test_another_length(folder: Path, length: str):
    """Also found by who has not looked at the sizes before."""
    manifest = read_manifest(folder)
    size, message = LENGTHS[length]
    os.truncate(folder / "train-00000.h5", size)
    found = problems_of(folder, manifest)
    assert found[0].startswith(f"shard {folder}/train-00000.h5 " + message.format(size=manifest.shards[0].file_bytes))


def test_a_whole_first_block_and_more(tmp_path: Path):
    manifest = write_data(tmp_path, train=[np.zeros(BLOCK_BYTES // 2, np.uint16)])
    path = tmp_path / "train-00000.h5"
    os.truncate(path, BLOCK_BYTES)
    size = manifest.shards[0].file_bytes
    assert problems_of(tmp_path, manifest) == [f"shard {path} ends at byte {BLOCK_BYTES}, the manifest says {size}"]


def test_missing_and_swapped_shards(tmp_path: Path):
    """Two of equal size that changed places are both found, and neither the one between them."""
    manifest = write_data(tmp_path, train=[range(30), range(10), range(10, 40), range(5)])
    (tmp_path / "train-00000.h5").rename(tmp_path / "x")
    (tmp_path / "train-00002.h5").rename(tmp_path / "train-00000.h5")
    (tmp_path / "x").rename(tmp_path / "train-00002.h5")
    (tmp_path / "train-00003.h5").unlink()
    found = problems_of(tmp_path, manifest, threads=4)
    assert [problem.split(" in block")[0] for problem in found[:2]] == [
        f"shard {tmp_path}/train-0000{number}.h5 is damaged" for number in (0, 2)
    ]
    assert found[2:] == [f"cannot read shard {tmp_path}/train-00003.h5: No such file or directory"]


def test_a_manifest_of_another_corpus_of_the_same_sizes(tmp_path: Path):
    """Nothing but the digests can tell."""
    write_data(tmp_path / "a", train=[random_tokens(50, seed=1)])
    other = write_data(tmp_path / "b", train=[random_tokens(50, seed=2)])
    shutil.copy(tmp_path / "b/manifest.json", tmp_path / "a")
    check_files(tmp_path / "a", other)
    assert len(problems_of(tmp_path / "a", other)) == 1


def setting(name: str, at, value) -> Callable[[dict], None]:
    def change(datasets: dict[str, np.ndarray]) -> None:
        datasets[name][at] = value

    return change


# Of the second shard, whose documents have 5, 1 and 4 tokens; the digests are made right.
WRONG = {
    ("text", "an id"): (setting("tokens", 7, 50), "/tokens[7] is 50, beyond the vocabulary of 50"),
    ("text", "two ids"): (setting("tokens", [3, 7], 65_535), "/tokens[3] is 65535, beyond the vocabulary of 50"),
    ("pairs", "an id of a source"): (
        setting("source_tokens", 0, 51),
        "/source_tokens[0] is 51, beyond the vocabulary of 50",
    ),
    ("pairs", "an id of a target"): (
        setting("target_tokens", 9, 60),
        "/target_tokens[9] is 60, beyond the vocabulary of 50",
    ),
    ("text", "offsets go back"): (
        setting("doc_offsets", 2, 4),
        "/doc_offsets goes backwards at document 1: 5, then 4",
    ),
    ("text", "offsets are wild"): (  # the difference of the two overflows, and looks positive
        setting("doc_offsets", [1, 2], [2**63 - 1, -5]),
        f"/doc_offsets goes backwards at document 1: {2**63 - 1}, then -5",
    ),
    ("labels", "offsets begin late"): (
        setting("doc_offsets", 0, 1),
        "/doc_offsets goes from 1 to 10, but the shard has 10 tokens",
    ),
    ("text", "offsets end early"): (
        setting("doc_offsets", 3, 9),
        "/doc_offsets goes from 0 to 9, but the shard has 10 tokens",
    ),
    ("pairs", "offsets of a target end late"): (
        setting("target_doc_offsets", 3, 11),
        "/target_doc_offsets goes from 0 to 11, but the shard has 10 tokens",
    ),
    ("labels", "a label above"): (setting("labels", 1, 3), "/labels[1] is 3, beyond the list of labels of 3"),
    ("labels", "a label below"): (setting("labels", 2, -1), "/labels[2] is -1, beyond the list of labels of 3"),
    ("qa", "an answer after the text"): (
        setting("spans", 2, [3, 4]),
        "/spans[2] goes from 3 to 4, but the text has 4 tokens",
    ),
    ("qa", "an answer that ends first"): (
        setting("spans", 0, [2, 1]),
        "/spans[0] goes from 2 to 1, but the text has 5 tokens",
    ),
    ("qa", "an answer before the text"): (
        setting("spans", 1, [-1, 0]),
        "/spans[1] goes from -1 to 0, but the text has 1 tokens",
    ),
    ("several", "a label above"): (setting("labels", 1, 3), "/labels[1] is 3, beyond the list of labels of 3"),
    ("several", "labels that go back"): (
        setting("label_offsets", 1, 4),
        "/label_offsets goes backwards at document 1: 4, then 2",
    ),
    ("several", "too few labels"): (
        setting("label_offsets", 3, 2),
        "/label_offsets goes from 0 to 2, but the shard has 3 labels",
    ),
    ("asked", "a window of nobody's"): (
        setting("question_offsets", 2, 2),
        "/question_offsets goes from 0 to 2, but the shard has 3 windows",
    ),
    ("asked", "another number of questions"): (
        lambda datasets: datasets.update(char_offsets=np.array([0, 13])),
        "/char_offsets are not of its 2 questions",
    ),
    ("asked", "no offsets"): (
        lambda datasets: datasets.update(text_offsets=np.array([], np.int64)),
        "/text_offsets is empty; offsets begin with 0",
    ),
    ("asked", "a window beyond its paragraph"): (
        setting("windows", 1, [3, 6]),
        "/windows[1] is [3, 6], beyond its paragraph of 13 tokens",
    ),
    ("asked", "a window without its question"): (
        setting("windows", 0, [0, 0]),
        "/windows[0] is [0, 0], beyond its paragraph of 13 tokens",
    ),
    ("asked", "a character beyond the paragraph"): (
        setting("chars", 4, [4, 14]),
        "/chars of question 0 are beyond its paragraph of 13 characters",
    ),
    ("asked", "a text that is none"): (
        setting("texts", 0, ord("[")),
        "/texts of question 0 are none: Expecting ',' delimiter: line 1 column 6 (char 5)",
    ),
}


@pytest.mark.parametrize("chunk", [0, 2], ids=["mapped", "chunked"])
@pytest.mark.parametrize(("kind", "what"), WRONG)
def test_what_is_wrong_under_right_digests(tmp_path: Path, kind: str, what: str, chunk: int):
    corpus(tmp_path, kind)
    change, message = WRONG[kind, what]
    path = tmp_path / "train-00001.h5"
    rewrite(path, change, chunk=chunk)
    assert problems_of(tmp_path, seal(tmp_path)) == [f"shard {path}: {message}"]


def test_an_id_beyond_a_large_vocabulary(tmp_path: Path):
    write_data(tmp_path, 70_000, train=[random_tokens(30, 70_000)])
    rewrite(tmp_path / "train-00000.h5", setting("tokens", 29, 2**32 - 1))
    (problem,) = problems_of(tmp_path, seal(tmp_path))
    assert "/tokens[29] is 4294967295, beyond the vocabulary of 70000" in problem


def test_a_chunk_that_cannot_be_unpacked_under_right_digests(tmp_path: Path):
    write_data(tmp_path, train=[random_tokens(5000)])
    path = tmp_path / "train-00000.h5"
    rewrite(path, chunk=5000, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["tokens"].id.get_chunk_info(0)
    for byte in range(20):
        flip(path, chunk.byte_offset + chunk.size // 2 + byte, 3)
    (problem,) = problems_of(tmp_path, seal(tmp_path))
    assert problem.startswith(f"cannot read /tokens of shard {path} through HDF5: ")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    corpus(folder, "labels")
    return folder


def names_of_datasets(content: bytes) -> list[int]:
    start = content.index(b"doc_offsets")
    return list(range(start - 40, start + 40))


@settings(max_examples=150)
@given(st.data())
def test_whatever_bit_is_flipped_it_is_no_more_than_a_data_error(sound: Path, data: st.DataObject):
    """Where nobody looks at the digests, h5py meets the damage: names that are no text, sizes that cannot be, ..."""
    path = sound / "train-00001.h5"
    whole = path.read_bytes()
    manifest = read_manifest(sound)
    places = st.one_of(st.integers(0, len(whole) - 1), st.sampled_from(names_of_datasets(whole)))
    flip(path, data.draw(places), data.draw(st.integers(0, 7)))
    try:
        assert len(check_shards(sound, manifest, manifest.shards)) == 1
        try:
            for values in map_shard(sound, manifest.shards[1], manifest).values():
                values[0 : len(values)]
        except DataError as error:
            assert str(path) in str(error)
    finally:
        path.write_bytes(whole)


def test_names_that_are_no_text(sound: Path):
    """h5py gives them as bytes, or fails to give them at all."""
    path = sound / "train-00001.h5"
    whole, manifest = path.read_bytes(), read_manifest(sound)
    messages = set()
    for at in names_of_datasets(whole):
        flip(path, at, 7)
        try:
            map_shard(sound, manifest.shards[1], manifest)
        except DataError as error:
            messages.add(str(error).removeprefix(f"shard {path} ")[:14])
        finally:
            path.write_bytes(whole)
    assert messages >= {"has no /tokens", "cannot be read"}


def test_a_file_system_that_gives_less_than_was_asked_for(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A pipe does; so may a network file system. Half a block looked like a damaged one."""
    info = read_manifest(folder).shards[0]
    content = (folder / info.file).read_bytes()
    pipe = tmp_path_factory.mktemp("slow") / info.file
    os.mkfifo(pipe)

    def write() -> None:
        with open(pipe, "wb", buffering=0) as file:
            for start in range(0, len(content), 500):
                file.write(content[start : start + 500])
                time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    assert list(_damaged_blocks(pipe, info)) == []
    writer.join()


def test_ranks_share_the_shards(tmp_path: Path):
    """Each is checked by one of them; more ranks than shards do no harm; who finds more than one says how many."""
    manifests = [
        (tmp_path / name, write_data(tmp_path / name, train=[random_tokens(50, seed=n) for n in range(5)]))
        for name in ("a", "b")
    ]
    corpora = Corpora(tuple(manifests), (1.0, 1.0))
    damaged = [("a", 0), ("a", 3), ("b", 1), ("b", 2), ("b", 4)]
    for name, number in damaged:
        flip(tmp_path / name / f"train-0000{number}.h5", 900, 0)
    for size in (1, 2, 3, 10, 14):
        found = {}
        for rank in range(size):
            try:
                check_corpora(corpora, rank, size, threads=2)
            except DataError as error:
                found[rank] = str(error)
        assert found.keys() == {at % size for at in (0, 3, 6, 7, 9)}
        if size == 1:
            assert found[0].startswith(f"shard {tmp_path}/a/train-00000.h5 is damaged in block 0")
            assert found[0].endswith(f" (and 1 more: python -m data_prep verify {tmp_path}/a)")
        if size >= 10:
            assert f"{tmp_path}/b/train-00001.h5" in found[6]
            assert not any("more:" in message for message in found.values())


@pytest.mark.parametrize(("text", "why"), [("[1]", "does not hold a JSON object"), ("{", "cannot read")])
def test_read_json_names_the_file(tmp_path: Path, text: str, why: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json") as caught:
        read_json(tmp_path / "x.json")
    assert why in str(caught.value)
    with pytest.raises(DataError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")


# --- whole or not at all -----------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "x.json"
    write_json(path, {"a": "é😀"})

    def half(temporary: Path, error: Exception) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(ZeroDivisionError):
        write(path, partial(half, error=ZeroDivisionError()))
    with pytest.raises(OutputError, match=r"cannot write .*x\.json: No space left"):
        write(path, partial(half, error=OSError(28, os.strerror(28))))
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert read_json(path) == {"a": "é😀"}


def test_a_folder_that_does_not_exist(tmp_path: Path):
    with pytest.raises(OutputError, match=r"cannot write .*nowhere/train-00000\.h5: "):
        write_shard(tmp_path / "nowhere", "train", 0, documents([range(3)]))
    with pytest.raises(OutputError, match=r"cannot write .*x\.json: No such file or directory"):
        write_json(tmp_path / "nowhere" / "x.json", {})


def test_a_disk_that_fills_up(tmp_path: Path):
    """A real one for HDF5: the kernel refuses to let the file grow. No part of it may stay, nor a traceback."""
    code = """
import sys, numpy as np
from pathlib import Path
from hvdtrain.data.shards import write_shard
from hvdtrain.errors import OutputError
try:
    tokens = np.zeros(1 << 18, np.uint16)
    write_shard(Path(sys.argv[1]), "train", 0, {"tokens": tokens, "doc_offsets": np.array([0, 1 << 18])})
except OutputError as error:
    print(error)
"""

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_disk, cwd=Path(__file__).parents[2])
    assert "train-00000.h5" in done.stdout, done.stderr
    assert (list(tmp_path.iterdir()), done.returncode) == ([], 0)
