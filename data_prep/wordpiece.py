"""Trains a WordPiece tokenizer (Schuster and Nakajima 2012) as BERT has it (Devlin et al. 2018).

    text        "Unbreakable 漢字!"
    normal      control characters go, white space becomes a space, each Chinese character stands alone; and where that
                is asked for, letters become small ones and lose their accents
    words       Unbreakable  漢  字  !       cut at white space, and around each punctuation mark
    pieces      Un ##break ##able  漢  字  !     the longest that the vocabulary has, from left to right

A word with a character that the vocabulary lacks is [UNK], and so is one of more than 100 characters.

The library's own training numbers the characters that go on with a word in the order of its hash table, which differs
each time, and of pairs that are equally frequent it takes the lower numbers. So here all characters are numbered
beforehand, and the same text gives the same file.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.roles import SPECIAL_TOKENS
from hvdtrain.errors import ConfigError

ROLES = ("pad", "unk", "cls", "sep", "mask")  # in the order of their ids
PREFIX = "##"
_LONGEST = 100  # characters of a word; BERT's
_AT_ONCE = 1 << 16  # words handed to the library at a time


@dataclass(frozen=True)
class Changes:
    """What becomes of letters. ``strip_accents``: é becomes e (canonical decomposition, without the marks)."""

    lower_case: bool = False
    strip_accents: bool = False


NO_CHANGES = Changes()


def wordpiece(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = (), changes: Changes = NO_CHANGES
) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` tokens. special: roles beyond BERT's five.

    Characters take at most half of the vocabulary, the most frequent ones first; a word with another one is [UNK].
    Errors: ConfigError for a vocabulary that is too small for any text.
    """
    names = [_bracketed(role) for role in dict.fromkeys([*ROLES, *special])]
    words = _words(texts, _steps(Tokenizer(models.WordPiece()), changes))
    room = (vocab_size - len(names)) // 2
    if room < 1:
        raise ConfigError(f"--vocab-size {vocab_size}: wordpiece needs {len(names) + 2} or more; raise it")
    characters = sorted(_characters(words)[:room])
    model = models.WordPiece(
        _learned(words, characters, names, vocab_size), unk_token=names[1], max_input_chars_per_word=_LONGEST
    )
    tokenizer = _steps(Tokenizer(model), changes)
    tokenizer.decoder = decoders.WordPiece(PREFIX)
    first, last = ((names[ROLES.index(role)], ROLES.index(role)) for role in ("cls", "sep"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first[0]} $A {last[0]}",
        pair=f"{first[0]} $A {last[0]} $B:1 {last[0]}:1",
        special_tokens=[first, last],
    )
    tokenizer.add_special_tokens(names)
    return tokenizer


def _learned(words: Counter[str], characters: list[str], names: list[str], vocab_size: int) -> dict[str, int]:
    """The names, the characters, and what is made of them; numbered in this order."""
    known = {*characters}
    kept = {word: count for word, count in words.items() if {*_letters(word)} <= known}
    # The library goes on with a word only by a character that may begin one too: these are taken out again.
    helpers = dict.fromkeys(sorted({one.removeprefix(PREFIX) for one in characters} - known))
    # To the library all are special tokens, which it numbers first, as they come.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size + len(helpers),
        special_tokens=[*names, *characters, *helpers],
        continuing_subword_prefix=PREFIX,
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token=names[1]))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(_repeated(kept), trainer)
    ids = trained.get_vocab()
    pieces = (piece for piece in sorted(ids, key=lambda piece: ids[piece]) if piece not in helpers)
    return {piece: number for number, piece in enumerate(pieces)}


def _bracketed(role: str) -> str:
    """BERT's name of a role, or one that looks like it."""
    return next((name for name in SPECIAL_TOKENS[role] if name.startswith("[")), f"[{role.upper()}]")


def _steps(tokenizer: Tokenizer, changes: Changes) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=changes.strip_accents,
        lowercase=changes.lower_case,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _words(texts: Iterable[str], tokenizer: Tokenizer) -> Counter[str]:
    """How often each word that is not too long stands in all texts. What lies between white space is cut once, however
    often it is there.
    """
    between = Counter(part for text in texts for part in text.split())
    words: Counter[str] = Counter()
    for part, count in between.items():
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(part)):
            if len(word) <= _LONGEST:
                words[word] += count
    return words


def _letters(word: str) -> Iterator[str]:
    """h ##e ##r ##e"""
    yield word[0]
    for letter in word[1:]:
        yield PREFIX + letter


def _characters(words: Counter[str]) -> list[str]:
    """All that words begin with or go on with, the most frequent first, those of one count in the order of Unicode."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for letter in _letters(word):
            counts[letter] += count
    return sorted(counts, key=lambda letter: (-counts[letter], letter))


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Each word as often as it stands in the texts, some at a time."""
    for word in sorted(words):
        for first in range(0, words[word], _AT_ONCE):
            yield " ".join([word] * min(_AT_ONCE, words[word] - first))
