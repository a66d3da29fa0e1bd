"""The cache against the model without it: unequal prompts, branches, dropped rows, growth."""

from itertools import pairwise

import pytest
import torch
from tiny import tiny_decoder

from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [9]]
SOURCES = [[2, 7, 1], [8, 2, 8, 1, 8], [2], [8, 4]]
KINDS = [
    {"positions": "learned"},
    {"positions": "rotary", "heads": 4, "kv_heads": 2},
    {"positions": "rotary", "window": 4},
    {"positions": "sinusoidal", "kv_heads": 1},
    {"positions": "relative", "window": 9, "heads": 4, "kv_heads": 2, "relative_buckets": 8, "relative_distance": 12},
]


def padded(rows: list[list[int]], by: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [by] * (longest - len(row)) for row in rows])


def lengths_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([len(row) for row in rows])


def decoder(**kind):
    model = tiny_decoder(**{"context": 64, "width": 32, **kind}).eval()
    return enlarged(model)


def enlarged(model):
    """Far from a uniform guess: what a token sees must show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def random_walk(model, cache, prompts: list[list[int]], alone, branches: int, steps: int) -> int:
    """Grow branches at random, reorder them, drop the second row midway; each must see its own text alone.

    alone(row, text): hidden states of that text without a cache. Returns how many slots the cache took in the end.
    """
    draw = torch.Generator().manual_seed(branches)
    rows = list(range(len(prompts)))
    hidden = model.decode(padded(prompts, by=7), cache)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(hidden[row, : len(prompt)], alone(row, prompt), **CLOSE)
    texts = [[prompt] for prompt in prompts]
    for step in range(steps):
        if step == steps // 2:
            kept = [n for n in range(len(rows)) if rows[n] != 1]
            cache.select(torch.tensor(kept))
            rows, texts = [rows[n] for n in kept], [texts[n] for n in kept]
        parents = torch.randint(len(texts[0]), (len(rows), branches), generator=draw)
        tokens = torch.randint(50, (len(rows), branches), generator=draw)
        cache.branch(parents)
        texts = [
            [texts[n][p] + [t] for p, t in zip(parents[n].tolist(), tokens[n].tolist(), strict=True)]
            for n in range(len(rows))
        ]
        hidden = model.decode(tokens, cache)
        for n, row in enumerate(rows):
            for branch, text in enumerate(texts[n]):
                torch.testing.assert_close(hidden[n, branch], alone(row, text)[-1], **CLOSE)
    return cache.length


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=["learned", "rotary-shared", "window", "sinusoidal", "relative"])
@pytest.mark.parametrize("branches", [1, 3])
def test_branches_of_unequal_prompts_see_their_own_text(kind: dict, branches: int):
    model = decoder(**kind)
    cache = model.new_cache(lengths_of(PROMPTS))
    slots = random_walk(model, cache, PROMPTS, lambda _, text: model(torch.tensor([text]))[0], branches, 40)
    assert slots < 7 + 40 * branches or branches == 1  # dead branches were dropped on the way


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_branches_share_the_memory_of_their_source(positions: str):
    sizes = {"layers": 2, "heads": 2, "width": 32, "context": 64, "positions": positions}
    model = Seq2Seq(TransformerOptions(**sizes), 50).eval()
    model.initialise(0)
    enlarged(model)
    cache = model.new_cache(lengths_of(PROMPTS))
    model.read(padded(SOURCES, by=7), lengths_of(SOURCES), cache)

    def alone(row: int, text: list[int]) -> torch.Tensor:
        return model(torch.tensor([SOURCES[row]]), lengths_of(SOURCES[row : row + 1]), torch.tensor([text]))[0]

    random_walk(model, cache, PROMPTS, alone, 3, 12)
    assert cache.memory.shape[2] == 3  # one for each row that is left, not for each branch


@torch.no_grad()
def test_equal_prompts_and_one_branch_need_no_mask():
    """Attention without a mask is the faster one."""
    cache = decoder(window=6).new_cache()
    assert cache.place(2, 4) == (None, None)
    masks = [cache.place(2, 1)[1] for _ in range(4)]
    assert [mask is None for mask in masks] == [True, True, False, False]
    assert masks[3].sum(-1).tolist() == [[[6]], [[6]]]


@torch.no_grad()
def test_room_is_made_rarely_and_a_window_bounds_it():
    """What no branch sees is dropped before room is added: with a window of 5 it never is."""
    cache = decoder(window=5).new_cache()
    cache.place(1, 3)
    places = []
    for _ in range(500):
        cache.place(1, 1)
        places.append(cache._keys_values.data_ptr())
    moves = sum(a != b for a, b in pairwise(places))
    assert (cache._keys_values.shape[3], moves <= 500 // 60) == (67, True)


@torch.no_grad()
def test_room_grows_in_proportion():
    cache = decoder().new_cache()
    cache.place(1, 3)
    rooms = [cache.place(1, 1) and cache._keys_values.shape[3] for _ in range(2000)]
    assert len(set(rooms)) <= 11  # by half each time
    assert rooms[-1] < 1.6 * 2003


def test_every_branch_brings_a_token():
    cache = decoder().new_cache()
    cache.place(2, 3)
    cache.branch(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(AssertionError, match="one token for each branch"):
        cache.place(2, 3)
