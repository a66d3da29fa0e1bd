"""Texts with a label -> token shards for classification and sentiment.

A text becomes  [cls] text [sep]  or, with a second text,  [cls] text [sep] second [sep]  (Devlin et al. 2018), cut to
``max_tokens``. A tokenizer without such tokens has its beginning- or end-of-text token put there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.bad import BadItem, leave_out
from data_prep.encoder import TokenEncoder
from data_prep.pieces import Unit
from data_prep.prepare import SplitsOf
from data_prep.readers import Item
from data_prep.tables import TableReader
from hvdtrain.comm.ranks import Ranks
from hvdtrain.data.shards import SPLITS
from hvdtrain.errors import ConfigError, DataError


def frame_tokens(special: Mapping[str, int]) -> tuple[int, int]:
    """Ids of what stands before a text and after it, from those that the tokenizer has (role -> id)."""
    first = next(special[role] for role in ("cls", "bos", "eos") if role in special)
    last = next(special[role] for role in ("sep", "eos") if role in special)
    return first, last


@dataclass
class LabelsKind:
    """frame: ids of [cls] and [sep]. A text above ``max_tokens`` (0: no limit) loses its end, and that is counted.

    Errors: DataError for a label in another split that training never has, unless the reader skips what is bad;
    ConfigError for too small a ``max_tokens``.
    """

    reader: TableReader
    frame: tuple[int, int]
    max_tokens: int = 512

    name = "labels"
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_room(self.max_tokens, 3)

    def identity(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}

    def begin(self, encoder: TokenEncoder) -> None:
        self._encoder = encoder

    def scan(self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int], ranks: Ranks) -> None:
        """Which labels are there? Numbers are ordered as numbers, names by their letters.

        Chance may give every text of a label to validation. Then one of them stays in training: that with the highest
        digest, which goes to validation last. So no other text changes its split.
        """
        found = ranks.together(lambda: self._labels(splits_of, units, mine))
        seen: dict[str, dict[str, str]] = {name: {} for name in SPLITS}  # split -> label -> a file that has it
        spare: dict[str, bytes] = {}
        for part, by_chance in ranks.all_gather_object(found):
            for split, labels in part.items():
                seen[split] = labels | seen[split]
            spare |= {label: max(digest, spare.get(label, b"")) for label, digest in by_chance.items()}
        splits_of.kept = frozenset(digest for label, digest in spare.items() if label not in seen["train"])
        train = {*seen["train"], *spare}
        numbers = all(label.removeprefix("-").isdecimal() for label in train)
        self.label_names = tuple(sorted(train, key=lambda label: (int(label) if numbers else 0, label)))
        self._numbers = {label.encode(): number for number, label in enumerate(self.label_names)}
        known = f"training, which has {len(train)}: {', '.join(self.label_names[:20])}{', ...' * (len(train) > 20)}"
        self._strange: dict[bytes, str] = {}
        for split in SPLITS[1:]:
            for label in sorted({*seen[split]} - train):
                message = f"{seen[split][label]}: label {label!r} of the {split} split is never seen in {known}"
                self._strange.setdefault(label.encode(), message)

        def check() -> None:
            if self._strange and not self.reader.skip_bad:
                raise DataError(f"{next(iter(self._strange.values()))} (--skip-bad leaves such texts out)")

        ranks.together(check)

    def _labels(
        self, splits_of: SplitsOf, units: Sequence[Unit], mine: Sequence[int]
    ) -> tuple[dict[str, dict[str, str]], dict[str, bytes]]:
        """Split -> label -> a file that has it; and the highest digest of each label's texts that validation has by
        chance.
        """
        found: dict[str, dict[str, str]] = {name: {} for name in SPLITS}
        by_chance: dict[str, bytes] = {}
        for number in mine:
            for piece in units[number].pieces:
                for items in self.reader.items(piece, Counter()):
                    for item in items:
                        split, digest = splits_of(item, piece)
                        label = item[0].decode()
                        if split == "val" and piece.split is None:
                            by_chance[label] = max(digest, by_chance.get(label, b""))
                        else:
                            found[split].setdefault(label, str(piece.file.path))
        return found, by_chance

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
            "labels": np.array([self._numbers[item[0]] for item in items], np.int64),
        }

    def _is_strange(self, item: Item, counts: Counter) -> bool:
        if item[0] not in self._strange:
            return False
        leave_out(BadItem("unseen", self._strange[item[0]]), True, counts)
        return True


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
