"""The rank count never changes the training data: the same rows in the same order, and a fingerprint that proves it.

One rank to eight, one forward pass or several a step: windows, mixtures, packed rows, masked rows, pairs and labelled
texts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, documents, labelled, pairs, random_tokens, write_corpus

from hvdtrain.data.batch import IGNORE, AnyBatch, LabelBatch, MaskedBatch, PairBatch
from hvdtrain.data.bucketed import BucketSource, LabelledTexts, pair_batch
from hvdtrain.data.buckets import BucketSampler
from hvdtrain.data.corpora import Corpora
from hvdtrain.data.loader import Feed, Source, TrainLoader
from hvdtrain.data.masked import Frame, FramedDocuments, FramedWindows, MaskedSource
from hvdtrain.data.masking import Masking, MaskOptions
from hvdtrain.data.packed import PackedSource, document_lengths
from hvdtrain.data.packing import PackSampler
from hvdtrain.data.records import Records
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import MixedWindows, WindowSource

GLOBAL_BATCH, CONTEXT, STEPS = 840, 10, 3  # 840 rows: 1 to 8 ranks can share them
Make = Callable[[Feed], Source]


def texts(count: int, seed: int) -> list[list[int]]:
    lengths = np.random.default_rng(seed).integers(1, 15, count).tolist()
    return [random_tokens(length, seed=seed + number).tolist() for number, length in enumerate(lengths)]


def text_corpus(folder: Path, seed: int) -> tuple[Path, object]:
    shards = [documents(texts(200, seed)), documents(texts(100, seed + 1000))]
    return folder, write_corpus(folder, {"train": shards})


def windows(folder: Path) -> Make:
    stream = TokenStream([text_corpus(folder, 1)], "train")
    return lambda feed: WindowSource(stream, WindowSampler(len(stream), CONTEXT, feed.seed), feed)


def mixture(folder: Path) -> Make:
    stream = TokenStream([text_corpus(folder / "a", 1), text_corpus(folder / "b", 2)], "train")
    sizes = np.diff(stream.bases).tolist()

    def make(feed: Feed) -> Source:
        samplers = [WindowSampler(size, CONTEXT, feed.seed + number) for number, size in enumerate(sizes)]
        return WindowSource(stream, MixedWindows(samplers, stream.bases, [2, 1], feed.seed), feed)

    return make


def packed(folder: Path) -> Make:
    corpora = Corpora((text_corpus(folder, 3),), (1.0,))
    stream, lengths = TokenStream(corpora.entries, "train"), document_lengths(corpora)
    return lambda feed: PackedSource(stream, PackSampler(lengths, CONTEXT, feed.seed), feed, 0)


FRAME = Frame(CONTEXT, first=1, last=2, fill=3)
SPECIAL, CONTINUES = np.arange(50) < 5, np.arange(50) > 25


def masked_windows(folder: Path) -> Make:
    stream, masking = TokenStream([text_corpus(folder, 8)], "train"), Masking(MaskOptions(), 4, SPECIAL, None)

    def make(feed: Feed) -> Source:
        rows = FramedWindows(stream, WindowSampler(len(stream), FRAME.room, feed.seed), FRAME)
        return MaskedSource(stream, rows, masking, feed)

    return make


def masked_documents(folder: Path) -> Make:
    corpora = Corpora((text_corpus(folder, 9),), (1.0,))
    stream, lengths = TokenStream(corpora.entries, "train"), document_lengths(corpora)
    masking = Masking(MaskOptions(share=0.3, whole_words=True), 4, SPECIAL, CONTINUES)

    def make(feed: Feed) -> Source:
        rows = FramedDocuments(stream, PackSampler(lengths, FRAME.room, feed.seed), FRAME)
        return MaskedSource(stream, rows, masking, feed)

    return make


def bucketed_pairs(folder: Path) -> Make:
    rows = list(zip(texts(150, 4), texts(150, 5), strict=True))
    records = Records(folder, write_corpus(folder, {"train": [pairs(rows)]}, kind="pairs"), "train")

    def make(feed: Feed) -> Source:
        sampler = BucketSampler(records.lengths, 60, feed.seed, CONTEXT)
        return BucketSource(records, sampler, feed, lambda records, rows: pair_batch(records, rows, 1, CONTEXT))

    return make


def bucketed_labels(folder: Path) -> Make:
    rows = [(text, number % 3) for number, text in enumerate(texts(150, 6))]
    manifest = write_corpus(folder, {"train": [labelled(rows)]}, kind="labels", label_names=("a", "b", "c"))
    records = Records(folder, manifest, "train")

    def make(feed: Feed) -> Source:
        sampler = BucketSampler(records.lengths, 60, feed.seed, CONTEXT)
        return BucketSource(records, sampler, feed, LabelledTexts(CONTEXT, last=2))

    return make


SOURCES = {
    f.__name__: f for f in (windows, mixture, packed, masked_windows, masked_documents, bucketed_pairs, bucketed_labels)
}


@pytest.fixture(scope="module", params=SOURCES)
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return SOURCES[request.param](tmp_path_factory.mktemp("corpus"))


def rows_of(batch: AnyBatch) -> list[tuple]:
    """Each row that counts, without its padding, which depends on the rows beside it."""
    if isinstance(batch, LabelBatch):
        each = zip(batch.tokens.tolist(), batch.lengths.tolist(), batch.labels.tolist(), strict=True)
        return [(tuple(tokens[:length]), label) for tokens, length, label in each if label != IGNORE]
    if isinstance(batch, PairBatch):
        each = zip(batch.source.tolist(), batch.source_lengths.tolist(), batch.targets.tolist(), strict=True)
        rows = [(tuple(s[:length]), tuple(t for t in targets if t != IGNORE)) for s, length, targets in each]
        return [row for row in rows if row[1]]
    if isinstance(batch, MaskedBatch):
        targets = torch.full_like(batch.tokens, IGNORE).flatten().index_copy(0, batch.places, batch.targets)
        return torch.cat([batch.tokens, targets.view(batch.tokens.shape), batch.lengths[:, None]], dim=1).tolist()
    columns = [batch.tokens, batch.targets, batch.positions, batch.segments]
    return torch.cat([column for column in columns if column is not None], dim=1).tolist()


def consumed(make: Make, size: int, microbatch: int, first_row: int = 0) -> tuple[list[list], list[int], list[int]]:
    """Of each step: the rows of all ranks in order, the targets that count, and the sum of the fingerprints."""
    rows, targets, prints = [[] for _ in range(STEPS)], [0] * STEPS, [0] * STEPS
    for rank in range(size):
        source = make(Feed(CONTEXT, 7, GLOBAL_BATCH, microbatch, rank, size))
        for number, step in enumerate(source.block(first_row, STEPS, 0)):
            for batch in source.batches(step.content, CPU):
                rows[number] += rows_of(batch)
                targets[number] += batch.target_tokens
            prints[number] = (prints[number] + step.fingerprint) % (1 << 64)
    return rows, targets, prints


@pytest.mark.parametrize("first_row", [0, 1234])
def test_1_to_8_ranks_with_and_without_accumulation(make: Make, first_row: int):
    alone = consumed(make, 1, 0, first_row)
    assert len(set(alone[2])) == STEPS
    assert all(alone[1])
    for size in range(1, 9):
        rows = GLOBAL_BATCH // size
        passes = next(n for n in range(2, rows + 1) if rows % n == 0)
        for microbatch in (0, 1, rows // passes):
            assert consumed(make, size, microbatch, first_row) == alone, (size, microbatch)


def test_the_same_through_loaders(make: Make):
    """Threads and all: three ranks against one, and one that stops after the first step and goes on as two."""
    rows, _, prints = consumed(make, 1, 0)
    loaders = {
        (size, rank): TrainLoader(make(Feed(CONTEXT, 7, GLOBAL_BATCH, 0, rank, size)), CPU)
        for size in (1, 2, 3)
        for rank in range(size)
    }

    def step(size: int) -> list[tuple]:
        return [row for rank in range(size) for batch in loaders[size, rank].next_step() for row in rows_of(batch)]

    assert [step(3) for _ in range(STEPS)] == rows
    assert sum(loaders[3, rank].fingerprint for rank in range(3)) % (1 << 64) == sum(prints) % (1 << 64)
    assert step(1) == rows[0]
    for rank in range(2):
        loaders[2, rank].rows_consumed = loaders[1, 0].rows_consumed
    assert [step(2) for _ in range(STEPS - 1)] == rows[1:]
    total = loaders[1, 0].fingerprint + sum(loaders[2, rank].fingerprint for rank in range(2))
    assert total % (1 << 64) == sum(prints) % (1 << 64)
    for loader in loaders.values():
        loader.close()


@pytest.mark.parametrize("microbatch", [0, 56])
def test_the_same_where_shares_change_after_every_step(make: Make, microbatch: int):
    """With steps read ahead that are dropped: no row is lost, none comes twice."""
    rows, targets, prints = consumed(make, 1, 0)
    sources = [make(Feed(CONTEXT, 7, GLOBAL_BATCH, microbatch, rank, 3)) for rank in range(3)]
    if isinstance(sources[0], BucketSource):  # refused by the table of combinations
        with pytest.raises(NotImplementedError, match="different lengths"):
            sources[0].deal((1.0, 2.0, 3.0))
        return
    loaders, counts = [TrainLoader(source, CPU) for source in sources], []
    for number, speeds in enumerate(((1.0, 2.0, 3.0), (5.0, 1e-9, 1.0), (1.0, 1.0, 1.0))):
        steps = [loader.next_step() for loader in loaders]
        counts.append([sum(len(batch.tokens) for batch in step) for step in steps])
        assert max(len(batch.tokens) for step in steps for batch in step) <= (microbatch or GLOBAL_BATCH)
        assert [row for step in steps for batch in step for row in rows_of(batch)] == rows[number]
        assert sum(batch.target_tokens for step in steps for batch in step) == targets[number]
        for loader in loaders:
            loader.deal(speeds)
    assert counts == [[280, 280, 280], [140, 280, 420], [700, 1, 139]]
    assert sum(loader.fingerprint for loader in loaders) % (1 << 64) == sum(prints) % (1 << 64)
    for loader in loaders:
        loader.close()


def test_another_seed_is_another_order(make: Make):
    prints = {make(Feed(CONTEXT, seed, GLOBAL_BATCH)).block(0, 1, 0)[0].fingerprint for seed in range(5)}
    assert len(prints) == 5
