"""Batches of pairs and labelled texts: what stands where, padding that never counts, each row once for any ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, labelled, loss_of, measure_of, pairs, random_tokens, several, write_corpus

from hvdtrain.data.batch import IGNORE, AnyBatch, PairBatch
from hvdtrain.data.bucketed import BucketSource, LabelledTexts, eval_rows, pair_batch, types_of
from hvdtrain.data.buckets import BucketSampler
from hvdtrain.data.loader import Feed
from hvdtrain.data.records import Records
from hvdtrain.data.windows import Fingerprints
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.tasks.classify import Classification, ClassifyOptions
from hvdtrain.tasks.seq2seq import Seq2SeqOptions, SequenceToSequence

BEGIN, CONTEXT = 1, 24
SMALL = TransformerOptions(layers=2, heads=2, width=16, context=CONTEXT, ff_ratio=2.0)


def pair_records(folder: Path, rows: list) -> Records:
    cut = len(rows) // 2
    shards = [pairs(rows[:cut]), pairs([]), pairs(rows[cut:])]
    return Records(folder, write_corpus(folder, {"train": shards}, kind="pairs"), "train")


def label_records(folder: Path, rows: list) -> Records:
    manifest = write_corpus(folder, {"train": [labelled(rows)]}, kind="labels", label_names=("a", "b", "c"))
    return Records(folder, manifest, "train")


def random_rows(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    lengths = np.random.default_rng(seed).integers(1, 30, (count, 2)).tolist()
    return [
        (random_tokens(a, seed=2 * n + seed).tolist(), random_tokens(b, seed=2 * n + 1 + seed).tolist())
        for n, (a, b) in enumerate(lengths)
    ]


def make_pairs(records: Records, rows: np.ndarray) -> PairBatch:
    return pair_batch(records, rows, BEGIN, CONTEXT)


make_labels = LabelledTexts(CONTEXT, last=2)


def plain(batch: AnyBatch) -> dict[str, list]:
    return {name: getattr(batch, name).tolist() for name in vars(batch) if name != "target_tokens"}


# --- contents ----------------------------------------------------------------------------------------------------


def test_a_batch_of_pairs(tmp_path: Path):
    """The decoder is given ``begin`` and the target without its last token; what is too long is cut at the end."""
    records = pair_records(tmp_path, [([5, 6], [7]), ([8], [9, 10, 2]), ([20, 21, 22, 23, 24], [30, 31, 32, 33, 2])])
    batch = pair_batch(records, np.array([1, 0]), BEGIN, 4)
    assert plain(batch) == {
        "source": [[8, 0], [5, 6]],
        "source_lengths": [1, 2],
        "tokens": [[1, 9, 10], [1, 7, 0]],
        "targets": [[9, 10, 2], [7, IGNORE, IGNORE]],
    }
    assert batch.target_tokens == 4
    batch = pair_batch(records, np.array([2]), BEGIN, 4)
    assert plain(batch) == {
        "source": [[20, 21, 22, 23]],
        "source_lengths": [4],
        "tokens": [[1, 30, 31, 32]],
        "targets": [[30, 31, 32, 33]],
    }
    assert {values.dtype for values in vars(batch).values() if isinstance(values, torch.Tensor)} == {torch.int64}


def test_a_batch_of_labelled_texts(tmp_path: Path):
    records = label_records(tmp_path, [([5, 6], 2), ([7], 0), ([8, 9, 10, 11, 12], 1)])
    batch = LabelledTexts(4, last=10, weights=np.array([2, 3, 5], np.float32))(records, np.array([2, 1, 0]))
    assert plain(batch) == {
        "tokens": [[8, 9, 10, 11], [7, 0, 0, 0], [5, 6, 0, 0]],
        "lengths": [4, 1, 2],
        "types": [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        "labels": [1, 0, 2],
        "weights": [3.0, 2.0, 5.0],
    }
    assert batch.target_tokens == 3
    assert {values.dtype for values in (batch.tokens, batch.lengths, batch.types, batch.labels)} == {torch.int64}
    assert batch.weights.dtype == torch.float32
    assert LabelledTexts(4, last=10)(records, np.array([0])).weights is None


def test_a_batch_of_texts_with_several_labels(tmp_path: Path):
    """Each label of each text is a target; a weight is that of a label that the text has."""
    rows = [([5, 6], [2, 0]), ([7], []), ([8], [1])]
    manifest = write_corpus(tmp_path, {"train": [several(rows)]}, kind="labels", version=2, label_names=("a", "b", "c"))
    records = Records(tmp_path, manifest, "train")
    make = LabelledTexts(4, last=2, classes=3, weights=np.array([2, 3, 5], np.float32))
    batch = make(records, np.array([0, 1, 2]))
    assert batch.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert batch.weights.tolist() == [[2, 1, 5], [1, 1, 1], [1, 3, 1]]
    assert (batch.target_tokens, batch.labels.dtype, batch.weights.dtype) == (9, torch.int64, torch.float32)
    nobody = make(records, np.empty(0, np.int64))
    assert (nobody.labels.tolist(), nobody.target_tokens, nobody.weights) == ([[IGNORE] * 3], 0, None)
    prints = Fingerprints(4).content
    assert len({*batch.fingerprints(prints).tolist()}) == 3
    other = replace(batch, labels=batch.labels.roll(1, dims=1)).fingerprints(prints)
    assert (other == batch.fingerprints(prints)).tolist() == [False, True, False]


def test_the_second_of_two_texts_has_type_1():
    """The picture of ``types_of``; a text alone, one that ends twice, and one that is cut."""
    tokens = np.array([[1, 5, 6, 2, 7, 8, 2, 0], [1, 5, 2, 0, 0, 0, 0, 0], [1, 5, 2, 2, 7, 2, 2, 2], [5] * 8])
    assert types_of(tokens, np.array([7, 3, 7, 8]), 2).tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 0], [0] * 8, [0, 0, 0, 1, 1, 1, 1, 0], [0] * 8
    ]  # fmt: skip


def test_empty_texts(tmp_path: Path):
    """An empty target counts nothing; an empty source or text is a row like any other."""
    records = pair_records(tmp_path / "pairs", [([], [5]), ([6], [])])
    batch = make_pairs(records, np.array([0, 1]))
    assert (batch.source_lengths.tolist(), batch.targets.tolist(), batch.target_tokens) == ([0, 1], [[5], [IGNORE]], 1)
    batch = make_labels(label_records(tmp_path / "labels", [([], 1)]), np.array([0]))
    assert (batch.tokens.tolist(), batch.lengths.tolist(), batch.target_tokens) == ([[0]], [0], 1)


# --- padding never counts ----------------------------------------------------------------------------------------


def seq2seq() -> tuple[SequenceToSequence, Seq2Seq]:
    model = Seq2Seq(SMALL, 50)
    model.initialise(0)
    return SequenceToSequence(Seq2SeqOptions(label_smoothing=0.1)), model


def classifier() -> tuple[Classification, Classifier]:
    model = Classifier(SMALL, 50, 3)
    model.initialise(0)
    return Classification(ClassifyOptions()), model


def louder(model: torch.nn.Module) -> None:
    """Weights of the size that training gives them: at the start attention is nearly even, and would hide much."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)


