"""Tokenizers: nothing is lost, the same input gives the same file, and a file is never changed under a run."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gigatoken
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from data_prep import tokenizer as module
from data_prep.roles import SPECIAL_TOKENS, find_roles
from data_prep.tokenizer import KINDS, build_tokenizer, train_tokenizer
from data_prep.tokenizer_file import load_tokenizer
from hvdtrain.data.shards import tokenizer_vocab_size
from hvdtrain.errors import ConfigError, DataError, OutputError
from hvdtrain.files import read_json

TEXT = (
    "To be, or not to be, that is the question.\r\n 漢字とかな e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467\n\t"
    * 5
)
SIZES = {"bpe": 300, "unigram": 262, "char": 0, "byte": 0, "wordpiece": 80}  # 262 is what TEXT can give
IDENTITY = {"sample_sha256": "of TEXT", "seed": 1}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
END, UNKNOWN = SPECIAL_TOKENS["eos"][0], SPECIAL_TOKENS["unk"][0]
BYTE_COMPLETE = ("bpe", "unigram", "byte")
TRAINED = ("bpe", "unigram", "char", "wordpiece")


def made_words(count: int) -> list[str]:
    """Words with common stems and endings, the frequent ones first; one document for each hundred."""
    draw = random.Random(1)
    stems = ["".join(draw.choices("abcdefghilmnorstu", k=draw.randint(2, 5))) for _ in range(300)]
    words = [
        draw.choice(stems[: draw.randint(1, 300)]) + draw.choice(["", "s", "ing", "ed", "ly"]) for _ in range(count)
    ]
    return [" ".join(words[start : start + 100]) + ".\n" for start in range(0, count, 100)]


WORDS = made_words(6000)


def train(kind: str, out: Path, vocab_size: int | None = None, special=(), identity=IDENTITY) -> dict:
    return train_tokenizer([TEXT, ""], identity, kind, vocab_size or SIZES[kind], special, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    for kind in KINDS:
        train(kind, folder / f"{kind}.json")
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.from_file(str(folder / f"{kind}.json")) for kind in KINDS}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def there_and_back(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False)


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BYTE_COMPLETE)
@settings(max_examples=300)
@given(text=ANY_TEXT)
@example(text="  two  at both ends  ")
@example(text="\t \r\n\n \u3000\xa0")
@example(text="\ufeffa mark first, \ufeff and not first")
@example(text="\x00\u2028\u2029\x85\x0b\x0c lines of other kinds")
@example(text="e\u0301 is not é, ﬁ is not fi, Å is not Å")
@example(text="\U0001f1ef\U0001f1f5 \U0001f44d\U0001f3fd \U0001d54f \ue000 \U0010ffff \ufffd \ufffe")
@example(text="三百六十行，行行出状元。")
@example(text="\u202eright to left\u202c")
@example(text="Ġ Ċ ▁ ## <0x0A> are letters in some vocabularies")
@example(text=f"{END}{UNKNOWN} <|pad|> </s>")
def test_nothing_of_any_text_is_lost(made: dict[str, Tokenizer], kind: str, text: str):
    assert there_and_back(made[kind], text) == text


@pytest.mark.parametrize("kind", BYTE_COMPLETE)
@given(text=st.lists(ANY_TEXT | st.sampled_from([END, UNKNOWN, "<|", "|>", " "])).map("".join))
def test_the_name_of_a_special_token_can_be_text(folder: Path, kind: str, text: str):
    loaded = load_tokenizer(folder / f"{kind}.json")
    tokenizer, special = loaded.tokenizer(), loaded.special
    assert there_and_back(tokenizer, text) == text
    assert not {*special.values()} & {*ids_of(tokenizer, text)}


def test_one_token_a_byte(made: dict[str, Tokenizer]):
    for text in (TEXT, "\x00\xff\U0010ffff"):
        assert len(ids_of(made["byte"], text)) == len(text.encode())


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@given(text=ANY_TEXT)
def test_the_fast_library_agrees(folder: Path, made: dict[str, Tokenizer], kind: str, text: str):
    fast = gigatoken.Tokenizer(str(folder / f"{kind}.json"))
    assert list(fast.encode(text)) == ids_of(made[kind], text)


@given(st.text(sorted(set(TEXT)), max_size=60))
def test_char_loses_nothing_of_what_it_knows(made: dict[str, Tokenizer], text: str):
    assert there_and_back(made["char"], text) == text
    assert len(ids_of(made["char"], text)) == len(text)


def test_char_marks_what_it_does_not_know(made: dict[str, Tokenizer]):
    unknown = made["char"].token_to_id(UNKNOWN)
    found = [number == unknown for number in ids_of(made["char"], "To Ж be 猫猫")]
    assert found == [False] * 3 + [True] + [False] * 4 + [True] * 2


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_the_vocabularies(folder: Path, made: dict[str, Tokenizer]):
    sizes = {"bpe": 300, "unigram": 262, "char": len(set(TEXT)) + 2, "byte": 257}
    for kind in sizes:
        assert tokenizer_vocab_size(folder / f"{kind}.json") == made[kind].get_vocab_size() == sizes[kind]
        assert made[kind].id_to_token(0) == END
        assert load_tokenizer(folder / f"{kind}.json").special == (
            {"eos": 0, "unk": 1} if kind == "char" else {"eos": 0}
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for kind in ("bpe", "byte"):
        assert [made[kind].id_to_token(number) for number in range(1, 257)] == alphabet
    assert {*alphabet} < {*made["unigram"].get_vocab()}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_is_learned(kind: str):
    """More tokens make a text shorter; a frequent word becomes one token, or a stem and its ending."""
    text = "".join(WORDS)
    lengths = [len(ids_of(build_tokenizer(WORDS, kind, size), text)) for size in (257, 350, 600)]
    assert lengths[0] == len(text.encode())
    assert lengths[2] < 0.9 * lengths[1] < 0.8 * lengths[0]
    word = max(set(text.split()), key=text.split().count)
    assert len(ids_of(build_tokenizer(WORDS, kind, 600), f" {word}")) <= 2


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "byte"])
def test_special_tokens_come_first(kind: str):
    tokenizer = build_tokenizer([TEXT], kind, 300 if kind == "bpe" else 265, ["cls", "pad", "sep", "eos"])
    first = ["eos", "unk"] if kind == "char" else ["eos"]
    roles = {role: SPECIAL_TOKENS[role][0] for role in [*first, "cls", "pad", "sep"]}
    assert find_roles(json.loads(tokenizer.to_str())) == (roles, [])
    assert [tokenizer.token_to_id(name) for name in roles.values()] == [*range(len(roles))]
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    assert sorted(names) == sorted(roles.values())
    assert tokenizer.decode(ids_of(tokenizer, "be<|cls|>")) == "be"  # left out where they are not asked for


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path, kind: str):
    record = train(kind, tmp_path / "new" / "again.json")
    assert (tmp_path / "new" / "again.json").read_bytes() == (folder / f"{kind}.json").read_bytes()
    assert record == {**read_json(tmp_path / "new" / "again.record.json"), "reused": False}
    trained_on = {"documents": 0, "trained_on_bytes": 0} if kind == "byte" else {
        "documents": 2, "trained_on_bytes": len(TEXT.encode())
    }  # fmt: skip
    assert record.items() >= {"kind": kind, "asked_vocab_size": SIZES[kind], **IDENTITY, **trained_on}.items()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_other_threads_in_another_process_give_the_same_bytes(kind: str):
    """The library's hash tables have another order in each process, and its sums another one on each thread."""
    code = f"import test_tokenizer as t; print(t.build_tokenizer(t.WORDS, {kind!r}, 600).to_str())"
    found = {build_tokenizer(WORDS, kind, 600).to_str()}
    for threads in "1", "3":
        words = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join([*sys.path])}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=words, check=True)
        found.add(done.stdout.removesuffix("\n"))
    assert len(found) == 1


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 600])
def test_unigram_is_the_same_each_time(vocab_size: int):
    assert len({build_tokenizer(WORDS, "unigram", vocab_size).to_str() for _ in range(5)}) == 1


