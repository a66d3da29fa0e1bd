"""Scores of labels: by hand, against torchmetrics, and the same however the texts are shared."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as others

from hvdtrain.tasks.label_scores import label_scores, label_sums, matthews


def one_each(truth: np.ndarray, guess: np.ndarray, classes: int) -> torch.Tensor:
    """Sums of texts with one label: numbers of labels, [texts]."""
    hot = [torch.from_numpy(labels[:, None] == np.arange(classes)) for labels in (truth, guess)]
    return label_sums(torch.tensor(3.0), torch.ones(len(truth), dtype=torch.bool), *hot)


def several(truth: np.ndarray, guess: np.ndarray) -> torch.Tensor:
    """Sums of texts that may have several labels: bool [texts, labels]."""
    hot = torch.from_numpy(truth), torch.from_numpy(guess)
    return label_sums(torch.tensor(3.0), torch.ones(truth.shape, dtype=torch.bool), *hot)


@pytest.mark.parametrize(("texts", "classes", "seed"), [(500, 3, 0), (500, 28, 1), (40, 2, 2), (7, 5, 3)])
def test_one_label_as_torchmetrics(texts: int, classes: int, seed: int):
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, classes, texts)
    guess = np.where(chance.random(texts) < 0.5, truth, chance.integers(0, classes, texts))
    found = label_scores(one_each(truth, guess, classes).tolist())
    both = torch.from_numpy(guess), torch.from_numpy(truth)
    assert found["accuracy"] == (truth == guess).mean()
    expected = others.multiclass_f1_score(*both, classes, average="macro")
    assert found["macro_f1"] == pytest.approx(expected.item(), rel=1e-6)
    expected = others.multiclass_matthews_corrcoef(*both, classes)
    assert found["matthews"] == pytest.approx(expected.item(), rel=1e-5)
    assert (found["val_loss"], found["rows"]) == (3.0 / texts, texts)


@pytest.mark.parametrize(("texts", "classes", "seed"), [(500, 28, 0), (60, 3, 1), (9, 2, 2)])
def test_several_labels_as_torchmetrics(texts: int, classes: int, seed: int):
    chance = np.random.default_rng(seed)
    truth = chance.random((texts, classes)) < 0.2
    guess = truth ^ (chance.random((texts, classes)) < 0.1)
    found = label_scores(several(truth, guess).tolist())
    both = torch.from_numpy(guess).long(), torch.from_numpy(truth).long()
    for average in ("macro", "micro"):
        expected = others.multilabel_f1_score(*both, classes, average=average)
        assert found[f"{average}_f1"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["accuracy"] == (truth == guess).all(1).mean()
    assert found["accuracy"] == pytest.approx(others.multilabel_exact_match(*both, classes).item(), rel=1e-6)
    assert (found["val_loss"], found["rows"]) == (pytest.approx(3.0 / texts / classes), texts)
    assert "matthews" not in found


def test_labels_that_nobody_has_or_tells():
    """Of three labels the last is neither true nor told. scikit-learn leaves it out where each text has one label, and
    counts it as 0 where a text may have several.
    """
    truth, guess = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    f1 = [2 * 2 / (2 + 3), 2 * 1 / (2 + 1)]
    assert label_scores(one_each(truth, guess, 3).tolist())["macro_f1"] == pytest.approx(sum(f1) / 2)
    hot = [labels[:, None] == np.arange(3) for labels in (truth, guess)]
    found = label_scores(several(*hot).tolist())
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3)
    assert found["micro_f1"] == pytest.approx(2 * 3 / 8)
    nothing = label_scores(several(hot[0] & False, hot[1] & False).tolist())
    assert (nothing["macro_f1"], nothing["micro_f1"], nothing["accuracy"]) == (0.0, 0.0, 1.0)


def test_the_coefficient_of_matthews():
    """Of two labels that of 1975, by true and false positives and negatives; 0 where nothing varies."""
    tp, fp, fn, tn = 40, 11, 7, 30
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(tp + tn, 88, [tp + fn, tn + fp], [tp + fp, tn + fn]) == pytest.approx(expected)
    assert matthews(5, 5, [5, 0], [5, 0]) == 0.0
    assert matthews(3, 5, [3, 2], [5, 0]) == 0.0
    assert matthews(0, 4, [2, 2], [2, 2]) == -1.0


def test_parts_add_up_and_rows_that_do_not_count_do_not():
    chance = np.random.default_rng(5)
    truth, guess = chance.integers(0, 4, 30), chance.integers(0, 4, 30)
    parts = [one_each(truth[cut], guess[cut], 4) for cut in (slice(0, 11), slice(11, 30))]
    hot = torch.zeros(2, 4, dtype=torch.bool)
    parts.append(label_sums(torch.tensor(0.0), torch.zeros(2, dtype=torch.bool), hot, hot))
    together = one_each(truth, guess, 4)
    together[0] *= 2  # the loss of two parts
    assert sum(parts).tolist() == together.tolist()
    assert together.dtype == torch.float64
    hot = torch.zeros(1, 4, dtype=torch.bool)
    assert not label_sums(torch.tensor(0.0), torch.zeros(1, 4, dtype=torch.bool), hot, hot).any()
