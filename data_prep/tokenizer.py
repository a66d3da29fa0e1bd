"""Trains a tokenizer with Hugging Face `tokenizers` and writes one ``tokenizer.json``.

bpe        byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2): no text is unknown to it
unigram    a unigram language model over the same bytes (Kudo 2018): no text is unknown to it either
char       one token for each character that the text holds; others become <|unk|>
byte       one token for each byte; needs no training
wordpiece  as BERT has it (wordpiece.py)

The same text gives the same file. Of all but unigram that is certain; of unigram see ``_settled``.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.roles import SPECIAL_TOKENS
from data_prep.wordpiece import NO_CHANGES, Changes, wordpiece
from hvdtrain.errors import ConfigError, DataError, OutputError
from hvdtrain.files import exists, make_folder, read_json, write_json, write_text

KINDS = ("bpe", "unigram", "char", "byte", "wordpiece")

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the letters that stand for the 256 bytes
_SCORE_DECIMALS = 3  # of a natural logarithm of a probability
_STEP = 1e-4  # of the library, between the scores of bytes that it never met
_LONGEST_RUN = 1 << 10  # of white space, or of anything else, that unigram is trained on in one


def train_tokenizer(
    texts: Iterable[str],
    identity: dict[str, Any],
    kind: str,
    vocab_size: int,
    special: Sequence[str],
    out: Path,
    changes: Changes = NO_CHANGES,
) -> dict[str, Any]:
    """Train and write ``out`` and, beside it, a record of how it was made (which is returned).

    identity: what tells this text from others, as JSON has it (lists, no tuples). If the same text and settings made
    ``out`` before, it is left as it is, and ``texts`` are not read.
    Errors: those of ``build_tokenizer``; ConfigError where ``out`` holds another one; OutputError.
    """
    record = {"kind": kind, "asked_vocab_size": vocab_size, "special": list(special), **identity}
    if kind == "wordpiece":
        record |= asdict(changes)
    record_path = out.with_name(f"{out.stem}.record.json")
    if exists(out):
        before = read_json(record_path) if exists(record_path) else {}
        if {key: before.get(key) for key in record} == record:
            return {**before, "reused": True}
        raise ConfigError(
            f"{out} exists and was not made from this input and these settings; remove it or choose another --out"
        )
    sizes = [0, 0]

    def counted() -> Iterator[str]:
        for text in texts:
            sizes[0] += 1
            sizes[1] += len(text.encode())
            yield text

    tokenizer = build_tokenizer(counted(), kind, vocab_size, special, changes)
    record |= {"vocab_size": tokenizer.get_vocab_size(), "documents": sizes[0], "trained_on_bytes": sizes[1]}
    try:
        make_folder(out.parent)
    except OSError as error:
        raise OutputError(f"cannot make {out.parent}: {error.strerror}") from None
    write_json(record_path, record)
    write_text(out, tokenizer.to_str(pretty=True))
    return {**record, "reused": False}


def build_tokenizer(
    texts: Iterable[str], kind: str, vocab_size: int, special: Sequence[str] = (), changes: Changes = NO_CHANGES
) -> Tokenizer:
    """Train a tokenizer of this kind on ``texts``; its special tokens have the first ids, end of text is 0.

    vocab_size: of bpe and wordpiece at most so many tokens, of unigram just so many; char and byte have as many as they
    need. special: roles of tokens beyond the end of text (and ``unk``, which char always has); wordpiece has BERT's
    five. changes: what wordpiece makes of letters.
    Errors: ConfigError for an unknown kind or role, or a vocabulary that is too small, or larger than the text can
    give, or changes of another kind; DataError for no text.
    """
    builders = {"bpe": _bpe, "unigram": _unigram, "char": _char, "byte": _byte}
    if kind not in KINDS:
        raise ConfigError(f"no kind of tokenizer {kind!r}; there are: {', '.join(KINDS)}")
    if unknown := [role for role in special if role not in SPECIAL_TOKENS]:
        raise ConfigError(f"no special token {unknown[0]!r}; there are: {', '.join(SPECIAL_TOKENS)}")
    if kind == "wordpiece":
        return wordpiece(_not_empty(texts), vocab_size, special, changes)
    if changes != NO_CHANGES:
        raise ConfigError(f"--lower-case and --strip-accents are for wordpiece; {kind} keeps every byte")
    always = ("eos", "unk") if kind == "char" else ("eos",)
    names = [SPECIAL_TOKENS[role][0] for role in dict.fromkeys([*always, *special])]
    least = len(_ALPHABET) + len(names)
    if kind in ("bpe", "unigram") and vocab_size < least:
        raise ConfigError(
            f"--vocab-size {vocab_size}: {kind} needs {least} or more (256 bytes and {', '.join(names)}); raise it"
        )
    return builders[kind](_not_empty(texts), vocab_size, names)


def _bpe(texts: Iterable[str], vocab_size: int, names: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=names, initial_alphabet=_ALPHABET, show_progress=False
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: Iterable[str], vocab_size: int, names: list[str]) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=names, initial_alphabet=_ALPHABET, show_progress=False
    )
    tokenizer = _byte_level(models.Unigram())
    tokenizer.train_from_iterator((part for text in texts for part in _without_long_runs(text)), trainer)
    scores = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    pieces = _settled({piece: score for piece, score in scores.items() if piece not in names})
    vocab = [(name, 0.0) for name in names] + _best(pieces, vocab_size - len(names))
    if len(vocab) < vocab_size:
        raise ConfigError(
            f"--vocab-size {vocab_size}: this text gives a unigram vocabulary of {len(vocab)} tokens; "
            f"lower it to that, or train on more text"
        )
    return _byte_level(models.Unigram(vocab), names)  # without an unknown token: every byte has one


def _char(texts: Iterable[str], vocab_size: int, names: list[str]) -> Tokenizer:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocab = {token: number for number, token in enumerate([*names, *sorted(characters)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=SPECIAL_TOKENS["unk"][0]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(names)
    return tokenizer


def _byte(texts: Iterable[str], vocab_size: int, names: list[str]) -> Tokenizer:
    vocab = {token: number for number, token in enumerate([*names, *_ALPHABET])}
    return _byte_level(models.BPE(vocab=vocab, merges=[]), names)


def _byte_level(model: models.Model, names: Sequence[str] = ()) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(names))
    return tokenizer


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise DataError("there is no text to train on")


# --- unigram ---------------------------------------------------------------------------------------------------------


def _settled(scores: dict[str, float]) -> dict[str, float]:
    """Scores of pieces that are the same each time. The library walks its hash tables in another order each time, and
    that shows in two places:

        seen often       -7.123456789012341    the last digits come from the order of a sum               -> rounded
        seldom a byte    -14.2 -14.1999 ...    so many steps above the rarest piece, by place in a table  -> all alike

    Which pieces are chosen has not been seen to change; in principle a tie could be decided by the last digit.
    """
    rarest = min((score for piece, score in scores.items() if len(piece) > 1), default=0.0)
    least = rarest + len(_ALPHABET) * _STEP
    return {piece: round(max(score, least), _SCORE_DECIMALS) for piece, score in scores.items()}


def _best(scores: dict[str, float], count: int) -> list[tuple[str, float]]:
    """All bytes and the best longer pieces: ``count`` in all, the best first."""
    ordered = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    longer = [piece for piece, _ in ordered if len(piece) > 1][: count - len(_ALPHABET)]
    kept = {*_ALPHABET, *longer}
    return [item for item in ordered if item[0] in kept]


# Begins where a run begins, so that no text takes more than one look at each character.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_RUN + 1},}}|(?<!\s)\s{{{_LONGEST_RUN + 1},}}")


def _without_long_runs(text: str) -> Iterator[str]:
    """The text, cut within its long runs: training takes two kilobytes of memory for each byte of the longest word."""
    begin = 0
    for run in _LONG_RUN.finditer(text):
        for end in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[begin:end]
            begin = end
    yield text[begin:]
