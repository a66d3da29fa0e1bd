"""The vocabulary report: counted right, and shown so that one can read it."""

import pytest

from data_prep import vocabulary
from data_prep.tokenizer import build_tokenizer
from data_prep.vocabulary import vocabulary_report

TEXTS = ["a b a\n", "猫 a", ""]


def test_what_is_counted():
    report = vocabulary_report(build_tokenizer(["ab猫 \n"], "char", 0), TEXTS)
    assert (report.vocab_size, report.never_used) == (7, 2)  # of 5 characters and 2 special tokens the latter
    assert (report.tokens, report.characters, report.text_bytes, report.coverage) == (9, 9, 11, 1.0)
    assert sorted(report.most_used[:2]) == [("a", 3), ("␣", 3)]
    assert [count for _, count in report.most_used] == [3, 3, 1, 1, 1]
    assert {token for token, _ in report.least_used[:3]} == {"b", "猫", "\\n"}


def test_unknown_characters_lower_the_coverage():
    report = vocabulary_report(build_tokenizer(["ab \n"], "char", 0), TEXTS)
    assert report.coverage == pytest.approx(8 / 9)


def test_the_size_of_a_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    tokenizer = build_tokenizer(TEXTS, "byte", 0)
    whole = vocabulary_report(tokenizer, TEXTS)
    monkeypatch.setattr(vocabulary, "_AT_ONCE", 1)
    assert vocabulary_report(tokenizer, TEXTS) == whole
    assert whole.tokens == whole.text_bytes == 11


def test_what_is_shown():
    text = vocabulary_report(build_tokenizer(["ab猫 \n"], "char", 0), TEXTS).text()
    assert "vocabulary   7 tokens, 2 of them never used" in text
    assert "1.22 bytes, 1.00 characters" in text
    assert "coverage     100.0000% of the characters" in text
    assert "3  33.3333%  ␣" in text
    assert r"11.1111%  \n" in text
    assert "11.1111%  猫" in text


def test_no_text_is_a_report_of_nothing():
    report = vocabulary_report(build_tokenizer([], "byte", 0), [])
    assert (report.tokens, report.most_used, report.never_used) == (0, (), 257)
    assert "0 tokens" in report.text()
