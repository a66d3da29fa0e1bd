"""Packed rows: the picture at the top of packed.py, each token a target once, and to a model as if each were alone."""

import tempfile
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, documents, loss_of, rewrite, seal, tiny_decoder, write_corpus

from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.data.corpora import Corpora
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.packed import PackedSource, document_lengths
from hvdtrain.data.packing import PackSampler
from hvdtrain.data.stream import TokenStream
from hvdtrain.models.decoder import Decoder
from hvdtrain.tasks.lm import LanguageModel

VOCAB = 5000
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(any)


def corpora_of(folder: Path, *shards: list[list[int]], vocab_size: int = VOCAB) -> Corpora:
    manifest = write_corpus(folder, {"train": [documents(texts, vocab_size) for texts in shards]}, vocab_size)
    return Corpora(((folder, manifest),), (1.0,))


def source_of(corpora: Corpora, context: int, rows: int = 0, end: int = VOCAB - 1, **feed) -> PackedSource:
    """``rows`` a step; 0: a whole epoch."""
    stream = TokenStream(corpora.entries, "train")
    sampler = PackSampler(document_lengths(corpora), context, seed=3)
    return PackedSource(stream, sampler, Feed(context, 3, rows or sampler.rows_per_epoch, **feed), end)


def epoch_of(corpora: Corpora, context: int, **feed) -> Batch:
    source = source_of(corpora, context, **feed)
    (step,) = source.block(0, 1, 0)
    (batch,) = source.batches(step.content, CPU)
    return batch


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths in which each token is its own place in the line."""
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def split_at(texts: list[list[int]], shards: int) -> list[list[list[int]]]:
    cuts = [len(texts) * n // shards for n in range(shards + 1)]
    return [texts[a:b] for a, b in pairwise(cuts)]


def test_the_picture(tmp_path: Path):
    alphabet = "#abcdefghijklm"
    texts = [[alphabet.index(letter) for letter in text] for text in ("abcd#", "ef#", "ghijklm#")]
    batch = epoch_of(corpora_of(tmp_path, texts), context=10, end=0)
    at = batch.tokens[:, 1].tolist().index(1)  # the rows come in an order drawn by the seed
    row, other = batch.tokens[at].tolist(), batch.tokens[1 - at].tolist()
    assert "".join(alphabet[token] for token in row[:8]) == "#abcd#ef"
    assert "".join(alphabet[token] for token in batch.targets[at, :8].tolist()) == "abcd#ef#"
    assert batch.targets[at, 8:].tolist() == [IGNORE, IGNORE]
    assert batch.positions[at].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    assert batch.segments[at].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, -1, -1]
    assert "".join(alphabet[token] for token in other[:8]) == "#ghijklm"
    assert batch.target_tokens == 16
    assert {values.dtype for values in (batch.tokens, batch.targets, batch.positions, batch.segments)} == {torch.int64}


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 4))
def test_each_token_is_a_target_once_an_epoch(lengths: list[int], context: int, shards: int):
    """Documents longer than a row, empty ones, several shards; input, position and segment of each are right."""
    texts = numbered(lengths)
    starts = np.cumsum(lengths) - lengths
    with tempfile.TemporaryDirectory() as name:
        batch = epoch_of(corpora_of(Path(name), *split_at(texts, shards)), context)
    counted = batch.targets != IGNORE
    assert sorted(batch.targets[counted].tolist()) == list(range(sum(lengths)))
    assert batch.target_tokens == sum(lengths)
    assert torch.equal(batch.tokens[counted], (batch.targets[counted] - 1) % VOCAB)  # before the first: VOCAB - 1
    for tokens, targets, positions, segments in zip(
        *(v.tolist() for v in (batch.tokens, batch.targets, batch.positions, batch.segments)), strict=True
    ):
        filled = context - targets.count(IGNORE)
        assert (tokens[filled:], targets[filled:]) == ([0] * (context - filled), [IGNORE] * (context - filled))
        assert (positions[filled:], segments[filled:]) == ([0] * (context - filled), [-1] * (context - filled))
        place = segment = 0
        while place < filled:  # piece by piece: a whole document, or a part that begins a multiple of the context in
            first = targets[place]
            document = int(np.searchsorted(np.cumsum(lengths), first, side="right"))
            offset = first - int(starts[document])
            length = min(context, lengths[document] - offset)
            assert offset % context == 0
            assert targets[place : place + length] == list(range(first, first + length))
            assert positions[place : place + length] == list(range(length))
            assert segments[place : place + length] == [segment] * length
            place, segment = place + length, segment + 1
        assert place == filled


def test_the_first_document_follows_an_end_of_text(tmp_path: Path):
    """Wherever it lies: also where the first shard is empty."""
    batch = epoch_of(corpora_of(tmp_path, [], [[], [5, 6, 7]]), context=4, end=9)
    assert batch.tokens.tolist() == [[9, 5, 6, 0]]
    assert batch.targets.tolist() == [[5, 6, 7, IGNORE]]


def test_a_document_longer_than_a_row(tmp_path: Path):
    """Its parts are told what stood before them, as the text has it, and begin at position 0."""
    batch = epoch_of(corpora_of(tmp_path, [list(range(10, 19))]), context=4, end=0)
    rows = sorted(zip(batch.tokens.tolist(), batch.targets.tolist(), batch.positions.tolist(), strict=True))
    assert rows == [
        ([0, 10, 11, 12], [10, 11, 12, 13], [0, 1, 2, 3]),
        ([13, 14, 15, 16], [14, 15, 16, 17], [0, 1, 2, 3]),
        ([17, 0, 0, 0], [18, IGNORE, IGNORE, IGNORE], [0, 0, 0, 0]),
    ]


def test_document_lengths_in_the_order_of_the_stream(tmp_path: Path):
    """Also of several folders, and read through HDF5."""
    texts = numbered([3, 0, 5, 2, 7])
    a, b = corpora_of(tmp_path / "a", texts[:2], [], texts[2:4]), corpora_of(tmp_path / "b", texts[4:])
    both = Corpora((*a.entries, *b.entries), (1.0, 1.0))
    assert document_lengths(both).tolist() == [3, 0, 5, 2, 7]
    rewrite(tmp_path / "a/train-00002.h5", chunk=1)
    again = Corpora(((tmp_path / "a", seal(tmp_path / "a")),), (1.0,))
    assert document_lengths(again).tolist() == [3, 0, 5, 2]
    rewrite(tmp_path / "a/train-00000.h5", chunk=2)
    again = Corpora(((tmp_path / "a", seal(tmp_path / "a")),), (1.0,))
    assert source_of(again, 4).read_through == [tmp_path / "a/train-00000.h5"]


def test_steps_and_microbatches_are_cuts_of_the_epoch(tmp_path: Path):
    """And go on into the next epoch, which has the rows in another order."""
    corpora = corpora_of(tmp_path, numbered([3, 9, 4, 1, 1, 7, 20, 2, 5, 5, 8]))
    whole = epoch_of(corpora, 8)
    rows = len(whole.tokens)
    source = source_of(corpora, 8, rows=4, microbatch=2)
    with closing(TrainLoader(source, CPU)) as loader:
        steps = [loader.next_step() for _ in range(-(-2 * rows // 4))]
    assert {batch.tokens.shape for step in steps for batch in step} == {(2, 8)}
    for name in ("tokens", "targets", "positions", "segments"):
        together = torch.cat([getattr(batch, name) for step in steps for batch in step])
        assert torch.equal(together[:rows], getattr(whole, name))
    assert sorted(together.tolist()) != together.tolist()
    assert sum(batch.target_tokens for step in steps for batch in step) == sum(
        int((batch.targets != IGNORE).sum()) for step in steps for batch in step
    )
    assert loader.epoch == 4 * len(steps) // rows


def fingerprint(corpora: Corpora, context: int) -> int:
    (step,) = source_of(corpora, context).block(0, 1, 0)
    return step.fingerprint


def test_the_fingerprint_sees_tokens_and_where_documents_begin(tmp_path: Path):
    """The last case once went unseen: a token lowered by as much as its position was raised."""
    cases = [[[9, 9, 9], [9]], [[9, 9, 9], [8]], [[9, 9, 8], [9]], [[9, 9, 9, 9]], [[9, 9, 9, 6]]]
    prints = [fingerprint(corpora_of(tmp_path / str(n), texts), 4) for n, texts in enumerate(cases)]
    assert len(set(prints)) == len(prints)


# --- to a model --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["learned", "rotary"])
def model(request: pytest.FixtureRequest) -> Decoder:
    # Weights of the size that training gives them: at the start attention is nearly even, and would hide much.
    model = tiny_decoder(positions=request.param, context=12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


@torch.no_grad()
def test_the_loss_is_that_of_the_documents_one_by_one(model: Decoder, tmp_path: Path):
    """Summed over an epoch, as the task has it; a document longer than the context is two to the model."""
    random = np.random.default_rng(0)
    texts = [[*random.integers(1, 50, length).tolist(), 0] for length in (3, 11, 6, 1, 1, 4, 17, 0, 8)]
    batch = epoch_of(corpora_of(tmp_path, texts[:5], texts[5:], vocab_size=50), 12, end=0)
    assert (batch.segments.amax(dim=1) > 0).any()
    loss = loss_of(LanguageModel(None), model, batch)

    total, weight = 0.0, 0
    for text in texts:
        inputs = [0, *text[:-1]]
        for start in range(0, len(text), 12):
            x, y = torch.tensor([inputs[start : start + 12]]), torch.tensor(text[start : start + 12])
            total += F.cross_entropy(model.logits(model(x))[0], y, reduction="sum").double()
            weight += len(y)
    assert loss.weight == weight
    # fp32: attention over 12 keys with a mask and over a few without one add in another order
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=0)
    plain = loss_of(LanguageModel(None), model, Batch(batch.tokens, batch.targets, weight))
    assert abs(plain.total - loss.total) > 1e-4 * loss.total  # ten times that: positions and segments matter
