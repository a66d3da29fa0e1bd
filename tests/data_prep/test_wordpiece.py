"""WordPiece as BERT has it: its steps, its tokens and their roles, and a vocabulary that is the same each time."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import ODD_TEXTS, files_of, run, shards_of, snapshot, text_kind, token_rows, write
from tokenizers import Tokenizer
from transformers import BertTokenizer

from data_prep.__main__ import main
from data_prep.tokenizer import build_tokenizer, train_tokenizer
from data_prep.tokenizer_file import load_tokenizer
from data_prep.wordpiece import ROLES, Changes
from hvdtrain.data.shards import frame_tokens, read_manifest
from hvdtrain.data.words import continues_word
from hvdtrain.errors import EXIT_OK, EXIT_USAGE, ConfigError, DataError

TEXTS = [*ODD_TEXTS, "low lower lowest low low newer newest wider", "École élève ÉCOLE, naïve café 漢字 漢字かな"] * 4
FIVE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(TEXTS, "wordpiece", 700)


@pytest.fixture(scope="module")
def uncased() -> Tokenizer:
    return build_tokenizer(TEXTS, "wordpiece", 700, (), Changes(lower_case=True, strip_accents=True))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_the_pieces_of_words():
    """The most frequent word is whole, others are made of what they share; a word of a strange character is unknown."""
    made = build_tokenizer(["low lower lowest low low newer newest wider low"], "wordpiece", 25)
    assert pieces(made, "low newest") == ["low", "new", "##est"]
    assert pieces(made, "lowestest, low!") == ["lowest", "##est", "[UNK]", "low", "[UNK]"]
    begin = {piece for piece in made.get_vocab() if len(piece) == 1}
    assert begin <= {"l", "n", "w"}  # no letter that only goes on with words
    assert pieces(made, "slow") == ["[UNK]"]  # words begin with other letters than s
    assert pieces(made, "l" * 101) == ["[UNK]"]


def test_five_tokens_and_their_roles(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(str(tmp_path / "t.json"))
    assert [tokenizer.id_to_token(number) for number in range(5)] == FIVE
    loaded = load_tokenizer(tmp_path / "t.json")
    # Nothing but [sep] ends a document, as in BERT's own files.
    assert loaded.special == {**{role: number for number, role in enumerate(ROLES)}, "eos": 3}
    assert (loaded.unknown, loaded.unknown_id, loaded.notes) == ("token", 1, ())
    assert frame_tokens(loaded.special) == (2, 3)
    both = tokenizer.encode("low", "lower")
    assert (both.tokens[0], both.tokens.count("[SEP]"), set(both.type_ids)) == ("[CLS]", 2, {0, 1})


def test_more_roles_and_names_in_texts(tmp_path: Path):
    build_tokenizer(TEXTS, "wordpiece", 700, ["bos", "sep"]).save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(tmp_path / "t.json")
    assert (loaded.special["bos"], len(loaded.special)) == (5, 7)
    for name in FIVE:
        ids = loaded.tokenizer().encode(f"low {name} low", add_special_tokens=False).ids
        assert not {*ids} & {0, 2, 3, 4, 5}  # a name in a text is text


def test_letters_are_changed_only_where_that_is_asked_for(tokenizer: Tokenizer, uncased: Tokenizer):
    for text, cased, small in (
        ("École", "École", "ecole"),
        ("NAÏVE café", "NAÏVE café", "naive cafe"),
        ("e\u0301", "e\u0301", "e"),
        ("漢字!", " 漢  字 !", " 漢  字 !"),
        ("a\tb\u3000c\x00\ufffd", "a b c", "a b c"),
    ):
        assert tokenizer.normalizer.normalize_str(text) == cased
        assert uncased.normalizer.normalize_str(text) == small
    lower = build_tokenizer(TEXTS, "wordpiece", 700, (), Changes(lower_case=True))
    assert lower.normalizer.normalize_str("École") == "école"


@given(st.text(st.sampled_from(sorted({letter for text in TEXTS for letter in text})), max_size=40))
def test_characters_survive(tokenizer: Tokenizer, text: str):
    """Whatever the script: what comes back differs in white space alone; but for words that begin with a character
    that no word of the training text begins with, or go on so.
    """
    known = {*tokenizer.get_vocab()}
    normal = tokenizer.normalizer.normalize_str(text)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
    for word in words:
        letters = [word[0], *(f"##{letter}" for letter in word[1:])]
        found = pieces(tokenizer, word)
        if {*letters} <= known:
            assert "".join(piece.removeprefix("##") for piece in found) == word
        else:
            assert found == ["[UNK]"]


def test_equal_to_transformers(uncased: Tokenizer, tokenizer: Tokenizer, tmp_path: Path):
    for number, (ours, how) in enumerate(((tokenizer, False), (uncased, True))):
        theirs = BertTokenizer(vocab=ours.get_vocab(), do_lower_case=how, strip_accents=how)
        for text in [*TEXTS[:13], "Unlowered CAFÉ 漢 ##er [x]"]:
            assert theirs(text)["input_ids"] == ours.encode(text).ids, number


def test_a_small_vocabulary_keeps_the_most_frequent_characters():
    made = build_tokenizer(["aaab aab b c", "漢 漢 漢 漢 漢 漢 漢"], "wordpiece", 11)
    assert made.get_vocab_size() <= 11
    assert sorted(made.get_vocab(), key=made.token_to_id)[5:8] == ["##a", "##b", "漢"]
    with pytest.raises(ConfigError, match="--vocab-size 6: wordpiece needs 7 or more; raise it"):
        build_tokenizer(["a"], "wordpiece", 6)
    with pytest.raises(DataError, match="no text to train on"):
        build_tokenizer(["", ""], "wordpiece", 99)


def test_changes_belong_to_the_file(tmp_path: Path):
    out = tmp_path / "t.json"
    record = train_tokenizer(TEXTS, {}, "wordpiece", 700, (), out, Changes(lower_case=True))
    assert (record["lower_case"], record["strip_accents"]) == (True, False)
    assert train_tokenizer(TEXTS, {}, "wordpiece", 700, (), out, Changes(lower_case=True))["reused"]
    with pytest.raises(ConfigError, match="was not made from this input and these settings"):
        train_tokenizer(TEXTS, {}, "wordpiece", 700, (), out)
    with pytest.raises(ConfigError, match="--lower-case and --strip-accents are for wordpiece; bpe keeps every byte"):
        build_tokenizer(TEXTS, "bpe", 700, (), Changes(strip_accents=True))


def test_the_command_and_shards_of_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path / "in", **{"a.txt": "Low lower LOWEST low low newer newest wider low\n" * 9, "b.txt": "漢字 low☃\n"})
    words = ["tokenizer", "--input", tmp_path / "in", "--kind", "wordpiece", "--out", tmp_path / "t.json"]
    assert main([*map(str, words), "--vocab-size", "5"]) == EXIT_USAGE
    assert main([*map(str, words), "--vocab-size", "31", "--lower-case"]) == EXIT_OK
    assert "trained, wordpiece, " in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["normalizer"]["lowercase"] is True
    files = files_of(tmp_path / "in")
    for ranks in (1, 3):
        manifest, _ = run(lambda: text_kind(files, "line"), tmp_path / "t.json", tmp_path / f"{ranks}", ranks)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")
    assert read_manifest(tmp_path / "1").special_tokens["mask"] == 4
    assert len(token_rows(tmp_path / "1", "train")) == manifest.source["documents"]
    going_on = continues_word(tmp_path / "1" / "tokenizer.json", manifest.vocab_size)
    tokens = np.concatenate([shard["tokens"] for shard in shards_of(tmp_path / "1", "train")])
    assert 0 < going_on[tokens].mean() < 1
    assert not going_on[:5].any()


def test_accents_are_marks():
    """What strip_accents takes off is what Unicode calls so."""
    made = build_tokenizer(["a"], "wordpiece", 99, (), Changes(strip_accents=True))
    for letter in "éüñçåşẽǖ":
        marks = "".join(one for one in unicodedata.normalize("NFD", letter) if unicodedata.category(one) != "Mn")
        assert made.normalizer.normalize_str(letter) == marks
