"""Which tokens of a row are hidden, and what stands there: shares, whole words, and that the key alone decides."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import write_data

from hvdtrain.data.batch import IGNORE
from hvdtrain.data.masking import Masking, MaskOptions, special_tokens
from hvdtrain.data.sampler import derive_each

VOCAB, CLS, SEP, MASK, PAD = 40, 0, 1, 2, 3
SPECIAL = np.arange(VOCAB) < 5
CONTINUES = np.arange(VOCAB) >= 25  # where whole words are drawn


def masking(**options) -> Masking:
    whole_words = options.get("whole_words", False)
    return Masking(MaskOptions(**options), MASK, SPECIAL, CONTINUES if whole_words else None)


def keys(count: int, seed: int = 1) -> np.ndarray:
    return derive_each(seed, np.arange(count))


def text(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Rows of [CLS] text [SEP]."""
    tokens = np.random.default_rng(seed).integers(5, VOCAB, (rows, length + 2))
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    return tokens


def words_of(row: np.ndarray) -> list[list[int]]:
    """The places of each word, by the rule as it is told: a token that continues goes with the one before it."""
    words: list[list[int]] = []
    for place, token in enumerate(row.tolist()):
        if SPECIAL[token]:
            continue
        if CONTINUES[token] and words and words[-1][-1] == place - 1:
            words[-1].append(place)
        else:
            words.append([place])
    return words


# --- which --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.01, 0.15, 0.5, 1.0]), st.integers(0, 99))
def test_the_share_of_a_row_is_drawn(length: int, share: float, seed: int):
    tokens = text(5, length, seed)
    seen, targets = masking(share=share)(tokens, keys(5, seed))
    drawn = targets != IGNORE
    assert drawn.sum(axis=1).tolist() == [max(1, round(share * length))] * 5
    assert np.array_equal(targets[drawn], tokens[drawn])
    assert np.array_equal(seen[~drawn], tokens[~drawn])
    assert not SPECIAL[tokens[drawn]].any()


def test_each_token_is_as_likely_as_the_others():
    """4,000 rows of 20: 3 of each are drawn. The counts of a place are binomial; five deviations are allowed."""
    _, targets = masking()(text(4000, 20), keys(4000))
    counts = (targets != IGNORE).sum(axis=0)[1:-1]
    assert np.abs(counts - 600).max() < 5 * np.sqrt(4000 * 0.15 * 0.85)
    _, others = masking()(text(4000, 20), keys(4000, seed=2))
    both = ((targets != IGNORE) & (others != IGNORE)).sum()  # another key draws others: chance alone is left
    assert abs(both - 12000 * 0.15) < 5 * np.sqrt(12000 * 0.15 * 0.85)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0.05, 0.15, 0.5]), st.integers(0, 99))