def test_the_scores_of_unigram_are_settled():
    """Noise in the last digits, and bytes in any order just above the rarest piece, all give the same scores."""
    one = {"ab": -3.1234, "abc": -9.0, "a": -4.0, "x": -9.0, "y": -8.9999, "z": -8.9745}
    two = {"ab": -3.1234 + 1e-9, "abc": -9.0 - 1e-9, "a": -4.0 - 1e-9, "x": -8.9999, "y": -8.98, "z": -9.0}
    expected = {"ab": -3.123, "abc": -8.974, "a": -4.0, "x": -8.974, "y": -8.974, "z": -8.974}
    assert module._settled(one) == module._settled(two) == expected


# --- a file stays ----------------------------------------------------------------------------------------------------


def test_the_same_one_is_kept_another_is_refused(folder: Path):
    out = folder / "bpe.json"

    def untouched() -> Iterator[str]:
        raise AssertionError("the text was read")
        yield

    before = out.stat().st_mtime_ns
    record = train_tokenizer(untouched(), IDENTITY, "bpe", 300, (), out)
    assert (record["reused"], record["vocab_size"], out.stat().st_mtime_ns) == (True, 300, before)
    for other in ({"vocab_size": 301}, {"kind": "char"}, {"special": ("pad",)}, {"identity": {**IDENTITY, "seed": 2}}):
        with pytest.raises(ConfigError, match="was not made from this input and these settings"):
            train(**{"kind": "bpe", "out": out, **other})
    assert out.stat().st_mtime_ns == before


