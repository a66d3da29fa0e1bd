"""The sample looks everywhere in the input, is small, and is the same on every rank and every time."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from preparing import files_of, items_of, write

from data_prep import sample
from data_prep.aligned import AlignedReader
from data_prep.questions import SquadReader
from data_prep.readers import TextReader
from data_prep.sample import sample_texts, training_texts
from data_prep.tables import TableReader
from hvdtrain.errors import DataError


def numbered(folder: Path, files: int, lines: int, suffix: str = ".txt") -> Path:
    texts = {f"{n:03}{suffix}": "".join(f"file {n} line {i}\n" for i in range(lines)) for n in range(files)}
    return write(folder, **texts)


def test_small_files_are_taken_whole(tmp_path: Path):
    reader = TextReader(files_of(numbered(tmp_path, 5, 3)))
    assert sample_texts(reader) == [text for (text,) in items_of(reader)]


def test_a_large_file_is_looked_at_everywhere(tmp_path: Path):
    path = numbered(tmp_path, 1, 200_000) / "000.txt"
    texts = sample_texts(TextReader(files_of(path)))
    size = path.stat().st_size
    assert len(texts) == sample._PLACES
    assert sum(map(len, texts)) < size / 4
    places = [int(text.split(b"line ")[2].split(b"\n")[0]) for text in texts]
    assert all(b > a + 3000 for a, b in pairwise(places))
    assert (places[0] < 10, places[-1] > 190_000) == (True, True)


@pytest.mark.parametrize("documents", ["file", "line", "blank-line"])
def test_many_files_give_a_few_texts(tmp_path: Path, documents: str):
    files = files_of(numbered(tmp_path, 200, 3))
    texts = sample_texts(TextReader(files, documents))
    names = {text.split()[1] for text in texts}
    assert len(names) == sample._PLACES
    assert b"0" in names
    assert texts == sample_texts(TextReader(files, documents))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_compressed_files_are_looked_at_too(tmp_path: Path, suffix: str):
    files = files_of(numbered(tmp_path, 9, 20_000, f".txt{suffix}"))
    texts = sample_texts(TextReader(files, "line"))
    assert 3 <= len({text.split()[1] for text in texts}) <= 9
    assert len(texts) < 20_000


def test_a_long_text_is_cut_between_characters(tmp_path: Path):
    files = files_of(write(tmp_path, **{"a.txt": "a" + "漢" * 100_000}))
    texts = sample_texts(TextReader(files))
    assert all(len(text) <= 1 << 14 and text.decode() for text in texts)


def test_what_others_read_is_sampled_too(tmp_path: Path):
    write(tmp_path, **{"a.src": "one\n" * 9, "a.tgt": "two\n" * 9, "a.tsv": "label\ttext\n1\tthree\n"})
    write(tmp_path, **{"a.json": json.dumps({"data": [{"paragraphs": [{"context": "four", "qas": []}]}]})})
    pairs = AlignedReader(files_of(tmp_path / "a.src"), files_of(tmp_path / "a.tgt"))
    assert set(sample_texts(pairs)) == {b"one", b"two"}
    assert sample_texts(TableReader(files_of(tmp_path / "a.tsv"), ["label", "text"])) == [b"1", b"three"]
    assert sample_texts(SquadReader(files_of(tmp_path / "a.json"))) == []  # it has no question


def test_what_is_wrong_is_found_here_already(tmp_path: Path):
    reader = TextReader(files_of(write(tmp_path, **{"a.txt": b"caf\xe9"})))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        sample_texts(reader)


# --- for training a tokenizer ------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_on_all_of_a_small_corpus(tmp_path: Path):
    reader = TextReader(files_of(numbered(tmp_path, 5, 30)))
    assert list(training_texts(reader, 1 << 20, seed=1)) == [text.decode() for (text,) in items_of(reader)]


def test_of_a_large_one_on_places_that_the_seed_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sample, "_TRAINING_PIECE", 1000)
    reader = TextReader(files_of(numbered(tmp_path, 3, 3000)))
    whole = "".join(text.decode() for (text,) in items_of(reader))
    drawn = {seed: list(training_texts(reader, 10_000, seed)) for seed in (1, 2)}
    assert drawn[1] == list(training_texts(reader, 10_000, 1)) != drawn[2]
    for texts in drawn.values():
        assert 9_000 <= sum(map(len, texts)) <= 12_000
        assert all(text in whole for text in texts)
        assert len({text.split("file ")[1][0] for text in texts}) == 3  # from everywhere
