"""Documents by their number, whatever shards they lie in and however those are stored."""

import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents, labelled, pairs, random_tokens, rewrite, seal, several, write_corpus

from hvdtrain.data.records import Records
from hvdtrain.errors import DataError

Row = tuple[list[int], list[int]]
ROWS = st.lists(st.tuples(*[st.lists(st.integers(0, 49), max_size=9)] * 2), max_size=6)


def check(records: Records, rows: Sequence[Row]) -> None:
    """All that can be asked of pairs is what was written."""
    assert len(records) == len(rows)
    assert records.lengths.tolist() == [[len(source), len(target)] for source, target in rows]
    for number, (source, target) in enumerate(rows):
        assert records.tokens("source_tokens", number).tolist() == source
        assert records.tokens("target_tokens", number).tolist() == target
    order = np.random.default_rng(0).permutation(len(rows))
    for width in (None, 1, 4):
        padded, lengths = records.padded("target_tokens", order, width)
        assert (padded.dtype, lengths.dtype) == (np.int64, np.int64)
        cut = [rows[number][1][:width] for number in order]
        assert lengths.tolist() == [len(text) for text in cut]
        assert padded.shape[1] == max(1, *map(len, cut))
        assert padded.tolist() == [text + [0] * (padded.shape[1] - len(text)) for text in cut]


@settings(max_examples=40)
@given(st.lists(ROWS, min_size=1, max_size=4).filter(any), st.data())
def test_pairs_of_several_shards(shards: list[list[Row]], data: st.DataObject):
    """Empty shards and empty texts among them, and shards that cannot be mapped."""
    strange = data.draw(st.sets(st.integers(0, len(shards) - 1), max_size=2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, {"train": [pairs(rows) for rows in shards]}, kind="pairs")
        for number in strange:
            rewrite(folder / f"train-{number:05d}.h5", chunk=3, compression="gzip")
        records = Records(folder, seal(folder), "train")
        check(records, [row for rows in shards for row in rows])
        assert set(records.read_through) <= {folder / f"train-{number:05d}.h5" for number in strange}


def test_what_cannot_be_mapped_is_named(tmp_path: Path):
    splits = {"train": [pairs([([1], [2, 3])])] * 3, "val": [pairs([([4], [5])])]}
    manifest = write_corpus(tmp_path, splits, kind="pairs")
    assert Records(tmp_path, manifest, "train").read_through == []
    for name in ("train-00001.h5", "val-00000.h5"):
        rewrite(tmp_path / name, chunk=1)
    manifest = seal(tmp_path)
    assert Records(tmp_path, manifest, "train").read_through == [tmp_path / "train-00001.h5"]
    assert Records(tmp_path, manifest, "val").read_through == [tmp_path / "val-00000.h5"]


@pytest.mark.parametrize("chunk", [0, 2])
def test_labels_and_other_columns(tmp_path: Path, chunk: int):
    shards = [labelled([([1, 2], 2), ([3], 0)]), labelled([]), labelled([([4, 5, 6], 1)])]
    write_corpus(tmp_path, {"train": shards}, kind="labels", label_names=("a", "b", "c"))
    for number in (0, 2):
        rewrite(tmp_path / f"train-{number:05d}.h5", chunk=chunk)
    records = Records(tmp_path, seal(tmp_path), "train")
    assert records.column("labels", np.array([2, 0, 1, 2])).tolist() == [1, 2, 0, 1]
    assert records.lengths.tolist() == [[2], [1], [3]]
    assert records.padded("tokens", np.array([1, 2]))[0].tolist() == [[3, 0, 0], [4, 5, 6]]

    spans = {"spans": np.array([[0, 1], [0, 0]]), "examples": np.array([0, 1])}
    manifest = write_corpus(tmp_path / "qa", {"train": [{**documents([[1, 2], [3]]), **spans}] * 2}, kind="qa")
    records = Records(tmp_path / "qa", manifest, "train")
    assert records.column("spans", np.array([3, 2])).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("chunk", [0, 2])
def test_texts_of_several_labels(tmp_path: Path, chunk: int):
    """None, one and three of four, in shards with and without texts."""
    shards = [several([([1, 2], [2]), ([3], [])]), several([]), several([([4, 5, 6], [0, 1, 3])])]
    write_corpus(tmp_path, {"train": shards}, kind="labels", label_names=tuple("abcd"), version=2)
    for number in (0, 2):
        rewrite(tmp_path / f"train-{number:05d}.h5", chunk=chunk)
    records = Records(tmp_path, seal(tmp_path), "train")
    hot = records.many_hot(np.array([2, 0, 1, 2]), 4)
    assert hot.dtype == bool
    assert hot.astype(int).tolist() == [[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]]
    assert records.many_hot(np.array([], np.int64), 4).shape == (0, 4)


def test_large_vocabularies(tmp_path: Path):
    texts = random_tokens(90, 200_000).reshape(9, 10).tolist()
    rows = [(text[:7], text[7:]) for text in texts]
    shards = [pairs(rows[:5], 200_000), pairs(rows[5:], 200_000)]
    check(Records(tmp_path, write_corpus(tmp_path, {"val": shards}, 200_000, kind="pairs"), "val"), rows)


def test_in_another_process_they_are_mapped_anew(tmp_path: Path):
    """What is sent is where they are, not what they hold."""
    rows = [(random_tokens(500, seed=seed).tolist(), [seed]) for seed in range(40)]
    manifest = write_corpus(tmp_path, {"train": [pairs(rows)]}, kind="pairs")
    sent = pickle.dumps(Records(tmp_path, manifest, "train"))
    assert len(sent) < 3000
    check(pickle.loads(sent), rows)


def test_a_split_that_is_not_there(tmp_path: Path):
    manifest = write_corpus(tmp_path, {"train": [pairs([([1], [2])])]}, kind="pairs")
    with pytest.raises(DataError, match="has no val shards; it has: train"):
        Records(tmp_path, manifest, "val")
