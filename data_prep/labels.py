"""Texts with a label, or with several -> token shards for classification and sentiment.

A text becomes  [cls] text [sep]  or, with a second text,  [cls] text [sep] second [sep]  (Devlin et al. 2018), cut to
``max_tokens``. A tokenizer without such tokens has its beginning- or end-of-text token put there.

    /labels [D]                              one label a text: its number in the manifest's label_names
    /labels [N], /label_offsets [D + 1]      several: text i has labels[label_offsets[i]:label_offsets[i + 1]], each
                                             once, the lowest number first; such shards have format version 2
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.bad import leave_out
from data_prep.encoder import TokenEncoder
from data_prep.label_cells import ONE_LABEL, LabelCells
from data_prep.pieces import Unit
from data_prep.prepare import SplitsOf
from data_prep.readers import Item
from data_prep.tables import TableReader
from hvdtrain.comm.ranks import Ranks
from hvdtrain.data.cleaning import BadItem
from hvdtrain.data.shards import SPLITS
from hvdtrain.errors import ConfigError, DataError


@dataclass
class LabelsKind:
    """frame: ids of [cls] and [sep]. A text above ``max_tokens`` (0: no limit) loses its end, and that is counted.

    Errors: DataError for a label in another split that training never has and that no name was given for, unless the
    reader skips what is bad; ConfigError for too small a ``max_tokens``.
    """

    reader: TableReader
    frame: tuple[int, int]
    max_tokens: int = 512
    cells: LabelCells = ONE_LABEL

    name = "labels"
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_room(self.max_tokens, 3)

    @property
    def version(self) -> int:
        return 2 if self.cells.separator else 1

    def identity(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, **self.cells.identity()}

    def begin(self, encoder: TokenEncoder) -> None:
        self._encoder = encoder

    def scan(self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int], ranks: Ranks) -> None:
        """Which labels are there? Given names keep their order; numbers are ordered as numbers, names by their letters.

        Chance may give every text of a label to validation. Then one of them stays in training: that with the highest
        digest, which goes to validation last. So no other text changes its split.
        """
        found = ranks.together(lambda: self._labels(splits_of, units, mine))
        seen: dict[str, dict[str, str]] = {name: {} for name in SPLITS}  # split -> label -> a file that has it
        spare: dict[str, bytes] = {}
        self._bad_cells: dict[bytes, BadItem] = {}
        for part, by_chance, bad_cells in ranks.all_gather_object(found):
            for split, labels in part.items():
                seen[split] = labels | seen[split]
            for label, digest in by_chance.items():
                spare[label] = max(digest, spare.get(label, b""))
            for cell, why in bad_cells.items():
                self._bad_cells.setdefault(cell, BadItem(*why))
        train = {*seen["train"], *spare}
        splits_of.kept = frozenset(digest for label, digest in spare.items() if label not in seen["train"])
        numbers = all(label.removeprefix("-").isdecimal() for label in train)
        ordered = sorted(train, key=lambda label: (int(label) if numbers else 0, label))
        self.label_names = self.cells.names or tuple(ordered)
        self._numbers = {label: number for number, label in enumerate(self.label_names)}
        known = f"training, which has {len(train)}: {', '.join(self.label_names[:20])}{', ...' * (len(train) > 20)}"
        self._unseen: dict[str, BadItem] = {}
        for split in SPLITS[1:]:
            for label in sorted({*seen[split]} - {*self._numbers}):
                message = f"{seen[split][label]}: label {label!r} of the {split} split is never seen in {known}"
                self._unseen.setdefault(label, BadItem("unseen", message))

        def check() -> None:
            strange = [*self._bad_cells.values(), *self._unseen.values()]
            if strange and not self.reader.skip_bad:
                raise DataError(f"{strange[0]} (--skip-bad leaves such texts out)")

        ranks.together(check)

    def _labels(
        self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int]
    ) -> tuple[dict[str, dict[str, str]], dict[str, bytes], dict[bytes, tuple[str, str]]]:
        """Split -> label -> a file that has it; the highest digest of each label's texts that validation has by chance;
        and of cells that say no labels the kind of what is bad, and the message.
        """
        found: dict[str, dict[str, str]] = {name: {} for name in SPLITS}
        by_chance: dict[str, bytes] = {}
        bad_cells: dict[bytes, tuple[str, str]] = {}
        for number in mine:
            for piece in units[number].pieces:
                for item in (item for items in self.reader.items(piece, Counter()) for item in items):
                    split, digest = splits_of(item, piece)
                    try:
                        labels = self.cells.read(item[0])
                    except BadItem as bad:
                        bad_cells.setdefault(item[0], (bad.kind, f"{piece.file.path}: a text {bad}"))
                        continue
                    for label in labels:
                        if split == "val" and piece.split is None:
                            by_chance[label] = max(digest, by_chance.get(label, b""))
                        else:
                            found[split].setdefault(label, str(piece.file.path))
        return found, by_chance, bad_cells

    def encode(self, items: list[Item], counts: Counter) -> dict[str, np.ndarray]:
        first, last = self.frame
        texts = len(items[0]) - 1
        items = [item for item in items if not self._is_strange(item, counts)]
        sides = [self._encoder.encode([item[side] for item in items], counts) for side in range(1, texts + 1)]
        rows = [np.empty(0, np.int64)]
        for number in range(len(items)):
            parts = [tokens[offsets[number] : offsets[number + 1]] for tokens, offsets in sides]
            if self.max_tokens and sum(map(len, parts)) + len(parts) + 1 > self.max_tokens:
                counts["cut_short"] += 1
                parts = _shortened(parts, self.max_tokens - len(parts) - 1)
            rows.append(np.concatenate([[first], *(np.append(part, last) for part in parts)]))
        return {
            "tokens": np.concatenate(rows),
            "doc_offsets": np.array([len(row) for row in rows[1:]], np.int64),
            **self._numbered([self.cells.read(item[0]) for item in items], counts),
        }

    def _numbered(self, labels: list[tuple[str, ...]], counts: Counter) -> dict[str, np.ndarray]:
        numbers = [sorted({self._numbers[label] for label in one}) for one in labels]
        flat = np.array([number for one in numbers for number in one], np.int64)
        if not self.cells.separator:
            return {"labels": flat}
        if twice := sum(map(len, labels)) - len(flat):
            counts["labels_twice"] += twice
        return {"labels": flat, "label_offsets": np.array([len(one) for one in numbers], np.int64)}

    def _is_strange(self, item: Item, counts: Counter) -> bool:
        why = self._bad_cells.get(item[0])
        if why is None and self._unseen:
            why = next((self._unseen[label] for label in self.cells.read(item[0]) if label in self._unseen), None)
        if why is not None:
            leave_out(why, True, counts)
        return why is not None


def check_room(max_tokens: int, taken: int) -> None:
    """Errors: ConfigError where ``taken`` tokens leave none of ``max_tokens`` (0: no limit) to the text."""
    if 0 < max_tokens <= taken:
        raise ConfigError(f"--max-tokens {max_tokens} leaves no room for text; it must be above {taken}")


def _shortened(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Texts cut at their ends so that together they have ``room`` tokens: the longer gives first."""
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        longest = lengths.index(max(lengths))
        others = sorted(lengths)[-2] if len(lengths) > 1 else 0
        lengths[longest] = max(lengths[longest] - (sum(lengths) - room), min(others, lengths[longest] - 1))
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
