"""Exact match and F1 against the rules of the official scripts, written out, and against torchmetrics."""

import random

import pytest
from torchmetrics.functional.text import squad

from hvdtrain.tasks.squad_scores import Scored, normalised, score, squad_scores


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The  Note-G!", "en", "noteg"),
        ("a the an", "en", ""),
        ("An apple, a day; theatre", "en", "apple day theatre"),
        ("«Le» chat", "en", "«le» chat"),  # only ASCII's marks go
        ("the漢", "en", "the漢"),  # no border of a word
        ("É\u3000É", "en", "é é"),
        ("308分，第六。", "en", "308分，第六。"),
        ("308分，第六。", "zh", "308 分 第 六"),
        ("The NFL 橄榄球", "zh", "the nfl 橄 榄 球"),
        ("«a»", "zh", "a"),
    ],
)
def test_texts_as_they_are_compared(text: str, language: str, expected: str):
    assert normalised(text, language) == expected


def both(prediction: str, answers: list[str], language: str = "en", some_have_none: bool = False):
    found = score(prediction, answers, 0.0, language, some_have_none)
    return found.exact, pytest.approx(found.f1)


def test_one_question():
    assert both("Note G", ["the note G."]) == (1, 1)
    assert both("in Note G", ["Note G", "1843"]) == (0, 4 / 5)
    assert both("a b b", ["b b b c"]) == (0, 2 * 2 / 6)  # "a" is an article; each b as often as both have it
    assert both("x", ["y", "z"]) == (0, 0)
    assert both("橄榄球", ["球"], "en") == (0, 0)
    assert both("橄榄球", ["球"], "zh") == (0, 2 / 4)


def test_answers_of_which_nothing_is_left():
    """SQuAD 1.1 gives an empty text no F1, not even beside another; 2.0 compares the two."""
    assert both("the", ["a"]) == (1, 0)
    assert both("the", ["a"], some_have_none=True) == (1, 1)
    assert both("the", ["a", "cat"], some_have_none=True) == (0, 0)  # an answer that is empty is none
    assert both("cat", [], some_have_none=True) == (0, 0)
    assert both("", [], some_have_none=True) == (1, 1)


WORDS = ["the", "a", "Ada", "note", "G.", "in", "1843", "café", "漢字", "one,", "two"]


def test_equal_to_torchmetrics():
    """Its SQuAD is the official script of 1.1, but for texts of which nothing is left (2.0's rule)."""
    draw = random.Random(1)
    texts = [" ".join([*draw.choices(WORDS, k=draw.randint(0, 5)), draw.choice(WORDS[2:])]) for _ in range(900)]
    predictions = [{"id": str(n), "prediction_text": texts[n]} for n in range(300)]
    truths = [texts[300 + 2 * n : 302 + 2 * n - n % 2] for n in range(300)]
    target = [
        {"id": str(n), "answers": {"text": truth, "answer_start": [0] * len(truth)}} for n, truth in enumerate(truths)
    ]
    expected = squad(predictions, target)
    found = squad_scores([score(texts[n], truths[n], 0.0, "en", False) for n in range(300)], 0.0)
    assert found["exact_match"] == pytest.approx(expected["exact_match"].item(), rel=1e-6)
    assert found["f1"] == pytest.approx(expected["f1"].item(), rel=1e-6)
    assert 0 < found["exact_match"] < found["f1"] < 100


def scored(*rows: tuple[int, float, float]) -> list[Scored]:
    """(has an answer?, by how much none is better, exact and F1 of the best answer)"""
    return [Scored(1, has, 1, null, right, right) for has, null, right in rows]


#   threshold        nothing answered    -3     -1      0      2      4
#   right of five           2             3      2      3      2      3
FIVE = scored((1, 0.0, 1), (0, -1.0, 0), (1, -3.0, 1), (1, 4.0, 1), (0, 2.0, 0))


def test_questions_without_an_answer():
    found = squad_scores([*FIVE, Scored()], threshold=0.0)  # one whose answers are not told counts nowhere
    assert found["questions"] == 5
    assert (found["exact_match"], found["f1"]) == (60, 60)  # right: 0.0, -3.0 and 2.0
    assert (found["has_answer_exact_match"], found["no_answer_exact_match"]) == (pytest.approx(200 / 3), 50)
    assert (found["best_exact_match"], found["best_exact_match_threshold"]) == (60, -3.0)


def test_a_threshold_that_is_met_answers():
    assert squad_scores(FIVE, threshold=4.0)["exact_match"] == 60
    assert squad_scores(FIVE, threshold=3.9)["exact_match"] == 40
    assert squad_scores(FIVE, threshold=-9)["exact_match"] == 40  # nobody is answered: right are those without


def official(rows: list[Scored], field: str) -> tuple[float, float]:
    """The best of all thresholds, tried one after another."""
    tries = [(sum(1 - one.has_answer for one in rows), 0.0)]
    for threshold in sorted({one.null for one in rows}):
        right = [(getattr(one, field) if one.null <= threshold else 1 - one.has_answer) for one in rows]
        tries.append((sum(right), threshold))
    return max(tries, key=lambda one: one[0])  # the first of equals


def test_the_best_threshold_is_the_best_of_all():
    draw = random.Random(2)
    for _ in range(200):
        rows = [
            Scored(1, has := float(draw.random() < 0.6), 1, draw.uniform(-5, 5), *[has * draw.randint(0, 4) / 4] * 2)
            for _ in range(draw.randint(1, 12))
        ]
        if all(one.has_answer for one in rows):
            continue
        best, threshold = official(rows, "f1")
        found = squad_scores(rows, 0.0)
        assert found["best_f1"] == pytest.approx(100 * best / len(rows))
        assert found["best_f1_threshold"] == threshold
