"""Text -> token ids, many documents at once, as one flat array plus offsets: just what a shard holds.

`gigatoken` reads the same ``tokenizer.json`` as Hugging Face `tokenizers` and is about a hundred times as fast. It is
young, so it is not trusted: before a corpus is encoded, both encode a sample of it. Where one token differs, or where
`gigatoken` does not know the kind of tokenizer, `tokenizers` does the work, and a note says so.
"""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from types import ModuleType

import numpy as np
from tokenizers import Encoding, Tokenizer

from data_prep.pieces import end_of_text
from data_prep.tokenizer_file import TokenizerFile, marking
from hvdtrain.data.shards import vocab_size_of
from hvdtrain.errors import DataError

_SLOW_BYTES = 1 << 20  # of text that `tokenizers` encodes at once
_WORD_SHOWN = 60  # characters of it
# What a sample may lack, but not its corpus: both libraries must agree on that too.
_ODD = "\x07 \u3000\u2028 ☃ 漢字 e\u0301 ﬁ \U0001f468\u200d\U0001f469 \U0001d54f \ue000 \ufffd ١٢ ไทย\r\n\t  x\n\n"

_awkward = threading.Lock()  # what that name stands for is the whole process's

# [tokens] uint32 and [documents + 1] int64
Encoded = tuple[np.ndarray, np.ndarray]


class UnknownWord(DataError):
    """A text holds a word that has no token, and there is none for unknown words. ``text``: all of it."""

    def __init__(self, word: str, text: str):
        super().__init__(
            f"the word {word!r} has no token, and the tokenizer has none for unknown words; name one with --unk NAME, "
            "or use a tokenizer that was trained on such text"
        )
        self.text = text


