"""Exact match and F1 of answers, counted as the official scripts of SQuAD 1.1 and 2.0 count them, from sums.

    text        "The Note G."     -> lower case, no punctuation, no articles, single spaces ->     "note g"
    exact       equal after that; of several answers the one that fits best counts
    F1          of the words of both, each as often as it stands there (Rajpurkar et al. 2016)

Where some questions have no answer (SQuAD 2.0, Rajpurkar et al. 2018), a question is left without one if its score for
none exceeds that of its best answer by more than a threshold; ``best_`` scores are those of the best of all thresholds.

Languages: ``en`` is the official script, which XQuAD takes for all its languages. ``zh`` counts as MLQA does (Lewis et
al. 2020): punctuation of any script is taken off, there are no articles, and each Chinese character is a word; so F1
of Chinese answers is more than exact match, which it nearly equals by the rules of ``en``.
"""

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE = re.compile("[\u4e00-\u9fa5]")


class Scored(NamedTuple):
    """What one question adds to the sums, in its own places. ``counted``: 1, or 0 where its answers are not told.

    ``has_answer`` and ``says`` (is the best answer not empty?): 0 or 1. ``null``: how much the score for no answer
    exceeds that of the best one. ``exact`` and ``f1``: of the best answer.
    """

    counted: float = 0.0
    has_answer: float = 0.0
    says: float = 0.0
    null: float = 0.0
    exact: float = 0.0
    f1: float = 0.0


def score(prediction: str, answers: Sequence[str], null: float, language: str, some_have_none: bool) -> Scored:
    """One question's. some_have_none: is the set like SQuAD 2.0, some of whose questions have no answer?"""
    truths: Sequence[str] = answers
    if some_have_none:
        truths = [answer for answer in answers if normalised(answer, language)] or [""]
    exact = max(float(normalised(prediction, language) == normalised(truth, language)) for truth in truths)
    f1 = max(_f1(prediction, truth, language, some_have_none) for truth in truths)
    return Scored(1.0, float(bool(answers)), float(bool(prediction)), null, exact, f1)


def squad_scores(questions: Sequence[Scored], threshold: float) -> dict[str, float]:
    """Scores of a split, in percent. ``threshold``: on ``null``; it counts where some questions have no answer."""
    counted = [one for one in questions if one.counted]
    with_answer = [one for one in counted if one.has_answer]
    if len(with_answer) == len(counted):
        return {**_means(counted), "questions": len(counted)}
    decided = [_decided(one, threshold) for one in counted]
    found = {**_means(decided), "questions": len(counted)}
    for name, has_answer in (("has_answer", 1.0), ("no_answer", 0.0)):
        if part := [one for one in decided if one.has_answer == has_answer]:
            found |= {f"{name}_{key}": value for key, value in _means(part).items()}
    for field, name in (("exact", "exact_match"), ("f1", "f1")):
        found[f"best_{name}"], found[f"best_{name}_threshold"] = _best(counted, field)
    return found


def _means(questions: Sequence[Scored]) -> dict[str, float]:
    count = len(questions)
    return {
        "exact_match": 100 * sum(one.exact for one in questions) / count,
        "f1": 100 * sum(one.f1 for one in questions) / count,
    }


def _decided(one: Scored, threshold: float) -> Scored:
    right = 1 - one.has_answer
    return one._replace(exact=right, f1=right) if one.null > threshold else one


def _best(questions: Sequence[Scored], field: str) -> tuple[float, float]:
    """The best score that any threshold gives, and that threshold: 0 where none is better than no answer at all."""
    best, best_threshold = now, _ = sum(1 - one.has_answer for one in questions), 0.0
    for one in sorted(questions, key=lambda one: one.null):  # one more question is answered
        now += getattr(one, field) if one.has_answer else -one.says
        if now > best:
            best, best_threshold = now, one.null
    return 100 * best / len(questions), best_threshold


# --- texts -------------------------------------------------------------------------------------------------------


def _f1(prediction: str, truth: str, language: str, some_have_none: bool) -> float:
    said, true = (normalised(text, language).split() for text in (prediction, truth))
    if some_have_none and not (said and true):
        return float(said == true)
    shared = sum((Counter(said) & Counter(true)).values())
    return 2 * shared / (len(said) + len(true)) if shared else 0.0


def normalised(text: str, language: str) -> str:
    """A text as it is compared."""
    if language == "zh":
        text = "".join(letter for letter in text.lower() if letter not in _punctuation())
        return " ".join(_CHINESE.sub(r" \g<0> ", text).split())
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


@cache
def _punctuation() -> frozenset[str]:
    marks = (chr(number) for number in range(sys.maxunicode) if unicodedata.category(chr(number)).startswith("P"))
    return frozenset(marks) | frozenset(string.punctuation)
