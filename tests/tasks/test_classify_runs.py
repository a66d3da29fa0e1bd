"""Labels from files to scores: two texts told apart by type, several labels of a text, labels that weigh more."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import LABELS, Train, texts
from tiny import CPU, labelled, loss_of, measure_of, several, write_corpus

from data_prep.__main__ import main
from hvdtrain.comm.world import World
from hvdtrain.commands.evaluate import evaluate
from hvdtrain.data.batch import LabelBatch
from hvdtrain.data.corpora import Corpora, DataOptions, open_corpora
from hvdtrain.data.loader import Feed
from hvdtrain.errors import EXIT_OK, EXIT_USAGE, HvdtrainError
from hvdtrain.models.options import TransformerOptions
from hvdtrain.tasks.classify import Classification, ClassifyOptions

FEED = Feed(24, 1, 0, global_tokens=2000)


def batches(corpora: Corpora, options: ClassifyOptions, epochs: int = 1) -> list[LabelBatch]:
    source = Classification(options).open_training(corpora, FEED).source
    steps = source.block(0, epochs * source.rows_per_epoch, 0)
    return [batch for step in steps for batch in source.batches(step.content, CPU)]


# --- two texts ----------------------------------------------------------------------------------------------------


def test_two_texts_of_a_file_reach_the_model_with_their_types(tmp_path: Path):
    """From data_prep on: the second is of type 1, with the token that ends it; padding is of type 0."""
    rows = [("yes", "ab", "abab"), ("no", "ba", "a"), ("yes", "b", "bb")]
    table = tmp_path / "pairs.tsv"
    table.write_text("".join("\t".join(row) + "\n" for row in [("label", "one", "two"), *rows]))
    tokenizer = ("--kind", "char", "--special", "cls", "sep", "pad", "--out", tmp_path / "t.json")
    how = ("--field", "one", "--second-field", "two", "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "data")
    for words in (
        ("tokenizer", "--input", table, *tokenizer),
        ("labels", "--input", table, "--val-input", table, *how),
    ):
        assert main([*map(str, words)]) == EXIT_OK
    corpora = open_corpora(DataOptions(dir=str(tmp_path / "data")))
    read = batches(corpora, ClassifyOptions())
    found = [
        (n, types.tolist()) for batch in read for n, types in zip(batch.lengths.tolist(), batch.types, strict=True)
    ]
    assert sorted(types[:n] for n, types in found) == [[0] * 4 + [1] * 2, [0] * 4 + [1] * 5, [0] * 3 + [1] * 3]
    assert not any(any(types[n:]) for n, types in found)

    task = Classification(ClassifyOptions())
    for kinds, moved in ((0, None), (1, [True]), (2, [True, True])):
        options = TransformerOptions(layers=1, width=16, heads=2, context=24, token_types=kinds)
        model = task.make_model(options, corpora.manifest)
        model.initialise(1)
        loss_of(task, model, read[0]).total.backward()
        rows_moved = None if not kinds else model.encoder.token_type.weight.grad.abs().sum(1) > 0
        assert (rows_moved if moved is None else rows_moved.tolist()) == moved


# --- several labels -----------------------------------------------------------------------------------------------


def write_several(folder: Path) -> Path:
    """71 texts; each of three labels for the texts that have its token (10, 11, 12)."""
    rows = [(text, [token - 10 for token in (10, 11, 12) if token in text]) for text in texts(71, 3)]
    splits = {"train": [several(rows[:60])], "val": [several(rows[60:])]}
    write_corpus(folder, splits, kind="labels", version=2, label_names=LABELS, special_tokens={"eos": 0})
    return folder


def test_a_run_with_several_labels(go: Train, tmp_path: Path):
    words = (f"data.dir={write_several(tmp_path / 'data')}", "train.global_tokens=64")
    unbroken = go("unbroken", *words, kind="labels")
    go("cut", *words, "train.steps=3", kind="labels")
    resumed = go("cut", *words, kind="labels")
    names = ("val_loss", "accuracy", "macro_f1", "micro_f1", "rows")
    assert [resumed[name] for name in names] == [unbroken[name] for name in names]
    assert unbroken["rows"] == 11
    assert unbroken["val_loss"] < 1.2 * math.log(2)  # of one label: yes or no
    scores = evaluate(tmp_path / "cut", [], "val", World())
    assert {name: scores[name] for name in names} == {name: resumed[name] for name in names}


def test_the_threshold_decides_what_is_told():
    """By hand: labels of two texts, told with probabilities of 0.6, 0.4 and 0.2."""
    tokens, labels = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 1]])
    batch = LabelBatch(tokens, torch.ones(2), tokens, labels, 6)

    class Says(torch.nn.Module):
        options = TransformerOptions()

        def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
            return torch.tensor([[0.6, 0.4, 0.2]] * 2).logit()

    for threshold, found in ((0.5, (0, 1 / 6)), (0.3, (0.5, 4 / 9)), (0.1, (0, 2 / 3))):
        task = Classification(ClassifyOptions(threshold=threshold))
        scores = task.scores(measure_of(task, Says(), batch).tolist())
        f1 = {0.5: [2 / 3, 0, 0], 0.3: [2 / 3, 2 / 3, 0], 0.1: [2 / 3, 2 / 3, 2 / 3]}[threshold]
        assert (scores["accuracy"], scores["macro_f1"]) == (found[0], pytest.approx(sum(f1) / 3))
        loss = -sum(map(math.log, (0.6, 0.4, 0.8, 0.4, 0.6, 0.2)))
        assert scores["val_loss"] == pytest.approx(loss / 6, rel=1e-6)
    smooth = loss_of(Classification(ClassifyOptions(label_smoothing=0.2)), Says(), batch)
    # yes is 0.9, no is 0.1
    chances = [(0.6, 0.9), (0.4, 0.9), (0.2, 0.1), (0.6, 0.1), (0.4, 0.1), (0.2, 0.9)]
    expected = -sum(y * math.log(p) + (1 - y) * math.log(1 - p) for p, y in chances)
    assert (smooth.total.item(), smooth.weight) == (pytest.approx(expected, rel=1e-6), 6)


# --- labels that weigh more ---------------------------------------------------------------------------------------


def test_balanced_labels_count_alike(tmp_path: Path):
    """The weights of the texts of each label add up to the same; those of all texts to their number."""
    rows = [([5], 0)] * 6 + [([6], 1)] * 3 + [([7], 2)]
    write_corpus(tmp_path, {"train": [labelled(rows)], "val": [labelled(rows)]}, kind="labels", label_names=LABELS)
    (batch,) = batches(open_corpora(DataOptions(dir=str(tmp_path))), ClassifyOptions(class_weights="balanced"))
    of_label = [batch.weights[batch.labels == label].sum().item() for label in range(3)]
    assert of_label == pytest.approx([10 / 3] * 3)


def test_balanced_labels_of_texts_with_several(tmp_path: Path):
    """Of each label that it has, a text counts as much as the texts without it together, shared by those with it."""
    rows = [([5], [0])] * 6 + [([6], [0, 1])] * 3 + [([7], [])]
    splits = {"train": [several(rows)], "val": [several(rows)]}
    write_corpus(tmp_path, splits, kind="labels", version=2, label_names=LABELS)
    (batch,) = batches(open_corpora(DataOptions(dir=str(tmp_path))), ClassifyOptions(class_weights="balanced"))
    has = batch.labels == 1
    assert (batch.weights[~has] == 1).all()
    assert [batch.weights[:, label][has[:, label]].sum().item() for label in range(3)] == pytest.approx([1, 7, 0])


def test_a_weight_multiplies_the_loss_of_its_label(tmp_path: Path):
    rows = [(text, number % 3) for number, text in enumerate(texts(9, 1))]
    write_corpus(tmp_path, {"train": [labelled(rows)], "val": [labelled(rows)]}, kind="labels", label_names=LABELS)
    corpora, weights = open_corpora(DataOptions(dir=str(tmp_path))), [2.0, 0.0, 0.5]
    plain, weighted = Classification(ClassifyOptions()), Classification(ClassifyOptions(class_weights=weights))
    model = plain.make_model(TransformerOptions(layers=1, width=16, heads=2, context=24), corpora.manifest)
    model.initialise(1)
    (batch,) = batches(corpora, ClassifyOptions(class_weights=weights))
    each = [loss_of(plain, model, part).total.item() for part in one_by_one(batch)]
    expected = sum(weights[label] * loss for label, loss in zip(batch.labels.tolist(), each, strict=True))
    loss = loss_of(weighted, model, batch)
    assert (loss.total.item(), loss.weight) == (pytest.approx(expected, rel=1e-5), 9)
    assert measure_of(weighted, model, batch)[0].item() == pytest.approx(sum(each), rel=1e-5)  # scores know no weights


def one_by_one(batch: LabelBatch) -> list[LabelBatch]:
    columns = (batch.tokens, batch.lengths, batch.types, batch.labels)
    return [LabelBatch(*(c[row : row + 1] for c in columns), 1) for row in range(len(batch.labels))]


def test_weights_for_other_labels_are_one_message(go: Train, shards: dict[str, Path], tmp_path: Path):
    with pytest.raises(HvdtrainError) as caught:
        go("run", "task.classify.class_weights=[1, 2]", kind="labels")
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (EXIT_USAGE, True)
    assert str(caught.value) == (
        f"ConfigError: task.classify.class_weights has 2 weights, but {shards['labels']} has 3 labels; give one for "
        "each of: bad, fair, good"
    )
    assert not (tmp_path / "run").exists()
    assert np.isfinite(go("run", "task.classify.class_weights=[1, 2, 0.5]", kind="labels")["val_loss"])