class TokenEncoder:
    """``encode(documents)``; ``name`` says which library does it and ``note``, if any, why it is not the fast one.

    sample: texts of the corpus; part: those of them that both libraries encode here, where other ranks see to the rest.
    Errors: ``encode`` raises UnknownWord.
    """

    def __init__(self, file: TokenizerFile, sample: Sequence[bytes], part: slice = slice(None)):
        self._tokenizer, self._file = file.tokenizer(), file
        self.note, self._sample = "", list(sample)
        fields = file.fields()
        self.vocab_size = vocab_size_of(fields)
        self._marking = marking(fields) if file.unknown == "dropped" else None
        try:
            if file.unknown in ("dropped", "error"):
                raise ValueError("it has no token for what it does not know")
            import gigatoken

            added = fields.get("added_tokens", [])
            # It would take the name of a special token in a text for the token; to us that is text like any other.
            fields["added_tokens"] = [token for token in added if not token["special"]]
            self._fast = gigatoken.Tokenizer.from_json(json.dumps(fields))
            probes = [*(f"a {token['content']}b\n{token['content']}" for token in added), _ODD]
            self.note = self._disagreement([*sample, *(text.encode() for text in probes)], part)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self.note = f"gigatoken does not take this tokenizer ({str(error).partition(chr(10))[0]})"

    @property
    def name(self) -> str:
        return "tokenizers" if self.note else "gigatoken"

    def agree(self, notes: Sequence[str]) -> None:
        """The fast library must be right on every rank's part of the sample. notes: those of all ranks."""
        self.note = next(filter(None, notes), "")

    @cached_property
    def bytes_per_token(self) -> float:
        """On the sample; it sizes the shards."""
        try:
            tokens = int(self.encode(self._sample)[1][-1])
        except UnknownWord:  # which will be met again where its file is known
            tokens = 0
        return sum(map(len, self._sample)) / tokens if tokens else 1.0

    def encode(self, documents: list[bytes], counts: Counter | None = None) -> Encoded:
        """Tokens of documents; how much of them was unknown is added to ``counts``."""
        tokens, offsets = (self._encode_slow if self.note else self._encode_fast)(documents)
        if counts is not None:
            self._count_unknown(tokens, documents, counts)
        return tokens, offsets

    def encodings(self, texts: list[str], counts: Counter) -> list[Encoding]:
        """The same from `tokenizers`, which knows each token's place in its text."""
        found = self._asked(self._tokenizer.encode_batch, texts)
        tokens = np.concatenate([np.empty(0, np.uint32), *(np.array(one.ids, np.uint32) for one in found)])
        self._count_unknown(tokens, [text.encode() for text in texts], counts)
        return found

    def _count_unknown(self, tokens: np.ndarray, documents: list[bytes], counts: Counter) -> None:
        if self._file.unknown == "token" and (number := int(np.count_nonzero(tokens == self._file.unknown_id))):
            counts["unknown_tokens"] += number
        if self._marking:
            tokenizer, mark = self._marking
            marked, _ = self._encode_slow(documents, tokenizer)
            if number := int(np.count_nonzero(marked == mark)):
                counts["dropped_characters"] += number

    def _encode_fast(self, documents: list[bytes]) -> Encoded:
        if not documents:
            return np.empty(0, np.uint32), np.zeros(1, np.int64)
        with _plain_rows():
            tokens, lengths = self._fast.encode_batch(documents)
        return tokens, np.concatenate([[0], np.cumsum(lengths)])

    def _encode_slow(self, documents: list[bytes], tokenizer: Tokenizer | None = None) -> Encoded:
        """Encode a mebibyte at a time: `tokenizers` needs some hundred bytes of memory for each token."""
        pieces = [(number, piece) for number, text in enumerate(documents) for piece in _cut(text)]
        ids, lengths = [np.empty(0, np.uint32)], np.zeros(len(documents), np.int64)
        waiting: list[tuple[int, bytes]] = []
        size = 0
        for place, (number, piece) in enumerate(pieces):
            waiting.append((number, piece))
            size += len(piece)
            if size >= _SLOW_BYTES or place == len(pieces) - 1:
                texts = [text.decode() for _, text in waiting]
                found = self._asked((tokenizer or self._tokenizer).encode_batch_fast, texts)
                for (owner, _), encoding in zip(waiting, found, strict=True):
                    ids.append(np.array(encoding.ids, np.uint32))
                    lengths[owner] += len(ids[-1])
                waiting, size = [], 0
        return np.concatenate(ids), np.concatenate([[0], np.cumsum(lengths)])

    def _asked(self, encode: Callable[..., list[Encoding]], texts: list[str]) -> list[Encoding]:
        """Errors: UnknownWord."""
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception, and says neither which text nor which word
            for text in texts:
                if word := self._unknown_word(text):
                    raise UnknownWord(word, text) from None
            raise DataError(f"the tokenizer cannot encode this text: {error}") from None

    def _unknown_word(self, text: str) -> str:
        tokenizer = self._tokenizer
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        steps = tokenizer.pre_tokenizer
        for word, (begin, end) in steps.pre_tokenize_str(normal) if steps else [(normal, (0, len(normal)))]:
            try:
                tokenizer.model.tokenize(word)
            except Exception:
                return normal[begin:end].strip()[:_WORD_SHOWN]
        return ""

    def _disagreement(self, sample: list[bytes], part: slice) -> str:
        """What differs on a part of the sample, or nothing."""
        documents, numbers = sample[part], range(len(sample))[part]
        fast, slow = self._encode_fast(documents), self._encode_slow(documents)
        if np.array_equal(fast[1], slow[1]) and np.array_equal(fast[0], slow[0]):
            return ""
        wrong = next(
            number
            for place, number in enumerate(numbers)
            if not np.array_equal(_document(fast, place), _document(slow, place))
        )
        return f"gigatoken and tokenizers disagree on document {wrong} of the sample"


@contextmanager
def _plain_rows() -> Iterator[None]:
    """`gigatoken` returns tokens and lengths as they are, in place of an array of `awkward`, whose import takes longer
    than encoding a hundred megabytes.
    """
    stand_in = ModuleType("awkward")
    stand_in.Array = type("Array", (), {})  # which no document is
    stand_in.unflatten = lambda tokens, lengths: (tokens, lengths)
    with _awkward:
        held = sys.modules.get("awkward")
        sys.modules["awkward"] = stand_in
        try:
            yield
        finally:
            del sys.modules["awkward"]
            if held is not None:
                sys.modules["awkward"] = held


def _cut(text: bytes) -> list[bytes]:
    """A long text in pieces of about _SLOW_BYTES, cut at line ends, where tokenizers cut anyway."""
    ends = [0]
    while len(text) - ends[-1] > _SLOW_BYTES:
        ends.append(end_of_text(lambda at, size: text[at : at + size], ends[-1] + _SLOW_BYTES))
    return [text[start:end] for start, end in pairwise([*ends, len(text)])] if len(ends) > 1 else [text]


def _document(encoded: Encoded, number: int) -> np.ndarray:
    tokens, offsets = encoded
    return tokens[offsets[number] : offsets[number + 1]]