def gradients(task, model, batches: list[AnyBatch]) -> tuple[float, int, torch.Tensor]:
    """Loss, weight and gradient, summed over the batches."""
    model.zero_grad()
    losses = [loss_of(task, model, batch) for batch in batches]
    for loss in losses:
        loss.total.backward()
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return sum(loss.total.item() for loss in losses), sum(loss.weight for loss in losses), flat


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_batch_is_the_sum_of_its_rows(tmp_path: Path, kind: str):
    """Alone a row has no padding: loss, weight and gradient of all together are those of each, summed."""
    rows = random_rows(7)
    if kind == "pairs":
        (task, model), records, make = seq2seq(), pair_records(tmp_path, rows), make_pairs
    else:
        labels = [(text, number % 3) for number, (text, _) in enumerate(rows)]
        (task, model), records, make = classifier(), label_records(tmp_path, labels), make_labels
    louder(model)
    together = make(records, np.arange(7))
    loss, weight, gradient = gradients(task, model, [together])
    alone = gradients(task, model, [make(records, np.array([row])) for row in range(7)])
    assert weight == alone[1] == (sum(min(len(target), CONTEXT) for _, target in rows) if kind == "pairs" else 7)
    # fp32: sums over more keys, some of weight 0, add in another order
    assert loss == pytest.approx(alone[0], rel=1e-5)
    assert torch.linalg.norm(gradient - alone[2]) <= 1e-5 * torch.linalg.norm(alone[2])


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_the_batch_of_a_rank_without_a_row_counts_nothing(tmp_path: Path, kind: str):
    """But it goes through the model, so that this rank takes part in the sums of all."""
    (task, model), make = (seq2seq(), make_pairs) if kind == "pairs" else (classifier(), make_labels)
    batch = make(None, np.empty(0, np.int64))
    loss, weight, gradient = gradients(task, model, [batch])
    assert (loss, weight, batch.target_tokens) == (0.0, 0, 0)
    assert not gradient.any()
    with torch.no_grad():
        assert not measure_of(task, model, batch).any()


# --- steps -------------------------------------------------------------------------------------------------------


def steps(records: Records, feed: Feed, make, count: int) -> list[tuple[list[AnyBatch], int]]:
    source = BucketSource(records, BucketSampler(records.lengths, feed.global_tokens, 5, CONTEXT), feed, make)
    assert (source.rows_per_step, source.read_through) == (1, [])
    found = [(source.batches(step.content, CPU), step.fingerprint) for step in source.block(0, count, 0)]
    assert source.rows_per_epoch <= count
    return found


