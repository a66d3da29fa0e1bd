"""Of equal items the first is kept, over files, units and ranks: the same ones for every number of ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import files_of, run, snapshot, text_kind, texts_of, write
from threads import on_ranks

from data_prep import duplicates
from data_prep.corpus import InputFile
from data_prep.pieces import Piece, Unit, share

# Lists of items a unit; there are few different ones, so many are equal.
UNITS = st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=8)


def units_of(counts: list[int]) -> list[Unit]:
    file = InputFile(Path("a"), "a", 1000, 0)
    return [Unit(n, (Piece(file, n, n + 1, None),)) for n in range(len(counts))]


def hashes_of(values: list[int]) -> np.ndarray:
    """Two words of 64 bits; the first alone does not tell all apart, nor does the second."""
    return np.array([[(value // 2) << 61, value % 2] for value in values], np.uint64).reshape(-1, 2)


@settings(max_examples=40)
@given(UNITS, st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 1 << 23]))
def test_all_but_the_first_are_found(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[int]], size: int, at_once: int
):
    units, folder = units_of([len(part) for part in values]), tmp_path_factory.mktemp("notes")
    shares = share([1] * len(units), size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_AT_ONCE", at_once)  # several partitions, taken in turns
        found = on_ranks(
            size,
            lambda ranks: duplicates.find(
                lambda unit: hashes_of(values[unit.number]), units, shares[ranks.rank], folder, ranks
            ),
        )
    seen: set[int] = set()
    for number, part in enumerate(values):
        copies = {place for place, value in enumerate(part) if value in seen or value in part[:place]}
        seen.update(part)
        assert [one.of_unit(number) for one in found] == [copies] * size


def test_digests_of_an_interrupted_run_are_not_made_again(tmp_path: Path):
    units, asked = units_of([1, 1]), []

    def hashes(unit: Unit) -> np.ndarray:
        asked.append(unit.number)
        return hashes_of([7])

    for _ in range(2):
        (found,) = on_ranks(1, lambda ranks: duplicates.find(hashes, units, [0, 1], tmp_path, ranks))
        assert (found.of_unit(0), found.of_unit(1)) == (frozenset(), {0})
    assert asked == [0, 1]
    touched = [units[0], Unit(1, (Piece(InputFile(Path("a"), "a", 1000, 5), 1, 2, None),))]
    on_ranks(1, lambda ranks: duplicates.find(hashes, touched, [0, 1], tmp_path, ranks))
    assert asked == [0, 1, 1]  # its file was written to


def test_over_files_units_and_ranks(tmp_path: Path, byte: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(duplicates, "_AT_ONCE", 16)
    lines = [f"line {n % 37} {n % 5 // 4}" for n in range(400)]
    files = files_of(
        write(tmp_path / "in", **{f"{n}.txt": "".join(f"{line}\n" for line in lines[n::4]) for n in range(4)})
    )
    in_order = [line for n in range(4) for line in lines[n::4]]
    expected = list(dict.fromkeys(in_order))
    for size in (1, 2, 4):
        out = tmp_path / f"out{size}"
        manifest, _ = run(lambda: text_kind(files, "line"), byte, out, size, shard_tokens=100, deduplicate=True)
        assert texts_of(out, "train") == expected
        assert manifest.source["duplicates"] == len(lines) - len(expected)
        assert manifest.source["documents"] == len(expected)
        assert len(manifest.source["units"]) > 20
    assert snapshot(tmp_path / "out1") == snapshot(tmp_path / "out2") == snapshot(tmp_path / "out4")
    manifest, _ = run(lambda: text_kind(files, "line"), byte, tmp_path / "all", 2, shard_tokens=100)
    assert Counter(texts_of(tmp_path / "all", "train")) == Counter(lines)
    assert "duplicates" not in manifest.source


def test_what_training_has_validation_has_not(tmp_path: Path, byte: Path):
    train = files_of(write(tmp_path / "a", **{"a.txt": "same\nonly a\n"}))
    val = files_of(write(tmp_path / "b", **{"b.txt": "same\nonly b\n"}), split="val")
    run(lambda: text_kind([*train, *val], "line"), byte, tmp_path / "out", deduplicate=True)
    assert [texts_of(tmp_path / "out", split) for split in ("train", "val")] == [["same", "only a"], ["only b"]]
