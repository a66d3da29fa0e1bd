"""Scores of labels from counts that ranks add up: accuracy, F1, Matthews correlation. Equal to scikit-learn's.

The counts are of all texts: how many labels and texts there are, in how many texts everything is right, and of each
label how often it is rightly told, true, and told.
"""

import math
from collections.abc import Sequence

import torch


def label_sums(loss: torch.Tensor, counted: torch.Tensor, truth: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """The counts of a batch: fp64 [4 + 3 C].

    loss: a scalar; counted: bool [B], or [B, C] where a text may have several labels, what counts; truth, guess: bool
    [B, C], false in rows that do not count.
    """
    rows = counted if counted.dim() == 1 else counted.all(-1)
    right = rows & (truth == guess).all(-1)
    of_all = [part.double().sum() for part in (loss, counted, rows, right)]
    return torch.cat([torch.stack(of_all), *(part.double().sum(0) for part in (truth & guess, truth, guess))])


def label_scores(sums: Sequence[float]) -> dict[str, float]:
    """Of the sums of ``label_sums``: ``val_loss`` (nats a label that counts), ``accuracy`` (texts that are all right),
    ``macro_f1`` and ``rows``; also ``matthews``, or ``micro_f1`` where a text may have several labels.
    """
    loss, labels, rows, right, *counts = sums
    classes = len(counts) // 3
    found, truth, guess = counts[:classes], counts[classes : 2 * classes], counts[2 * classes :]
    scores = {"val_loss": loss / labels, "accuracy": right / rows}
    each = [_f1(*of_label) for of_label in zip(found, truth, guess, strict=True)]
    if labels > rows:  # each label of a text counts by itself
        # A label that nobody has and nobody tells is worth nothing, as in scikit-learn.
        scores |= {"macro_f1": sum(f1 or 0.0 for f1 in each) / classes}
        scores |= {"micro_f1": _f1(sum(found), sum(truth), sum(guess)) or 0.0}
    else:
        seen = [f1 for f1 in each if f1 is not None]
        scores |= {"macro_f1": sum(seen) / len(seen), "matthews": matthews(right, rows, truth, guess)}
    return {**scores, "rows": int(rows)}


def _f1(found: float, truth: float, guess: float) -> float | None:
    """Of a label; None where it is neither true nor told."""
    return 2 * found / (truth + guess) if truth + guess else None


def matthews(right: float, rows: float, truth: Sequence[float], guess: Sequence[float]) -> float:
    """Correlation of truth and guess, R_K of Gorodkin 2004, "Comparing two K-category assignments"; with two labels the
    coefficient of Matthews 1975. 0 where one of them is always the same.
    """
    covariance = right * rows - sum(t * g for t, g in zip(truth, guess, strict=True))
    of_truth, of_guess = (rows * rows - sum(count * count for count in counts) for counts in (truth, guess))
    return covariance / math.sqrt(of_truth * of_guess) if of_truth * of_guess else 0.0