def row_of(batch: PairBatch, row: int) -> tuple[list[int], list[int]]:
    """A pair as it was written."""
    target = batch.targets[row][batch.targets[row] != IGNORE]
    assert batch.tokens[row, : len(target)].tolist() == [BEGIN, *target[:-1].tolist()]
    return batch.source[row, : batch.source_lengths[row]].tolist(), target.tolist()


def test_an_epoch_is_each_pair_once_within_the_budget(tmp_path: Path):
    """Pairs with a side above the context are left out of training."""
    rows = random_rows(60)
    records = pair_records(tmp_path, rows)
    sampler = BucketSampler(records.lengths, 100, 5, CONTEXT)
    found = steps(records, Feed(CONTEXT, 5, 0, global_tokens=100), make_pairs, sampler.batches_per_epoch)
    seen = [row_of(batch, row) for (batch,), _ in found for row in range(len(batch.tokens))]
    assert sorted(seen) == sorted(row for row in rows if max(map(len, row)) <= CONTEXT)
    assert len(seen) < 60
    assert all(max(batch.tokens.numel(), batch.source.numel()) <= 100 for (batch,), _ in found)


def test_ranks_share_the_rows_of_a_batch(tmp_path: Path):
    """As evenly as can be; who gets none has one batch that counts nothing, and fingerprint 0."""
    records = pair_records(tmp_path, random_rows(20))
    sampler = BucketSampler(records.lengths, 50, 5, CONTEXT)
    count = sampler.batches_per_epoch
    ranks = [steps(records, Feed(CONTEXT, 5, 0, 2, rank, 5, 50), make_pairs, count) for rank in range(5)]
    for number in range(count):
        sizes = []
        for batches, fingerprint in (rank[number] for rank in ranks):
            size = sum(len(batch.tokens) for batch in batches if batch.target_tokens)
            assert (fingerprint == 0) == (size == 0)
            assert len(batches) == max(1, -(-size // 2))
            assert all(len(batch.tokens) <= 2 for batch in batches)
            sizes.append(size)
        assert sum(sizes) == len(sampler.batch(number))
        assert max(sizes) - min(sizes) <= 1
    assert any(rank[number][1] == 0 for rank in ranks for number in range(count))


def test_the_fingerprint_sees_a_swap_of_two_rows_of_a_batch(tmp_path: Path):
    records = pair_records(tmp_path, random_rows(20))

    class Backwards(BucketSampler):
        def batch(self, number: int) -> np.ndarray:
            return super().batch(number)[::-1]

    feed = Feed(CONTEXT, 5, 0, global_tokens=300)
    samplers = [kind(records.lengths, 300, 5, CONTEXT) for kind in (BucketSampler, Backwards)]
    prints = [BucketSource(records, sampler, feed, make_pairs).block(0, 1, 0)[0].fingerprint for sampler in samplers]
    assert len(samplers[0].batch(0)) > 1
    assert prints[0] != prints[1]


CHANGES = {
    "a token of the source": ([6], [7, 8]),
    "a token of the target": ([5], [7, 9]),
    "a 0 at the end of the source": ([5, 0], [7, 8]),
    "a 0 at the end of the target": ([5], [7, 8, 0]),
    "source and target swapped": ([7, 8], [5]),
}


def test_the_fingerprint_sees_every_token_of_pairs(tmp_path: Path):
    """A token 0 at the end of a source once looked like padding."""
    feed = Feed(CONTEXT, 5, 0, global_tokens=100)
    prints = [
        steps(pair_records(tmp_path / str(number), [([2, 3], [4]), row]), feed, make_pairs, 2)[0][1]
        for number, row in enumerate([([5], [7, 8]), *CHANGES.values()])
    ]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_sees_every_token_and_label_of_texts(tmp_path: Path):
    feed = Feed(CONTEXT, 5, 0, global_tokens=100)
    rows = [([5, 7], 1), ([5, 8], 1), ([5, 7], 2), ([5, 7, 0], 1), ([7, 5], 1)]
    prints = [
        steps(label_records(tmp_path / str(number), [([2, 3], 0), row]), feed, make_labels, 2)[0][1]
        for number, row in enumerate(rows)
    ]
    assert len(set(prints)) == len(prints)


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("rows_per_batch", [1, 4, 100])
def test_evaluation_is_each_row_once_for_any_ranks(tmp_path: Path, size: int, rows_per_batch: int):
    """More ranks than rows too; rows of like length stand together, and none is left out for its length."""
    rows = random_rows(31)
    records = pair_records(tmp_path, rows)
    batches = [batch for rank in range(size) for batch in eval_rows(records, rows_per_batch, rank, size, make_pairs)]
    found = [row_of(batch, row) for batch in batches for row in range(len(batch.tokens))]
    assert sorted(found) == sorted((source[:CONTEXT], target[:CONTEXT]) for source, target in rows)
    longest = [max(map(len, row)) for row in found]
    assert longest == sorted(longest)
    assert sum(batch.target_tokens for batch in batches) == sum(len(target) for _, target in found)
    assert all(1 <= len(batch.tokens) <= rows_per_batch for batch in batches)
