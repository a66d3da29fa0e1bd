"""Plain text -> token shards for language models. Each document ends with the end-of-text token."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.encoder import TokenEncoder
from data_prep.pieces import Unit
from data_prep.prepare import SplitsOf
from data_prep.readers import Item, TextReader
from hvdtrain.comm.ranks import Ranks


@dataclass
class TextKind:
    """min_tokens, max_tokens: documents outside are left out and counted (0: no limit); the end of text counts."""

    reader: TextReader
    end_of_text: int
    min_tokens: int = 0
    max_tokens: int = 0

    name = "text"
    label_names: tuple[str, ...] = ()
    version = 1

    def identity(self) -> dict[str, Any]:
        return {"min_tokens": self.min_tokens, "max_tokens": self.max_tokens}

    def begin(self, encoder: TokenEncoder) -> None:
        self._encoder = encoder

    def scan(self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int], ranks: Ranks) -> None:
        pass

    def encode(self, items: list[Item], counts: Counter) -> dict[str, np.ndarray]:
        tokens, lengths = with_end(*self._encoder.encode([text for (text,) in items], counts), self.end_of_text)
        kept = within(lengths, self.min_tokens, self.max_tokens, counts)
        return (
            {"tokens": tokens[np.repeat(kept, lengths)], "doc_offsets": lengths[kept]}
            if not kept.all()
            else {
                "tokens": tokens,
                "doc_offsets": lengths,
            }
        )


def with_end(tokens: np.ndarray, offsets: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Put ``end`` after each document: (tokens, lengths)."""
    return np.insert(tokens, offsets[1:], end), np.diff(offsets) + 1


def within(lengths: np.ndarray, least: int, most: int, counts: Counter) -> np.ndarray:
    """Which documents have a length within the limits (0: none): bool [documents]; the others are counted."""
    short = lengths < least
    long = lengths > most if most else np.zeros(len(lengths), bool)
    for name, outside in (("too_short", short), ("too_long", long)):
        if count := int(outside.sum()):
            counts[name] += count
    return ~(short | long)