def test_a_strangers_file_is_not_written_over(tmp_path: Path):
    (tmp_path / "mine.json").write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.json exists"):
        train("char", tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "precious"


def test_a_place_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot make .*file"):
        train("byte", tmp_path / "file" / "t.json")


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("special", "least"), [((), 257), (("pad", "unk"), 259)])
def test_a_vocabulary_below_all_bytes_is_refused(tmp_path: Path, kind: str, special: tuple[str, ...], least: int):
    with pytest.raises(ConfigError, match=rf"--vocab-size {least - 1}: {kind} needs {least} or more \(256 bytes and"):
        train(kind, tmp_path / "t.json", least - 1, special)
    assert list(tmp_path.iterdir()) == []
    assert train(kind, tmp_path / "t.json", least, special)["vocab_size"] == least


def test_a_vocabulary_above_what_the_text_gives(tmp_path: Path):
    """Of bpe it becomes smaller; unigram would be quite another one, so the way out is said, and it is one."""
    with pytest.raises(ConfigError, match=r"--vocab-size 5000: this text gives .* of \d+ tokens; lower it") as refused:
        train_tokenizer(WORDS, {}, "unigram", 5000, (), tmp_path / "t.json")
    most = int(re.search(r"of (\d+) tokens", str(refused.value))[1])
    assert list(tmp_path.iterdir()) == []
    for size in (most - 1, most):
        assert build_tokenizer(WORDS, "unigram", size).get_vocab_size() == size
    with pytest.raises(ConfigError, match=f"of {most} tokens"):
        build_tokenizer(WORDS, "unigram", most + 1)
    assert build_tokenizer(["x"], "bpe", 5000).get_vocab_size() == 257


def test_names_that_are_not_known():
    with pytest.raises(ConfigError, match="no special token 'start'; there are: eos, pad, bos, unk, mask, sep, cls"):
        build_tokenizer([TEXT], "bpe", 300, ["start"])
    with pytest.raises(ConfigError, match=r"no kind of tokenizer 'word'; there are: bpe, .*, byte, wordpiece$"):
        build_tokenizer([TEXT], "word", 300)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text(tmp_path: Path, texts: list[str]):
    for kind in TRAINED:
        with pytest.raises(DataError, match="no text to train on"):
            train_tokenizer(texts, {}, kind, 300, (), tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []
    assert train_tokenizer(texts, {}, "byte", 1, (), tmp_path / "t.json")["vocab_size"] == 257


@pytest.mark.parametrize("kind", TRAINED)
def test_what_goes_wrong_while_reading_is_said_as_it_is(kind: str):
    def texts() -> Iterator[str]:
        yield TEXT
        raise DataError("line 7 is not UTF-8")

    with pytest.raises(DataError, match="line 7 is not UTF-8"):
        build_tokenizer(texts(), kind, 300)


RUNS = st.lists(st.tuples(st.sampled_from("a漢 \n"), st.integers(1, 40))).map(
    lambda runs: "".join(letter * times for letter, times in runs)
)


@given(RUNS)
def test_long_runs_are_cut_for_unigram(text: str):
    """A chromosome on one line, or a megabyte of spaces, took as many gigabytes."""
    cut = re.compile(r"(?<!\S)\S{9,}|(?<!\s)\s{9,}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONGEST_RUN", 8)
        patch.setattr(module, "_LONG_RUN", cut)
        parts = list(module._without_long_runs(text))
    assert "".join(parts) == text
    assert not any(cut.search(part) for part in parts)
    assert len(parts) == 1 + sum((len(run) - 1) // 8 for run in re.findall(r"\S+|\s+", text))