def test_whole_words_are_drawn_until_the_share_is_reached(length: int, share: float, seed: int):
    tokens = text(4, length, seed)
    tokens[:, length // 2] = SEP  # no word goes on behind a special token
    tokens[:, 0] = CLS
    _, targets = masking(share=share, whole_words=True)(tokens, keys(4, seed))
    for row, target in zip(tokens, targets, strict=True):
        drawn = {place for place, token in enumerate(target.tolist()) if token != IGNORE}
        words = words_of(row)
        free = sum(map(len, words))
        whole = [word for word in words if drawn & {*word}]
        assert drawn == {place for word in whole for place in word}
        enough = min(free, max(1, round(share * free)))
        assert len(drawn) >= enough
        assert not whole or len(drawn) - max(map(len, whole)) < enough


def test_the_picture():
    names = ["[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "weather", "today"]
    special, continues = (np.array([name.startswith(mark) for name in names]) for mark in ("[", "##"))
    tokens = np.array([[0, 3, 4, 5, 6, 7, 1]])
    whole = Masking(MaskOptions(share=0.2, whole_words=True, masked=1, random=0), 2, special, continues)
    told = {tuple(np.flatnonzero(whole(tokens, keys(1, seed))[1][0] != IGNORE).tolist()) for seed in range(30)}
    assert told == {(1, 2, 3), (4,), (5,)}


def test_a_row_without_a_token_that_may_be_drawn():
    tokens = np.full((2, 4), PAD)
    tokens[1, 2] = 30
    seen, targets = masking(whole_words=True)(tokens, keys(2))
    assert np.array_equal(targets, [[IGNORE] * 4, [IGNORE, IGNORE, 30, IGNORE]])
    assert np.array_equal(seen[0], tokens[0])


# --- what stands there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("masked", "random"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.25)])
def test_most_are_hidden_and_some_become_another(masked: float, random: float):
    """24,000 drawn tokens of 35 kinds; five deviations are allowed."""
    tokens = text(4000, 40)
    seen, targets = masking(masked=masked, random=random)(tokens, keys(4000))
    drawn = targets != IGNORE
    seen, tokens = seen[drawn], tokens[drawn]
    hidden = (seen == MASK).mean()
    kept = (seen == tokens).mean()
    near = 5 * 0.5 / np.sqrt(len(seen))
    assert hidden == pytest.approx(masked, abs=near)
    assert kept == pytest.approx(1 - masked - random + random / 35, abs=near)
    assert not SPECIAL[seen[seen != MASK]].any()
    others = seen[(seen != MASK) & (seen != tokens)]
    assert not len(others) or {*others.tolist()} == {*range(5, VOCAB)}


# --- by the key alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_rows_masks_are_those_of_its_key(whole_words: bool):
    """Whatever rows are beside it, and however wide they are padded."""
    mask, tokens, own = masking(whole_words=whole_words), text(12, 20), keys(12)
    together = mask(tokens, own)
    for row in (0, 7, 11):
        alone = mask(tokens[row : row + 1], own[row : row + 1])
        assert [part[row].tolist() for part in together] == [part[0].tolist() for part in alone]
    wider = mask(np.pad(tokens, ((0, 0), (0, 9)), constant_values=PAD), own)
    assert all(np.array_equal(wide[:, :22], part) for wide, part in zip(wider, together, strict=True))
    assert not np.array_equal(together[1], mask(tokens, keys(12, seed=2))[1])


def test_masks_stay_as_they_are():
    """A run of yesterday goes on today: a change here is a change of every run's data."""
    seen, targets = masking(share=0.3)(np.arange(5, 25)[None], keys(1))
    assert np.flatnonzero(targets[0] != IGNORE).tolist() == [1, 3, 4, 9, 12, 13]
    assert seen[0].tolist() == [5, 2, 7, 2, 2, 10, 11, 12, 13, 27, 15, 16, 2, 35, *range(19, 25)]


# --- what is special ----------------------------------------------------------------------------------------------


def test_special_tokens_are_those_with_a_role_a_mark_or_no_name(tmp_path: Path):
    manifest = write_data(tmp_path, vocab_size=12, train=[[1, 2]])
    vocab = {f"t{number}": number for number in range(8)}
    added = [
        {"id": 1, "content": "t1", "special": True},
        {"id": 9, "content": "def", "special": False},
        {"id": 10, "content": "[X]", "special": True},
    ]
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
    manifest.special_tokens["eos"] = 0
    assert np.flatnonzero(special_tokens(path, manifest)).tolist() == [0, 1, 8, 10, 11]
    path.write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    assert np.flatnonzero(special_tokens(path, manifest)).tolist() == [0, *range(2, 12)]


def test_shares_that_do_not_add_up():
    told = "masked=0.9 and random=0.2 add up to 1.1; they are shares of the same tokens, at most 1 together"
    with pytest.raises(ValidationError, match=told):
        MaskOptions(masked=0.9, random=0.2)
    assert MaskOptions(masked=0.9, random=0.1).random == 0.1
