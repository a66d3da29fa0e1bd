"""Questions on paragraphs: the answer is found again in the tokens, in whatever script and window it stands."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import files_of, run, shards_of, snapshot, token_rows, write
from tokenizers import Tokenizer

from data_prep.labels import frame_tokens
from data_prep.questions import QuestionsKind, SquadReader
from data_prep.tokenizer_file import load_tokenizer
from hvdtrain.data.check import check_shards
from hvdtrain.data.shards import Manifest, read_manifest
from hvdtrain.errors import EXIT_BAD_DATA, ConfigError, HvdtrainError

PARAGRAPH = "漢字とかな \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301, then Ada Lovelace wrote Note G in 1843. 終"


def question(text: str, context: str, answer: str | None, **more: Any) -> dict[str, Any]:
    answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
    return {"id": text, "question": text, "answers": answers, **more}


def squad(*paragraphs: tuple[str, list[dict[str, Any]]]) -> str:
    """One article a paragraph."""
    articles = [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]} for context, qas in paragraphs]
    return json.dumps({"version": "2.0", "data": articles})


class Questions:
    """A file of questions and the rows that come of it."""

    def __init__(self, folder: Path, tokenizer: Path, **limits: int):
        self.folder, self.path, self.limits = folder, tokenizer, limits
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.cls, self.sep = frame_tokens(load_tokenizer(tokenizer).special)

    def prepare(self, content: str, ranks: int = 1, out: str = "out", name: str = "a.json", **options) -> Manifest:
        if not (self.folder / "in" / name).exists():
            write(self.folder / "in", **{name: content})
        files = files_of(self.folder / "in" / name)
        return run(
            lambda: QuestionsKind(SquadReader(files), (self.cls, self.sep), **self.limits),
            self.path,
            self.folder / out,
            ranks,
            **options,
        )[0]

    def rows(self) -> list[tuple[list[int], list[int], int]]:
        """(tokens, span, example) of each window."""
        found = [
            pair
            for shard in shards_of(self.folder / "out", "train")
            for pair in zip(shard["spans"], shard["examples"], strict=True)
        ]
        return [(row, *pair) for row, pair in zip(token_rows(self.folder / "out", "train"), found, strict=True)]

    def parts(self, row: list[int]) -> tuple[list[int], list[int]]:
        """Question and paragraph of a row, without what stands around them."""
        assert (row[0], row[-1]) == (self.cls, self.sep)
        border = row.index(self.sep)
        return row[1:border], row[border + 1 : -1]

    def answer(self, row: list[int], span: list[int]) -> str:
        return self.tokenizer.decode(row[span[0] : span[1] + 1], skip_special_tokens=False)


ANSWERS = [
    "Ada Lovelace",
    "1843",
    "Note G",
    "漢字",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "e\u0301",
    "終",
    PARAGRAPH,
]


@pytest.mark.parametrize("kind", ["bpe", "byte", "unigram"])
def test_the_span_is_the_answer(tmp_path: Path, tokenizers_of: dict[str, Path], kind: str):
    """Characters, tokens and bytes are counted differently, and before these answers stand some of each."""
    questions = Questions(tmp_path, tokenizers_of[kind])
    manifest = questions.prepare(squad((PARAGRAPH, [question(f"q {n}?", PARAGRAPH, a) for n, a in enumerate(ANSWERS)])))
    assert (manifest.kind, manifest.source["documents"]) == ("qa", len(ANSWERS))
    for number, (row, span, example) in enumerate(questions.rows()):
        assert example == number
        assert questions.tokenizer.decode(questions.parts(row)[0]) == f"q {number}?"
        assert questions.tokenizer.decode(questions.parts(row)[1], skip_special_tokens=False) == PARAGRAPH
        found = questions.answer(row, span)
        assert found.strip() == ANSWERS[number] if kind == "byte" else ANSWERS[number] in found
        shorter = [questions.answer(row, [span[0] + 1, span[1]]), questions.answer(row, [span[0], span[1] - 1])]
        assert all(ANSWERS[number] not in text for text in shorter)  # and no token more than it takes
    assert check_shards(tmp_path / "out", manifest, manifest.shards) == []


@settings(max_examples=40)
@given(st.data(), st.integers(5, 40), st.integers(1, 50))
def test_windows_cover_the_paragraph(
    tmp_path_factory: pytest.TempPathFactory, byte: Path, data: st.DataObject, room: int, stride: int
):
    text = data.draw(st.text("ab漢é\U0001f600 ", min_size=1, max_size=60))
    start = data.draw(st.integers(0, len(text) - 1))
    answer = text[start : data.draw(st.integers(start + 1, len(text)))]
    folder = tmp_path_factory.mktemp("windows")
    questions = Questions(folder, byte, max_tokens=room + 5, stride=stride, question_tokens=2)
    asked = {"id": 1, "question": "what?", "answers": [{"text": answer, "answer_start": start}]}
    manifest = questions.prepare(squad((text, [asked])))
    whole = questions.tokenizer.encode(text, add_special_tokens=False).ids
    windows = [(questions.parts(row), span) for row, span, _ in questions.rows()]
    step = min(stride, room)
    assert all(part == questions.tokenizer.encode("wh").ids for (part, _), _ in windows)
    for number, ((_, window), span) in enumerate(windows):
        begin = number * step
        assert window == whole[begin : begin + room]
        first, last = len(text[:start].encode()), len((text[:start] + answer).encode()) - 1
        inside = begin <= first and last < begin + len(window)
        assert span == ([first - begin + 4, last - begin + 4] if inside else [0, 0])
    assert (len(windows) - 1) * step + len(windows[-1][0][1]) == len(whole)  # up to the end, and not beyond
    assert manifest.source.get("overlapping_windows", 0) == len(windows) - 1
    assert {example for _, _, example in questions.rows()} == {0}


def test_what_has_no_answer_points_at_the_first_token(tmp_path: Path, bpe: Path):
    questions = Questions(tmp_path, bpe)
    impossible = question("q2?", PARAGRAPH, "Ada Lovelace", is_impossible=True, plausible_answers=[])
    rows = [question("q1?", PARAGRAPH, None), impossible, question("q3?", PARAGRAPH, "1843", is_impossible=False)]
    questions.prepare(squad((PARAGRAPH, rows)))
    spans = [span for _, span, _ in questions.rows()]
    assert spans[:2] == [[0, 0], [0, 0]]
    assert spans[2] != [0, 0]


def test_the_first_of_several_answers_counts(tmp_path: Path, byte: Path):
    questions = Questions(tmp_path, byte)
    asked = question("q?", "one two", "two")
    asked["answers"].append({"text": "one", "answer_start": 0})
    questions.prepare(squad(("one two", [asked])))
    ((row, span, _),) = questions.rows()
    assert questions.answer(row, span) == "two"


def test_questions_are_numbered_over_articles(tmp_path: Path, byte: Path):
    questions = Questions(tmp_path, byte)
    questions.prepare(
        squad(("a b", [question("1", "a b", "a"), question("2", "a b", "b")]), ("c", [question("3", "c", "c")]))
    )
    assert [example for _, _, example in questions.rows()] == [0, 1, 2]


def test_compressed_and_on_several_ranks(tmp_path: Path, byte: Path):
    questions = Questions(tmp_path, byte)
    content = squad(*((f"{n} " + PARAGRAPH, [question(f"{n}?", f"{n} " + PARAGRAPH, "1843")]) for n in range(9)))
    for out, name, ranks in (("out", "a.json", 1), ("out2", "a.json", 2), ("packed", "a.json.zst", 1)):
        questions.prepare(content, ranks, out, name, val_fraction=0.5)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "out2")
    digests = {read_manifest(tmp_path / out).data_digest for out in ("out", "packed")}
    assert len(digests) == 1


# --- what is wrong -----------------------------------------------------------------------------------------------


def _wrong(context: str, **answer: Any) -> str:
    asked = {"id": "the id", "question": "q", "answers": [{"text": "two", "answer_start": 4, **answer}]}
    return squad((context, [asked]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_wrong("one two", answer_start=3), "the answer 'two' of question 'the id' does not stand at character 3"),
        (_wrong("one two", answer_start=99), "does not stand at character 99"),
        (_wrong("one two", answer_start=-3), "does not stand at character -3"),
        (_wrong("\U0001f600 one two", answer_start=7), "does not stand at character 7"),  # counted as UTF-16
        (_wrong("one two", answer_start="4"), r"article 0 is not as SQuAD has it \(TypeError"),
        (_wrong("one two \ud83d"), r"article 0 is not as SQuAD has it \(UnicodeEncodeError: .*surrogates"),
        (squad(("x", [{"id": 1, "question": "q"}])), r"article 0 is not as SQuAD has it \(KeyError: 'answers'"),
        (squad(("x", []), ("y", ["q"])), r"article 1 is not as SQuAD has it"),
        (json.dumps({"data": [{"title": "t"}]}), "is not SQuAD JSON .*paragraphs"),
        (json.dumps([1, 2]), "is not SQuAD JSON"),
        (json.dumps({"version": "1"}), "is not SQuAD JSON .*data"),
        ('{"data": [', "is not SQuAD JSON .*JSONDecodeError"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, byte: Path, content: str, message: str):
    with pytest.raises(HvdtrainError, match=rf"{tmp_path}/in/a\.json.*{message}") as caught:
        Questions(tmp_path, byte).prepare(content)
    assert caught.value.exit_code == EXIT_BAD_DATA


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, byte: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_bytes(b'{"data": "caf\xe9"}')
    files = files_of(tmp_path / "in" / "a.json")
    with pytest.raises(HvdtrainError, match=r"a\.json is not SQuAD JSON \(UnicodeDecodeError"):
        run(lambda: QuestionsKind(SquadReader(files), (1, 2)), byte, tmp_path / "out")


def test_no_room_for_the_paragraph_is_refused(byte: Path):
    with pytest.raises(ConfigError, match="--max-tokens 67 leaves no room for text; it must be above 67"):
        QuestionsKind(SquadReader([]), (0, 0), max_tokens=67)
    QuestionsKind(SquadReader([]), (0, 0), max_tokens=68)
