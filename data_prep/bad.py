"""Items that cannot be used: they are refused, or with --skip-bad left out, counted, and the first few named.

A reader raises ``BadItem`` where it finds one, and catches it where it can go on with the next:

    try:
        items.append(self._item(line))
    except BadItem as bad:
        leave_out(bad, self.skip_bad, counts)

A DataError stays one, also with --skip-bad: after it nothing can be read (a damaged archive, a quote that never
closes).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hvdtrain.data.cleaning import BadItem
from hvdtrain.errors import DataError

NAMED = 5  # of what is left out

# Kind -> what is said of it. ``counts`` has it as ``bad_`` and the kind.
KINDS = {
    "utf8": "not UTF-8",
    "zero": "binary (a zero byte)",
    "utf16": "UTF-16 or UTF-32",
    "surrogate": "with half a surrogate pair",
    "json": "no JSON object",
    "field": "without a field, or with one of another type",
    "cells": "with more or fewer cells than columns",
    "label": "without a label",
    "unseen": "with a label that training never has",
    "unnamed": "with a label that --label-names does not name",
    "question": "not a question as SQuAD has it",
    "answer": "with an answer that is not in its paragraph",
}


class Counts(Counter):
    """What was left out or mended, by name, and the first bad items by their messages."""

    def __init__(self, *values):
        super().__init__(*values)
        self.bad_items: list[str] = []


def leave_out(bad: BadItem, skip_bad: bool, counts: Counter) -> None:
    """Count and name the item, or, without ``skip_bad``, refuse it. Errors: DataError."""
    if not skip_bad:
        raise DataError(f"{bad} (--skip-bad leaves out and counts what is bad)") from None
    counts[f"bad_{bad.kind}"] += 1
    if isinstance(counts, Counts) and len(counts.bad_items) < NAMED:
        counts.bad_items.append(str(bad))


def say_bad(counts: Mapping[str, Any]) -> str:
    """``3 not UTF-8, 1 no JSON object``: the bad items among ``counts``, or nothing."""
    return ", ".join(f"{counts[f'bad_{kind}']:,} {what}" for kind, what in KINDS.items() if counts.get(f"bad_{kind}"))
