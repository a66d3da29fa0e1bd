"""Text -> token ids, many documents at once, as one flat array plus offsets: just what a shard holds.

`gigatoken` reads the same ``tokenizer.json`` as Hugging Face `tokenizers` and is about a hundred times as fast. It is
young, so it is never trusted: before a corpus is encoded, both encode a sample of it, and where one token differs, or
where it does not know the kind of tokenizer, `tokenizers` does the work and that is said aloud.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

_SAMPLE_BYTES = 1 << 14  # of each document of the sample

# [tokens] uint32 and [documents + 1] int64
Encoded = tuple[np.ndarray, np.ndarray]


class Encoder:
    """``encode(documents)``; ``name`` says which library does it and ``note``, if any, why it is not the fast one."""

    def __init__(self, tokenizer_path: Path, sample: Sequence[bytes]):
        self._tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = [token.content.encode() for token in added]
        self.name, self.note = "gigatoken", ""
        try:
            import gigatoken

            self._fast = gigatoken.Tokenizer(str(tokenizer_path))
            self.note = self._disagreement([text[:_SAMPLE_BYTES] for text in sample])
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self.note = f"gigatoken does not take this tokenizer ({str(error).partition(chr(10))[0]})"
        self.encode: Callable[[list[bytes]], Encoded] = self._encode_fast
        if self.note:
            self.name, self.encode = "tokenizers", self._encode_slow

    def _encode_fast(self, documents: list[bytes]) -> Encoded:
        # gigatoken takes the name of a special token in a text for the token; to us it is text like any other.
        odd = [number for number, text in enumerate(documents) if any(name in text for name in self._special)]
        if not odd:
            return self._encode_plain(documents)
        runs, start = [], 0
        for number in odd:
            runs += [self._encode_plain(documents[start:number]), self._encode_slow(documents[number : number + 1])]
            start = number + 1
        runs.append(self._encode_plain(documents[start:]))
        lengths = np.concatenate([np.diff(offsets) for _, offsets in runs])
        return np.concatenate([ids for ids, _ in runs]), np.concatenate([[0], np.cumsum(lengths)])

    def _encode_plain(self, documents: list[bytes]) -> Encoded:
        if not documents:
            return np.empty(0, np.uint32), np.zeros(1, np.int64)
        layout = self._fast.encode_batch(documents).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]

    def _encode_slow(self, documents: list[bytes]) -> Encoded:
        texts = [document.decode() for document in documents]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return np.fromiter((number for row in ids for number in row), np.uint32, offsets[-1]), offsets

    def _disagreement(self, sample: list[bytes]) -> str:
        """What differs on the sample, or nothing. A cut may split a character: it is mended as text."""
        documents = [text.decode("utf-8", "ignore").encode() for text in sample]
        fast, slow = self._encode_fast(documents), self._encode_slow(documents)
        if np.array_equal(fast[1], slow[1]) and np.array_equal(fast[0], slow[0]):
            return ""
        wrong = next(
            number
            for number in range(len(documents))
            if not np.array_equal(_document(fast, number), _document(slow, number))
        )
        return f"gigatoken and tokenizers disagree on document {wrong} of the sample"


def _document(encoded: Encoded, number: int) -> np.ndarray:
    tokens, offsets = encoded
    return tokens[offsets[number] : offsets[number + 1]]
