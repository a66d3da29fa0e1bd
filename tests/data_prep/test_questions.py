"""Questions on paragraphs: the answer is found again in the tokens, in whatever script and window it stands."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import files_of, run, shards_of, snapshot, token_rows, write
from tokenizers import Tokenizer

from data_prep.__main__ import main
from data_prep.questions import QuestionsKind, SquadReader, find_answer
from data_prep.tokenizer import build_tokenizer
from data_prep.tokenizer_file import load_tokenizer
from hvdtrain.data.check import check_shards
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.data.questions import Questions as Asked
from hvdtrain.data.records import Records
from hvdtrain.data.shards import Manifest, frame_tokens, read_manifest, write_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, ConfigError, HvdtrainError

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


def test_what_a_score_needs_is_kept(tmp_path: Path, bpe: Path):
    """Ids, all answers, and for each token its characters: whatever the script, and over shards of any size."""
    questions = Questions(tmp_path, bpe, max_tokens=24, stride=5, question_tokens=4)
    several = question("q1", PARAGRAPH, "1843")
    several["answers"] += [{"text": "in 1843", "answer_start": 3}, {"text": "not there", "answer_start": 0}]
    rows = [several, {**question("q2", PARAGRAPH, None), "id": 7}, question("漢?", PARAGRAPH, "漢字")]
    manifest = questions.prepare(squad((PARAGRAPH, rows), ("x y", [question("q4", "x y", "y")])), shard_tokens=1)
    records = Records(tmp_path / "out", manifest, "train")
    kept = Asked(records)
    assert [kept[n].answers for n in range(4)] == [("1843", "in 1843", "not there"), (), ("漢字",), ("y",)]
    assert [kept[n].id for n in range(4)] == ["q1", "7", "漢?", "q4"]
    assert {kept[n].context for n in range(3)} == {PARAGRAPH}
    for number in range(4):
        text, chars = kept[number].context, kept.chars(number)
        rows = np.arange(kept.first_rows[number], kept.first_rows[number + 1])
        for row, (first, begin), span in zip(
            rows, records.column("windows", rows), records.column("spans", rows), strict=True
        ):
            paragraph = records.tokens("tokens", int(row))[first:-1]
            at, end = chars[begin][0], chars[begin + len(paragraph) - 1][1]
            assert questions.tokenizer.decode(paragraph.tolist()).strip("\ufffd") in text[at:end]
            if span.any():
                a, b = chars[begin + span - first]
                assert text[a[0] : b[1]].strip() in kept[number].answers
    assert check_shards(tmp_path / "out", manifest, manifest.shards) == []


def test_shards_without_what_a_score_needs_are_not_taken_for_others(tmp_path: Path, byte: Path):
    questions = Questions(tmp_path, byte)
    content = squad(("one two", [question("q", "one two", "two")]))
    manifest = questions.prepare(content)
    source = {key: value for key, value in manifest.source.items() if key != "version"}
    write_manifest(tmp_path / "out", replace(manifest, version=1, source=source))
    with pytest.raises(HvdtrainError, match=r"already holds shards made otherwise \(differing: version\)"):
        questions.prepare(content)


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
        (_wrong("one 2", answer_start=3), "question 'the id' has the answer 'two' at character 3, which is not in"),
        (_wrong("two and two", answer_start=99), "has the answer 'two' at character 99, which is not in"),  # which?
        (_wrong("two and two", answer_start=-1), "has the answer 'two' at character -1, which is not in"),
        (_wrong("one two", text=""), "has the answer '' at character 4, which is not in"),
        (
            _wrong("one two", answer_start="4"),
            "question 'the id' has an \"answer_start\" of '4', which is no whole",
        ),
        (_wrong("one two", answer_start=True), 'has an "answer_start" of True'),
        (_wrong("one two", text=None), "question 'the id' has no text as its \"text\""),
        (_wrong("one two \ud83d"), 'is with half a surrogate pair in its "context"'),
        (_wrong("one two \0"), r'is binary \(a zero byte\) in its "context"'),
        (squad(("x", [{"id": 1, "question": "q"}])), 'question 1 has no "answers"; a test set .* --test-input'),
        (squad(("x", [{"id": 1, "question": "q", "answers": {}}])), 'has "answers" that are no list but dict'),
        (squad(("x", [{"id": 1, "question": 7, "answers": []}])), 'question 1 has no text as its "question"'),
        (squad(("x", [{"id": 1, "question": "q", "is_impossible": "no"}])), "has is_impossible 'no', which is neither"),
        (squad(("x", [{"question": "q", "answers": []}])), 'question without id has no text as its "id"'),
        (squad(("x", [{"id": True, "question": "q", "answers": []}])), 'question True has no text as its "id"'),
        (squad(("x", [{"id": "\ud83d", "question": "q", "answers": []}])), 'half a surrogate pair in its "id"'),
        (squad(("x", []), ("y", ["q"])), "article 1, paragraph 0: question without id has no text"),
        (json.dumps({"data": [{"paragraphs": [{"context": "x"}]}]}), "paragraph 0: question without id has no text"),
        (json.dumps({"data": [{"title": "t"}]}), "is not SQuAD JSON .*paragraphs"),
        (json.dumps([1, 2]), "is not SQuAD JSON"),
        (json.dumps({"version": "1"}), "is not SQuAD JSON .*data"),
        ('{"data": [', "is not SQuAD JSON .*JSONDecodeError"),
        ('{"data": ' + "[" * 99_999, "is not SQuAD JSON .*RecursionError"),
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


def test_a_window_needs_a_length_and_an_answer_its_place():
    with pytest.raises(ConfigError, match="--max-tokens 0: a window of SQuAD's paragraphs has a length"):
        QuestionsKind(SquadReader([]), (0, 0), max_tokens=0)
    with pytest.raises(ConfigError, match="--normalise nfc would move the answers"):
        SquadReader([], Cleaning(nfc=True))


# --- answers that stand elsewhere --------------------------------------------------------------------------------

EMOJI = "\U0001f600 one two three two"  # the emoji is two units of UTF-16 and four of UTF-8


@pytest.mark.parametrize(
    ("context", "answer", "start", "found"),
    [
        ("one two three two", "two", 4, (4, "two")),
        ("one two three two", "two", 14, (14, "two")),
        ("one two three two", "two", 3, (4, "two")),
        ("one two three two", "two", 9, (4, "two")),  # as near as the other: the first
        ("one two three two", "two", 10, (14, "two")),
        ("one two three two", "two", 99, None),  # no place of the paragraph, and two that may be meant
        ("one two three two", "two", -1, None),
        ("one two three", "two", 99, (4, "two")),
        ("one two three", "two", -1, (4, "two")),
        ("one two three", "Two", 4, None),
        (EMOJI, "two", 7, (6, "two")),
        (EMOJI, "two", 17, (16, "two")),
        ("\U0001f600\U0001f600\U0001f600a\U0001f600a\U0001f600", "a", 6, (3, "a")),  # in UTF-16; nearer is another
        ("漢字漢字漢字", "漢字", 12, (4, "漢字")),  # bytes: the nearest to 12 would be right by chance only
        ("漢字漢字漢字漢字", "漢字", 6, (6, "漢字")),  # where it stands as it says it is taken as it says
        ("漢字、漢字、漢字、漢字", "漢字", 9, (9, "漢字")),
        ("漢字、漢字、漢字、漢字。漢字", "漢字", 18, (6, "漢字")),
        ("one two three", " two ", 3, (3, " two ")),
        ("one two, three", " two ", 3, (4, "two")),
        ("caf\u00e9 one", "cafe\u0301", 0, (0, "caf\u00e9")),
        ("cafe\u0301 one", "caf\u00e9", 0, (0, "cafe\u0301")),
        ("one two", "", 4, None),
        ("one two", " ", 3, (3, " ")),
        ("one", "two", 0, None),
    ],
)
def test_where_an_answer_stands(context: str, answer: str, start: int, found: tuple[int, str] | None):
    assert find_answer(context, answer, start) == found


@given(st.data())
def test_what_is_found_stands_there(data: st.DataObject):
    context = data.draw(st.text("ab é漢\U0001f600\u0301", max_size=12))
    answer, start = data.draw(st.text("ab é\u0301", max_size=3)), data.draw(st.integers(-3, 15))
    found = find_answer(context, answer, start)
    if found is not None:
        assert found[1] and context.startswith(*found[::-1])
    if answer and start >= 0 and context.startswith(answer, start):
        assert found == (start, answer)


def test_moved_answers_are_counted_and_their_spans_are_right(tmp_path: Path, byte: Path):
    questions = Questions(tmp_path, byte)
    wrong = [(EMOJI, "two", 17), (EMOJI, "one", 3), ("x two", " two. ", 0), ("x two", "two", 2)]
    asked = [
        {"id": n, "question": "q", "answers": [{"text": a, "answer_start": at}]} for n, (_, a, at) in enumerate(wrong)
    ]
    with pytest.raises(HvdtrainError, match=r"question 2 has the answer ' two\. ' at character 0, which is not in its"):
        questions.prepare(squad(*((context, [one]) for (context, _, _), one in zip(wrong, asked, strict=True))))
    del wrong[2], asked[2]
    manifest = questions.prepare(
        squad(*((context, [one]) for (context, _, _), one in zip(wrong, asked, strict=True))), out="out", name="b.json"
    )
    assert [questions.answer(row, span) for row, span, _ in questions.rows()] == ["two", "one", "two"]
    assert (manifest.source["answers_moved"], manifest.source["questions_answered"]) == (2, 3)


def test_the_next_of_several_answers_is_taken_where_the_first_is_not_there(tmp_path: Path, byte: Path):
    questions = Questions(tmp_path, byte)
    asked = question("q?", "one two", "two")
    asked["answers"].insert(0, {"text": "2", "answer_start": 4})
    questions.prepare(squad(("one two", [asked])))
    ((row, span, _),) = questions.rows()
    assert questions.answer(row, span) == "two"


# --- every question is accounted for -----------------------------------------------------------------------------


def accounted(source: dict[str, Any]) -> int:
    kinds = ("questions_answered", "questions_without_answer", "questions_unlabelled", "bad_question", "bad_answer")
    return sum(source.get(kind, 0) for kind in kinds)


def test_bad_questions_are_left_out_counted_and_named(tmp_path: Path, byte: Path, capsys: pytest.CaptureFixture):
    good = question("good", "one two", "two")
    bad = [
        {"id": "away", "question": "q", "answers": [{"text": "four", "answer_start": 4}]},
        {"id": "mute", "question": "q"},
        {"id": "none", "question": None, "answers": []},
        "no question",
        {"id": "half", "question": "q \ud83d", "answers": []},
    ]
    articles = json.loads(squad(("one two", [good, *bad, {**good, "id": "again", "question": "b"}]), ("x", [])))
    articles["data"].append({"paragraphs": [{"context": None, "qas": [good, good]}, {"context": "x"}, 3]})
    write(tmp_path, **{"a.json": json.dumps(articles)})
    words = ["labels", "--input", tmp_path / "a.json", "--tokenizer", byte, "--val-fraction", 0]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == EXIT_BAD_DATA
    assert "question 'away' has the answer 'four' at character 4" in capsys.readouterr().err
    assert main([*map(str, words), "--out", str(tmp_path / "out"), "--skip-bad"]) == EXIT_OK
    source = read_manifest(tmp_path / "out").source
    # Two good ones, five bad, two of a paragraph without a text, and one each of two that hold no list of questions.
    assert source["questions"] == 11 == accounted(source) + source["bad_surrogate"]
    assert (source["questions_answered"], source["bad_answer"], source["bad_question"]) == (2, 1, 7)
    (shard,) = shards_of(tmp_path / "out", "train")
    assert shard["examples"] == [0, 6]  # their numbers in the file
    printed = capsys.readouterr()
    assert "1 with half a surrogate pair, 7 not a question as SQuAD has it, 1 with an answer that is not" in printed.out
    assert printed.err.count("left out: ") == 5
    assert f"left out: {tmp_path}/a.json, article 0, paragraph 0: question 'away' has the answer 'four'" in printed.err
    assert (
        main([*map(str, words), "--out", str(tmp_path / "more"), "--skip-bad", "--invalid-utf8", "replace"]) == EXIT_OK
    )
    source = read_manifest(tmp_path / "more").source
    assert (accounted(source), source["replaced_characters"]) == (11, 1)


def test_a_test_set_needs_no_answers(tmp_path: Path, byte: Path, capsys: pytest.CaptureFixture):
    asked = [{"id": f"{number}", "question": f"q{number}"} for number in range(3)]
    impossible = {**question("no?", PARAGRAPH, None), "is_impossible": True}
    write(tmp_path, **{"train.json": squad(("one two", [question("q", "one two", "two")]))})
    write(tmp_path, **{"test.json": squad((PARAGRAPH, [*asked, impossible]))})
    words = ["labels", "--input", tmp_path / "train.json", "--tokenizer", byte, "--val-fraction", 0]
    assert (
        main([*map(str, words), "--val-input", str(tmp_path / "test.json"), "--out", str(tmp_path / "o")])
        == EXIT_BAD_DATA
    )
    assert (
        "question '0' has no \"answers\"; a test set without them is given as --test-input" in capsys.readouterr().err
    )
    assert (
        main([*map(str, words), "--test-input", str(tmp_path / "test.json"), "--out", str(tmp_path / "out")]) == EXIT_OK
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest.source["questions"] == 5 == accounted(manifest.source)
    assert manifest.source["questions_unlabelled"] == 3
    (shard,) = shards_of(tmp_path / "out", "test")
    assert (shard["spans"], shard["examples"]) == ([[0, 0]] * 4, [0, 1, 2, 3])
    assert check_shards(tmp_path / "out", manifest, manifest.shards) == []
    said = "1 questions that have no answer, 3 questions of a test set, whose answers are not told"
    assert said in capsys.readouterr().out


def test_what_fits_no_window_and_what_is_cut_is_counted(tmp_path: Path, byte: Path, capsys: pytest.CaptureFixture):
    context = "".join(chr(97 + number % 26) for number in range(60))
    asked = [
        question("four", context, context[2:6]),  # in the first window
        question("five letters", context, context[5:25]),  # longer than any window
        question("six", context, context[18:23]),  # over the border of two windows
        question("sevens", context, None),
    ]
    write(tmp_path, **{"a.json": squad((context, asked))})
    words = ["labels", "--input", tmp_path / "a.json", "--tokenizer", byte, "--val-fraction", 0]
    words += ["--max-tokens", 27, "--question-tokens", 5, "--stride", 100]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == EXIT_OK
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.source["answers_in_no_window"], manifest.source["questions_cut"]) == (2, 2)
    assert manifest.source["question_tokens"] == 5
    assert manifest.source["questions"] == 4 == accounted(manifest.source)
    answered = {example for shard in shards_of(tmp_path / "out", "train")
                for span, example in zip(shard["spans"], shard["examples"], strict=True) if span != [0, 0]}  # fmt: skip
    assert answered == {0}
    printed = capsys.readouterr().out
    assert "2 answers that fit no window, so that none has them, 2 questions cut at --question-tokens" in printed
    rows = token_rows(tmp_path / "out", "train")
    assert max(map(len, rows)) == 27


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
# Questions, answers in no window, windows; and how many of the answers that were learned from are a right answer to the
# letter, where tokens are words and Chinese characters: others begin or end within a word ("2" of "2.5bn").
REAL = {
    "policyqa/dev.json.gz": (3809, 0, 3809, 3750),
    "policyqa/test.json.gz": (4152, 0, 4164, 4105),
    "xquad/xquad.en.json.gz": (1190, 0, 1246, 1189),
    "xquad/xquad.zh.json.gz": (1190, 0, 1374, 1190),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordPiece of the real sets' own paragraphs."""
    path = tmp_path_factory.mktemp("words") / "words.json"
    texts = [(SHARED / name).read_bytes() for name in REAL]
    articles = (article for text in texts for article in json.loads(gzip.decompress(text))["data"])
    paragraphs = (one["context"] for article in articles for one in article["paragraphs"])
    build_tokenizer(paragraphs, "wordpiece", 12_000).save(str(path))
    return path


