"""Pairs of texts -> token shards for translation and summarisation. Both sides end with the end-of-text token."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.encoder import TokenEncoder
from data_prep.pieces import Unit
from data_prep.prepare import SplitsOf
from data_prep.readers import Item, Reader
from data_prep.text import with_end, within
from hvdtrain.comm.ranks import Ranks


@dataclass
class PairsKind:
    """min_tokens, max_tokens: pairs with a side outside are left out and counted (0: no limit), as are pairs with an
    empty side. ``end_of_text``: its id; it counts.
    """

    reader: Reader
    end_of_text: int
    min_tokens: int = 0
    max_tokens: int = 0

    name = "pairs"
    label_names: tuple[str, ...] = ()
    version = 1

    def identity(self) -> dict[str, Any]:
        return {"min_tokens": self.min_tokens, "max_tokens": self.max_tokens}

    def begin(self, encoder: TokenEncoder) -> None:
        self._encoder = encoder

    def scan(self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int], ranks: Ranks) -> None:
        pass

    def encode(self, items: list[Item], counts: Counter) -> dict[str, np.ndarray]:
        full = [item for item in items if all(text.strip() for text in item)]
        if empty := len(items) - len(full):
            counts["empty_side"] += empty
        sides = [
            with_end(*self._encoder.encode([item[side] for item in full], counts), self.end_of_text) for side in (0, 1)
        ]
        longest = np.maximum(sides[0][1], sides[1][1])
        shortest = np.minimum(sides[0][1], sides[1][1])
        kept = within(shortest, self.min_tokens, 0, counts)
        kept &= within(np.where(kept, longest, 0), 0, self.max_tokens, counts)
        datasets = {}
        for name, (tokens, lengths) in zip(("source", "target"), sides, strict=True):
            datasets[f"{name}_tokens"] = tokens[np.repeat(kept, lengths)]
            datasets[f"{name}_doc_offsets"] = lengths[kept]
        return datasets
