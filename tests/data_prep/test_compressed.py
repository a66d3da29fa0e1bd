"""Compressed input: nobody knows beforehand how much text it holds, and memory does not depend on it."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from preparing import compressed, files_of, items_of, run, shards_of, snapshot, text_kind, texts_of, write

from data_prep import aligned, corpus, gathering, pieces, sample
from data_prep.pieces import Piece, Unit
from data_prep.questions import SquadReader
from data_prep.readers import TextReader
from data_prep.sample import training_texts
from data_prep.verify import verify
from hvdtrain.comm.ranks import OneRank
from hvdtrain.data.compressed import COMPRESSIONS
from hvdtrain.data.shards import SHARD_NAME, read_manifest
from hvdtrain.errors import DataError, OutputError

LINES = [f"line {n:04}" for n in range(1000)]  # 9 bytes each, and the end of text: 10 tokens of the byte tokenizer
TEXT = "".join(f"{line}\n" for line in LINES)


# --- opening -----------------------------------------------------------------------------------------------------


def zstd_frame(window_log: int, *blocks: bytes) -> bytes:
    """A frame as RFC 8878 has it, without the size of its content: that asks for a window of 2 ** window_log bytes."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + b"".join(blocks)


def zstd_block(content: bytes, times: int = 0, last: bool = False) -> bytes:
    """The bytes as they are, or one byte so many times."""
    return (((times or len(content)) << 3) | (bool(times) << 1) | last).to_bytes(3, "little") + content


@pytest.mark.parametrize("window_log", [27, 31])
def test_a_long_window_is_read(tmp_path: Path, window_log: int):
    """What `zstd --long` and `zstd --ultra --long=31` ask for; the library by itself stops at 27."""
    (tmp_path / "a.txt.zst").write_bytes(zstd_frame(window_log, zstd_block(b"text\n", last=True)))
    assert files_of(tmp_path)[0].read_all() == b"text\n"