@pytest.mark.skipif(not (SHARED / "xquad").is_dir(), reason="no real question sets in ../shared")
@pytest.mark.parametrize("name", REAL)
def test_every_question_of_a_real_set_is_accounted_for(tmp_path: Path, words: Path, name: str):
    files = files_of(SHARED / name)
    frame = frame_tokens(load_tokenizer(words).special)
    manifest, _ = run(lambda: QuestionsKind(SquadReader(files), frame), words, tmp_path / "out")
    kept = Asked(Records(tmp_path / "out", manifest, "train"))
    records = Records(tmp_path / "out", manifest, "train")
    paragraphs = (one for article in json.loads(files[0].read_all())["data"] for one in article["paragraphs"])
    truth = [(asked["id"], one["context"], tuple(a["text"] for a in asked["answers"])) for one in paragraphs
             for asked in one["qas"]]  # fmt: skip
    assert [(kept[n].id, kept[n].context, kept[n].answers) for n in range(len(kept))] == truth
    missing = exact = 0
    for number, (_, context, answers) in enumerate(truth):
        rows = np.arange(kept.first_rows[number], kept.first_rows[number + 1])
        spans, windows = records.column("spans", rows), records.column("windows", rows)
        with_answer = np.flatnonzero(spans.any(axis=1))
        missing += not len(with_answer)
        texts = set()
        for row in with_answer:
            first, last = kept.chars(number)[windows[row, 1] + spans[row] - windows[row, 0]]
            texts.add(context[first[0] : last[1]])
        assert len(texts) <= 1  # all windows say the same
        assert all(answers[0].strip() in text for text in texts)
        exact += texts == {answers[0].strip()}
    found = (len(truth), missing, len(records), exact)
    assert manifest.source["questions"] == len(truth) == accounted(manifest.source)
    assert manifest.source.get("answers_in_no_window", 0) == missing
    assert found == REAL[name]
