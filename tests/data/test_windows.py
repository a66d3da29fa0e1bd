"""Windows of several corpora mixed by weight, page-locked buffers, and how fingerprints are made."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, random_tokens, stream_of, write_data

from hvdtrain.data.loader import BUFFERS, Feed, TrainLoader
from hvdtrain.data.mixture import BLOCK
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import Fingerprints, MixedWindows, WindowSource

CONTEXT = 6
SIZES, WEIGHTS = (400, 100, 1000), (0.5, 0.3, 0.2)


def mixed(seed: int = 1) -> MixedWindows:
    samplers = [WindowSampler(size, CONTEXT, seed + number) for number, size in enumerate(SIZES)]
    return MixedWindows(samplers, [0, *np.cumsum(SIZES)], WEIGHTS, seed)


# --- mixtures ----------------------------------------------------------------------------------------------------


def test_each_row_lies_in_one_corpus_and_the_shares_are_kept():
    """In each 4,096 rows exactly the mixture's quota of each corpus; no window runs over a corpus's end."""
    mixture = mixed()
    ends = np.cumsum(SIZES)
    for block in (0, 1, 7):
        starts = mixture.starts_of(np.arange(block * BLOCK, (block + 1) * BLOCK))
        corpus = np.searchsorted(ends, starts, side="right")
        assert np.array_equal(corpus, np.searchsorted(ends, starts + CONTEXT, side="right"))
        assert np.array_equal(np.bincount(corpus), mixture.mixture.rows_per_block)
        assert np.bincount(corpus) / BLOCK == pytest.approx(WEIGHTS, abs=1 / BLOCK)


def test_each_corpus_has_its_own_epochs():
    """Its rows, taken out of the mixture, are those that it would give alone, in that order: none left out."""
    mixture = mixed()
    starts = mixture.starts_of(np.arange(3 * BLOCK))
    corpus = np.searchsorted(np.cumsum(SIZES), starts, side="right")
    for number, size in enumerate(SIZES):
        alone = WindowSampler(size, CONTEXT, 1 + number)
        own = starts[corpus == number] - [0, *np.cumsum(SIZES)][number]
        assert len(own) > 5 * alone.rows_per_epoch
        assert np.array_equal(own, alone.starts(0, len(own)))
    assert mixture.rows_per_epoch == sum(WindowSampler(size, CONTEXT, 0).rows_per_epoch for size in SIZES)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=50, unique=True).map(sorted))
def test_rows_do_not_depend_on_what_else_is_asked_for(rows: list[int]):
    """A rank asks for its part of many steps: rows with gaps, over several blocks."""
    assert np.array_equal(mixed().starts_of(np.array(rows)), mixed().starts_of(np.arange(3 * BLOCK + 1))[rows])


def test_a_mixture_of_one_is_the_corpus():
    alone = WindowSampler(400, CONTEXT, 9)
    rows = np.arange(2 * BLOCK)
    assert np.array_equal(MixedWindows([alone], [0], [3.0], 1).starts_of(rows), alone.starts_of(rows))


def test_from_folders_to_batches(tmp_path: Path):
    """Tokens below 25 are of the first folder, the others of the second: no window holds both, and 3 to 1 are given."""
    a = write_data(tmp_path / "a", train=[random_tokens(60, 25), random_tokens(41, 25)])
    b = write_data(tmp_path / "b", train=[random_tokens(300, 25) + 25])
    stream = TokenStream([(tmp_path / "a", a), (tmp_path / "b", b)], "train")
    samplers = [WindowSampler(101, CONTEXT, 1), WindowSampler(300, CONTEXT, 2)]
    source = WindowSource(stream, MixedWindows(samplers, stream.bases, [3, 1], 5), Feed(CONTEXT, 5, 32))
    rows = []
    with closing(TrainLoader(source, CPU)) as loader:
        for _ in range(BLOCK // 32):
            (batch,) = loader.next_step()
            whole = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
            is_a = (whole < 25).all(dim=1)
            assert (is_a | (whole >= 25).all(dim=1)).all()
            rows += is_a.tolist()
    assert sum(rows) == BLOCK * 3 // 4


# --- blocks and buffers ------------------------------------------------------------------------------------------


def test_a_block_is_about_a_million_tokens_and_no_more_than_an_epoch(tmp_path: Path):
    """Of a short text, a million tokens are thousands of epochs: the first step took 0.2 s, all but one in vain."""

    class Long:
        context, rows_per_epoch = 255, 10**9

    stream = stream_of(tmp_path, range(40))
    assert WindowSource(stream, Long(), Feed(255, 1, 64, rank=1, size=4)).steps_per_block == 2**20 // (16 * 256)
    assert WindowSource(stream, Long(), Feed(255, 1, 2**14)).steps_per_block == 1
    short = WindowSampler(400, 8, 1)
    assert WindowSource(stream, short, Feed(8, 1, 4)).steps_per_block == short.rows_per_epoch // 4 == 12
    assert WindowSource(stream, short, Feed(8, 1, 64)).steps_per_block == 1


@pytest.mark.parametrize(("vocab_size", "steps_per_block"), [(50, 1), (65_536, 1), (65_536, 3), (4_000_000_000, 2)])
def test_page_locked_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, steps_per_block: int):
    """As for a GPU, but in plain memory: ids of all 16 or 32 bits survive the way as signed numbers, BUFFERS buffers
    are used in turn, and a block still waits whole when two more have been made.
    """
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, pin_memory: plain(tensor))
    monkeypatch.setattr("tiny.write_tokenizer", lambda path, size: path.write_text("{}"))  # it would be very long
    tokens = random_tokens(500, vocab_size)
    tokens[:3] = vocab_size - 1, vocab_size // 2, 0
    sampler = WindowSampler(500, CONTEXT, 3)
    source = WindowSource(stream_of(tmp_path, tokens, vocab_size), sampler, Feed(CONTEXT, 3, 8, 4, pin=True))
    source.steps_per_block = steps_per_block
    for number in range(BUFFERS):  # as the loader begins: with smaller blocks
        source.block(0, 1, number)
    waiting = {}
    for number in range(9):
        waiting[number] = source.block(number * steps_per_block * 8, steps_per_block, number)
        if (oldest := number - BUFFERS + 1) < 0:
            continue
        for step, made in enumerate(waiting.pop(oldest)):
            assert made.content.dtype == (torch.int16 if vocab_size <= 65_536 else torch.int32)
            batches = source.batches(made.content, CPU)
            starts = sampler.starts((oldest * steps_per_block + step) * 8, 8)
            assert [batch.tokens.shape for batch in batches] == [(4, CONTEXT)] * 2
            found = torch.cat([torch.cat([b.tokens, b.targets[:, -1:]], dim=1) for b in batches])
            assert found.tolist() == [tokens[start : start + CONTEXT + 1].tolist() for start in starts]
    assert len(source._pinned) == BUFFERS


# --- fingerprints ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 20), st.sampled_from([np.uint16, np.uint32, np.int64]), st.data())
def test_a_row_has_a_number_of_its_own(width: int, dtype: type, data: st.DataObject):
    """It changes with any token and any turn; and zeros at the end, as padding has, change nothing."""
    rows = np.random.default_rng(width).integers(0, 60_000, (3, width)).astype(dtype)
    turns = np.array([5, 6, 7])
    prints = Fingerprints(30)
    known = prints.of_rows(rows, turns)
    assert known.dtype == np.uint64
    row, place = data.draw(st.integers(0, 2)), data.draw(st.integers(0, width - 1))
    changed = rows.copy()
    changed[row, place] += data.draw(st.integers(1, 5000))
    assert (prints.of_rows(changed, turns) != known).tolist() == [number == row for number in range(3)]
    assert (prints.of_rows(rows, turns + np.array([0, 1, 0])) != known).tolist() == [False, True, False]
    assert not set(prints.of_rows(rows, turns[::-1])) & set(known[[0, 2]])
    if dtype is np.int64:  # the only one that is padded
        padded = np.concatenate([rows, np.zeros((3, 30 - width), dtype)], axis=1)
        assert np.array_equal(prints.of_rows(padded, turns), known)