def test_few_bytes_of_zstd_do_not_become_gigabytes_at_once(tmp_path: Path):
    """4 bytes for 128 KiB: 32 KiB of them, once fed at a time, were 1 GiB."""
    block = zstd_block(b"a", times=1 << 17)
    (tmp_path / "a.txt.zst").write_bytes(zstd_frame(17, block * 10_000))
    (file,) = files_of(tmp_path)
    tracemalloc.start()
    try:
        with file.open() as handle:
            assert file.read(handle, 1 << 20) == b"a" * (1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_what_is_read_at_once_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    monkeypatch.setattr(corpus, "_WHOLE_BYTES", 1 << 20)
    squad = json.dumps({"data": [{"paragraphs": [{"context": " " * (1 << 20), "qas": []}]}]})
    reader = SquadReader(files_of(write(tmp_path, **{f"a.json{suffix}": squad})))
    with pytest.raises(DataError, match=rf"a\.json{suffix} holds more than 1 MiB, and such a file is read at once"):
        items_of(reader)


def test_endings_in_capitals_are_endings(tmp_path: Path):
    for suffix in COMPRESSIONS:
        (tmp_path / f"A.JSONL{suffix.upper()}").write_bytes(compressed(b'{"text": "x"}\n', suffix))
    files = files_of(tmp_path)
    assert [(file.suffix, file.compression) for file in files] == [
        (".jsonl", suffix) for suffix in sorted(COMPRESSIONS)
    ]
    assert items_of(TextReader(files)) == [(b"x",)] * len(COMPRESSIONS)


# --- several shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_file_makes_as_many_shards_as_it_takes(tmp_path: Path, byte: Path, ranks: int):
    write(tmp_path / "in", **{"a.txt.gz": TEXT, "b.txt": TEXT[:1000], "c.txt.zst": TEXT[:5000]})
    out = tmp_path / "out"
    for folder, size in ((out, ranks), (tmp_path / "alone", 1)):
        files = files_of(tmp_path / "in")
        run(lambda files=files: text_kind(files, "line"), byte, folder, size, shard_tokens=1200, val_fraction=0.2)
    assert snapshot(out) == snapshot(tmp_path / "alone")
    infos = read_manifest(out).split("train")
    assert all(SHARD_NAME.fullmatch(info.file) for info in infos)
    numbers = [info.file.removeprefix("train-").removesuffix(".h5") for info in infos]
    assert numbers == sorted(numbers)
    assert [number for number in numbers if len(number) == 5] == ["00000", "00001", "00002"]
    assert [number[6:] for number in numbers if number[:5] == "00002"] == ["", "001", "002", "003"]
    sizes = [sum(len(shard["tokens"]) for shard in shards_of(out, split)) for split in ("train", "val")]
    assert sum(sizes) == 10 * (1000 + 100 + 500)
    rows = [texts_of(out, split) for split in ("train", "val")]
    assert sorted(rows[0] + rows[1]) == sorted(LINES + LINES[:100] + LINES[:500])
    assert rows[0] == [line for line in LINES + LINES[:100] + LINES[:500] if line in set(rows[0])]  # in their order
    assert verify(out, OneRank(), 1) == []


def test_only_what_cannot_be_cut_is_written_in_parts(tmp_path: Path, byte: Path):
    """A plain file's shards follow from its size alone and are named as ever."""
    for name in ("a.txt", "a.txt.gz"):
        files = files_of(write(tmp_path / name, **{name: TEXT}))
        run(lambda files=files: text_kind(files, "line"), byte, tmp_path / f"{name}.out", shard_tokens=1200)
    plain, packed = (
        [info.file for info in read_manifest(tmp_path / f"{name}.out").shards] for name in ("a.txt", "a.txt.gz")
    )
    assert plain == [f"train-{number:05}.h5" for number in range(9)]
    assert packed == ["train-00000.h5", *(f"train-00000_{part:03}.h5" for part in range(1, len(packed)))]
    assert 8 <= len(packed) <= 9
    assert texts_of(tmp_path / "a.txt.out", "train") == texts_of(tmp_path / "a.txt.gz.out", "train") == LINES


@pytest.mark.parametrize(("name", "shards"), [("a.txt", 1), ("a.txt.gz", 3)])
def test_more_tokens_than_expected(tmp_path: Path, name: str, shards: int):
    """How many tokens a plain piece gives is guessed; that it gives more makes no other shards of it."""
    (file,) = files_of(write(tmp_path / "in", **{name: "x"}))
    unit = Unit(0, (Piece(file, 0, 1, None),))
    gathered = gathering.Gathering(tmp_path, unit, np.dtype(np.uint16), shard_tokens=4)
    for _ in range(6):
        gathered.add("train", {"tokens": np.arange(2), "doc_offsets": np.array([2])})
        gathered.write_if_full()
    gathered.write()
    assert [shard.tokens for shard in gathered.shards] == [12 // shards] * shards


def test_shards_have_about_as_many_tokens_as_was_asked_for(tmp_path: Path, byte: Path):
    files = files_of(write(tmp_path / "in", **{"a.txt.xz": TEXT}))
    manifest, _ = run(lambda: text_kind(files, "line"), byte, tmp_path / "out", shard_tokens=1000)
    sizes = [info.tokens for info in manifest.shards]
    assert sum(sizes) == 10_000
    assert all(1000 <= size < 2100 for size in sizes[:-1])


def test_parts_of_a_file_that_has_become_shorter_go(tmp_path: Path, byte: Path):
    """An interrupted preparation had written more of them than there are now."""
    write(tmp_path / "in", **{"a.txt.gz": TEXT, "b.txt": "b\n"})

    def prepare(out: Path):
        return run(lambda: text_kind(files_of(tmp_path / "in"), "line"), byte, out, shard_tokens=1200)

    prepare(tmp_path / "whole")
    stale = tmp_path / "whole" / "train-00000_002.h5"
    out = tmp_path / "out"
    prepare(out)
    (out / "manifest.json").unlink()  # as if it had been killed before
    (out / ".parts").mkdir()
    (out / "train-00000_077.h5").write_bytes(stale.read_bytes())
    prepare(out)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_file_that_was_half_done_is_gone_on_with(tmp_path: Path, byte: Path, monkeypatch: pytest.MonkeyPatch):
    """What a shard of it holds is not in doubt: all of a file that has no record is made again."""
    write(tmp_path / "in", **{"a.txt": "a\n", "b.txt.gz": TEXT})
    write_shard = gathering.write_shard

    def until_full(folder: Path, split: str, number: int, datasets: dict, part: int):
        if part == 3:
            raise OutputError("cannot write: No space left on device")
        return write_shard(folder, split, number, datasets, part)

    def prepare(out: Path, ranks: int = 1):
        return run(lambda: text_kind(files_of(tmp_path / "in"), "line"), byte, out, ranks, shard_tokens=1200)

    with monkeypatch.context() as patch, pytest.raises(OutputError):
        patch.setattr(gathering, "write_shard", until_full)
        prepare(tmp_path / "out")
    assert (tmp_path / "out" / "train-00001_002.h5").exists()
    prepare(tmp_path / "out", ranks=2)
    prepare(tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


# --- a sample to train a tokenizer on ----------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_TRAINING_PIECE", 1000)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_small_corpus_is_taken_whole(tmp_path: Path, suffix: str):
    reader = TextReader(files_of(write(tmp_path, **{"a.txt": TEXT, f"b.txt{suffix}": TEXT})))
    assert "".join(training_texts(reader, 1 << 20, seed=1)) == TEXT * 2


@pytest.mark.parametrize("seed", [1, 2])
def test_of_a_large_one_places_are_drawn(tmp_path: Path, small_steps: None, seed: int):
    draw = random.Random(1)
    texts = {name: "".join(f"{name} {draw.getrandbits(64):016x}\n" for _ in range(1600)) for name in "abc"}
    write(tmp_path, **{"a.txt": texts["a"], "b.txt.gz": texts["b"], "c.txt.zst": texts["c"]})
    reader = TextReader(files_of(tmp_path))
    drawn = list(training_texts(reader, 12_000, seed))
    assert drawn == list(training_texts(reader, 12_000, seed)) != list(training_texts(reader, 12_000, seed + 2))
    assert 10_000 <= sum(map(len, drawn)) <= 14_000
    whole = [next(name for name in "abc" if text in texts[name]) for text in drawn]
    assert set(whole) == set("abc")


@pytest.mark.parametrize("sample_bytes", [100, 4000, 50_000])
def test_a_text_that_compresses_beyond_all_expectation_is_bounded_too(
    tmp_path: Path, small_steps: None, sample_bytes: int
):
    """The sample was all 10 MB of it, for its few kilobytes were below any limit."""
    (tmp_path / "a.txt.xz").write_bytes(compressed(b"the same line\n" * 700_000, ".xz"))
    reader = TextReader(files_of(tmp_path))
    assert reader.files[0].bytes < 5000
    size = sum(map(len, training_texts(reader, sample_bytes, seed=1)))
    assert sample_bytes <= size <= sample_bytes * 1.3 + 1000


def test_a_line_that_never_ends_is_named_before_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "LONGEST_DOCUMENT", 10 << 20)
    (tmp_path / "a.src.zst").write_bytes(zstd_frame(17, zstd_block(b"a", times=1 << 17) * 200))
    write(tmp_path, **{"a.tgt": "a line\n"})
    with pytest.raises(DataError, match=r"a\.src\.zst: the line at byte 0 is longer than 10 MiB"):
        items_of(aligned.AlignedReader(files_of(tmp_path / "a.src.zst"), files_of(tmp_path / "a.tgt")))
