"""Questions by their number, and what they are scored by, whatever shards their windows lie in."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny import asked, labelled, rewrite, seal, several, write_corpus

from hvdtrain.data.questions import Question, Questions, question_of, text_of
from hvdtrain.data.records import Records
from hvdtrain.data.shards import read_manifest, write_manifest
from hvdtrain.errors import DataError

ROWS = [
    ("a short one", ["short", "one"]),
    ("漢字とかな, and some more of it", ["漢字", "more"]),
    ("nothing here", []),
    ("", None),
    ("\U0001f600 e\u0301", ["e\u0301"]),
]


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 2, 5)])
def test_what_was_written_is_read(tmp_path: Path, cuts: tuple[int, ...], chunk: int):
    """Also over several shards, one of them empty, and where they are stored in chunks."""
    shards = [asked(ROWS[first:end], first) for first, end in pairwise(cuts)]
    write_corpus(tmp_path, {"val": shards}, kind="qa", version=2)
    for path in tmp_path.glob("*.h5"):
        rewrite(path, chunk=chunk)
    records = Records(tmp_path, seal(tmp_path), "val")
    questions = Questions(records)
    assert len(questions) == len(ROWS)
    for number, (context, answers) in enumerate(ROWS):
        told = None if answers is None else tuple(answers)
        assert questions[number] == Question(f"q{number}", context, told)
        chars = questions.chars(number)
        assert [context[first:end] for first, end in chars] == list(context)
        rows = np.arange(questions.first_rows[number], questions.first_rows[number + 1])
        covered = set()
        for row, (first, begin) in zip(rows, records.column("windows", rows), strict=True):
            paragraph = records.tokens("tokens", int(row))[first:-1]
            assert paragraph.tolist() == [3 + ord(letter) % 47 for letter in context[begin : begin + len(paragraph)]]
            covered |= {*range(begin, begin + len(paragraph))}
        assert covered == {*range(len(context))}
    assert questions.first_rows[-1] == len(records)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"id": "a"',
        "\xff",
        '{"id": 1, "context": "", "answers": []}',
        '{"id": "", "context": "", "answers": [1]}',
        '{"id": "", "context": "", "answers": 1}',
        '{"id": "", "context": "", "answers": [], "more": 1}',
    ],
)
def test_what_is_no_question(text: str):
    with pytest.raises(ValueError):  # JSON's own errors among them
        question_of(np.frombuffer(text.encode("latin-1"), np.uint8))


def test_a_question_goes_there_and_back():
    for answers in (None, (), ("a", "漢")):
        question = Question("id", '\u2028 \U0001f600 "', answers)
        assert question_of(np.frombuffer(text_of(question), np.uint8)) == question


def test_one_label_and_several_are_not_taken_for_one_another(tmp_path: Path):
    """A run is tied to what its data say of themselves."""
    datasets, names = {1: labelled([([1], 0)]), 2: several([([1], [0])])}, ("a", "b")
    manifests = [
        write_corpus(tmp_path / f"{n}", {"train": [one]}, kind="labels", label_names=names, version=n)
        for n, one in datasets.items()
    ]
    keys = [{key for key, value in one.identity().items() if value == list(names)} for one in manifests]
    assert keys == [{"label_names"}, {"several_of_label_names"}]


def test_versions(tmp_path: Path):
    """What is new says so, and each kind knows its own."""
    manifest = write_corpus(tmp_path, {"val": [asked(ROWS)]}, kind="qa", version=2)
    assert manifest.has_questions
    write_manifest(tmp_path, replace(manifest, version=1))  # as a reader of before would see it
    assert not read_manifest(tmp_path).has_questions
    Records(tmp_path, read_manifest(tmp_path), "val")
    for kind, version, reads in (("qa", 3, "1 and 2"), ("labels", 3, "1 and 2"), ("text", 2, "1"), ("pairs", 2, "1")):
        write_manifest(tmp_path, replace(manifest, kind=kind, version=version))
        with pytest.raises(DataError, match=rf"has format version {version}; this hvdtrain reads {reads}$"):
            read_manifest(tmp_path)
