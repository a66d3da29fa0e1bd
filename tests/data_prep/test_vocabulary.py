"""The vocabulary report: counted right, and shown so that one can read it."""

import random
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import vocabulary
from data_prep.tokenizer import build_tokenizer
from data_prep.vocabulary import readable, vocabulary_report

TEXTS = ["a b a\n", "猫 a", ""]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    return build_tokenizer([], "byte", 0)


def test_what_is_counted():
    report = vocabulary_report(build_tokenizer(["ab猫 \n"], "char", 0), TEXTS)
    assert (report.vocab_size, report.never_used) == (7, 2)  # of 5 characters and 2 special tokens the latter
    assert (report.tokens, report.characters, report.text_bytes, report.coverage) == (9, 9, 11, 1.0)
    assert (report.bytes_per_token, report.characters_per_token) == (11 / 9, 1.0)
    assert report.most_used == (("␣", 3), ("a", 3), (r"\n", 1), ("b", 1), ("猫", 1))
    assert report.least_used == ((r"\n", 1), ("b", 1), ("猫", 1), ("␣", 3), ("a", 3))
    assert asdict(report)["most_used"][0] == ("␣", 3)


@given(st.lists(ANY_TEXT, max_size=4))
def test_bytes_are_counted_as_they_are(byte: Tokenizer, texts: list[str]):
    report, found = vocabulary_report(byte, texts), Counter("".join(texts).encode())
    assert (report.tokens, report.text_bytes, report.never_used) == (found.total(), found.total(), 257 - len(found))
    assert [count for _, count in report.most_used] == sorted(found.values(), reverse=True)[:10]
    assert [count for _, count in report.least_used] == sorted(found.values())[:10]
    assert (report.characters, report.coverage) == (sum(map(len, texts)), 1.0)


def test_unknown_characters_lower_the_coverage():
    report = vocabulary_report(build_tokenizer(["ab \n"], "char", 0), TEXTS)
    assert report.coverage == pytest.approx(8 / 9)
    assert ("<|unk|>", 1) in report.most_used


def test_an_unknown_word_is_as_many_characters():
    """One [UNK] stands for a whole word: its characters count, not the token."""
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "[SEP]": 1, "the": 2, "##se": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    report = vocabulary_report(tokenizer, ["these 猫café the"])
    assert (report.tokens, report.coverage) == (4, pytest.approx(10 / 15))
    assert report.most_used == (("the", 2), ("[UNK]", 1), ("##se", 1))


def test_the_size_of_a_batch_changes_nothing(byte: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    texts = [*TEXTS, "no line end " * 5, "x\n\ny\n" * 5]
    whole = vocabulary_report(byte, texts)
    for at_once in (1, 7, 30):
        monkeypatch.setattr(vocabulary, "_AT_ONCE", at_once)
        assert vocabulary_report(byte, texts) == whole
    assert whole.tokens == whole.text_bytes == sum(len(text.encode()) for text in texts)


def test_long_texts_are_cut_at_line_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary, "_AT_ONCE", 10)
    assert list(vocabulary._parts("one\ntwo\nthree\n" + "x" * 15)) == ["one\ntwo\n", "three\n", "x" * 10, "x" * 5]
    draw = random.Random(1)
    text = "".join(draw.choices("ab\n", weights=[5, 5, 1], k=500))
    parts = list(vocabulary._parts(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 10


def test_texts_may_come_one_by_one_and_are_not_kept(byte: Tokenizer):
    report = vocabulary_report(byte, ("x" * 1000 for _ in range(2000)))
    assert (report.tokens, report.most_used) == (2_000_000, (("x", 2_000_000),))


def test_ids_may_have_gaps():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    report = vocabulary_report(tokenizer, ["a b b"])
    assert (report.vocab_size, report.never_used, report.most_used) == (2, 0, (("b", 2), ("a", 1)))


def test_the_name_of_a_special_token_in_a_text_is_text(byte: Tokenizer):
    report = vocabulary_report(byte, ["<|endoftext|>"])
    assert report.tokens == len("<|endoftext|>")
    assert byte.encode("<|endoftext|>").ids == [0]  # and the tokenizer that was given is as it was


@pytest.mark.parametrize(
    ("byte_level", "token", "shown"),
    [
        (True, "Ġthe", "␣the"),
        (True, "æ¼¢åŃĹ", "漢字"),
        (True, "Ġæ¼", r"␣\xe6\xbc"),  # part of a character
        (True, "ĉĊ", r"\t\n"),
        (True, r"\n", r"\\n"),
        (True, "ãĢĢâĢ®", r"\u3000\u202e"),
        (True, "\u2581a", "\u2581a"),  # no letter of a byte
        (True, "<|x|>", "<|x|>"),
        (False, "Ġ漢 b", "Ġ漢␣b"),
        (False, "##se", "##se"),
        (False, "\xa0\x00\u200b", r"\xa0\x00\u200b"),
    ],
)
def test_a_token_that_one_can_read(byte: Tokenizer, byte_level: bool, token: str, shown: str):
    tokenizer = Tokenizer(models.WordLevel({token: 0}, token))
    tokenizer.decoder = byte.decoder if byte_level else None
    assert readable(tokenizer, 0) == shown


def test_all_bytes_can_be_read(byte: Tokenizer):
    found = {readable(byte, number) for number in range(257)}
    assert len(found) == 257
    assert all(token.isprintable() and " " not in token for token in found)


def test_what_is_shown():
    shown = vocabulary_report(build_tokenizer(["ab猫 \n"], "char", 0), ["a " * 1500, *TEXTS]).text()
    assert shown.splitlines() == [
        "vocabulary   7 tokens, 2 of them never used",
        "text         3,011 bytes, 3,009 characters, 3,009 tokens",
        "a token      1.00 bytes, 1.00 characters",
        "coverage     100.0000% of the characters",
        "most used:",
        "  1,503  49.9501%  ␣",
        "  1,503  49.9501%  a",
        r"      1   0.0332%  \n",
        "      1   0.0332%  b",
        "      1   0.0332%  猫",
        "least used:",
        r"      1   0.0332%  \n",
        "      1   0.0332%  b",
        "      1   0.0332%  猫",
        "  1,503  49.9501%  ␣",
        "  1,503  49.9501%  a",
    ]


def test_no_text_is_a_report_of_nothing(byte: Tokenizer):
    for texts in ([], [""]):
        report = vocabulary_report(byte, texts)
        assert (report.tokens, report.most_used, report.never_used) == (0, (), 257)
        assert "0 tokens" in report.text()
