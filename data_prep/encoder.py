"""Text -> token ids, many documents at once, as one flat array plus offsets: just what a shard holds.

`gigatoken` reads the same ``tokenizer.json`` as Hugging Face `tokenizers` and is about a hundred times as fast. It is
young, so it is never trusted: before a corpus is encoded, both encode a sample of it, and where one token differs, or
where it does not know the kind of tokenizer, `tokenizers` does the work and that is said aloud.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.pieces import end_of_text
from hvdtrain.data.shards import tokenizer_vocab_size

_SLOW_BYTES = 1 << 20  # of text that `tokenizers` encodes at once

# [tokens] uint32 and [documents + 1] int64
Encoded = tuple[np.ndarray, np.ndarray]


class Encoder:
    """``encode(documents)``; ``name`` says which library does it and ``note``, if any, why it is not the fast one.

    sample: texts of the corpus. ``bytes_per_token``: on the sample; it sizes the shards.
    """

    def __init__(self, tokenizer_path: Path, sample: Sequence[bytes]):
        self._tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # which a tokenizer.json may ask for
        self._tokenizer.no_padding()
        self.name, self.note = "gigatoken", ""
        try:
            import gigatoken

            fields = json.loads(tokenizer_path.read_text(encoding="utf-8"))
            added = fields.get("added_tokens", [])
            # It would take the name of a special token in a text for the token; to us that is text like any other.
            fields["added_tokens"] = [token for token in added if not token["special"]]
            self._fast = gigatoken.Tokenizer.from_json(json.dumps(fields))
            names = [f"a {token['content']}b\n{token['content']}".encode() for token in added]
            self.note = self._disagreement([*sample, *names])
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self.note = f"gigatoken does not take this tokenizer ({str(error).partition(chr(10))[0]})"
        self.encode: Callable[[list[bytes]], Encoded] = self._encode_fast
        if self.note:
            self.name, self.encode = "tokenizers", self._encode_slow
        self.vocab_size = tokenizer_vocab_size(tokenizer_path)
        tokens = int(self.encode(list(sample))[1][-1]) if sample else 0
        self.bytes_per_token = sum(map(len, sample)) / tokens if tokens else 1.0

    def _encode_fast(self, documents: list[bytes]) -> Encoded:
        if not documents:
            return np.empty(0, np.uint32), np.zeros(1, np.int64)
        layout = self._fast.encode_batch(documents).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]

    def _encode_slow(self, documents: list[bytes]) -> Encoded:
        """A mebibyte at a time: this library needs some hundred bytes of memory for each token."""
        pieces = [(number, piece) for number, text in enumerate(documents) for piece in _cut(text)]
        ids, lengths = [np.empty(0, np.uint32)], np.zeros(len(documents), np.int64)
        waiting: list[tuple[int, bytes]] = []
        size = 0
        for place, (number, piece) in enumerate(pieces):
            waiting.append((number, piece))
            size += len(piece)
            if size >= _SLOW_BYTES or place == len(pieces) - 1:
                texts = [text.decode() for _, text in waiting]
                found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for (owner, _), encoding in zip(waiting, found, strict=True):
                    ids.append(np.array(encoding.ids, np.uint32))
                    lengths[owner] += len(ids[-1])
                waiting, size = [], 0
        return np.concatenate(ids), np.concatenate([[0], np.cumsum(lengths)])

    def _disagreement(self, documents: list[bytes]) -> str:
        """What differs on the sample, or nothing."""
        fast, slow = self._encode_fast(documents), self._encode_slow(documents)
        if np.array_equal(fast[1], slow[1]) and np.array_equal(fast[0], slow[0]):
            return ""
        wrong = next(
            number
            for number in range(len(documents))
            if not np.array_equal(_document(fast, number), _document(slow, number))
        )
        return f"gigatoken and tokenizers disagree on document {wrong} of the sample"


def _cut(text: bytes) -> list[bytes]:
    """A long text in pieces of about _SLOW_BYTES, cut at line ends, where tokenizers cut anyway."""
    ends = [0]
    while len(text) - ends[-1] > _SLOW_BYTES:
        ends.append(end_of_text(lambda at, size: text[at : at + size], ends[-1] + _SLOW_BYTES))
    return [text[start:end] for start, end in pairwise([*ends, len(text)])] if len(ends) > 1 else [text]


def _document(encoded: Encoded, number: int) -> np.ndarray:
    tokens, offsets = encoded
    return tokens[offsets[number] : offsets[number + 1]]
