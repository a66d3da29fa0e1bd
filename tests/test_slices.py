"""Rectangles of tensors, against tensors of marks."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.slices import Rect, Slice, tile, whole_rect, whole_slice

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


def rects_in(shape: tuple[int, ...]) -> st.SearchStrategy[Rect]:
    sides = [
        st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(lambda s, n=n: (s[0], min(s[1], n - s[0])))
        for n in shape
    ]
    return st.tuples(*sides).map(lambda sides: Rect(tuple(a for a, _ in sides), tuple(n for _, n in sides)))


def marked(rect: Rect, shape: tuple[int, ...]) -> torch.Tensor:
    marks = torch.zeros(shape, dtype=torch.int64)
    marks[rect.index_in(whole_rect(shape))] = 1
    return marks


@given(st.data())
def test_what_two_rectangles_share(data: st.DataObject):
    shape = data.draw(SHAPES)
    one, other = data.draw(rects_in(shape)), data.draw(rects_in(shape))
    both = marked(one, shape) * marked(other, shape)
    common = one.common(other)
    assert (common is None) == (both.sum() == 0)
    if common is not None:
        assert torch.equal(marked(common, shape), both)
        assert both[one.index_in(whole_rect(shape))][common.index_in(one)].all()
    assert one.numel == marked(one, shape).sum()


@given(st.data())
def test_rectangles_that_tile_another(data: st.DataObject):
    shape = data.draw(SHAPES)
    rects = data.draw(st.lists(rects_in(shape), max_size=4))
    marks = sum((marked(rect, shape) for rect in rects), torch.zeros(shape, dtype=torch.int64))
    assert tile(rects, whole_rect(shape)) == bool((marks == 1).all())


@given(st.integers(0, 1 << 32), SHAPES)
def test_whatever_is_cut_tiles(seed: int, shape: tuple[int, ...]):
    """And does so no more when one of its pieces lies elsewhere."""
    chance = random.Random(seed)
    rects = cut(chance, whole_rect(shape))
    assert tile(rects, whole_rect(shape))
    if len(rects) > 1:
        first, second, *others = rects
        assert not tile([first, *others], whole_rect(shape))
        if first.shape == second.shape:
            assert not tile([first, first, *others], whole_rect(shape))


def cut(chance: random.Random, rect: Rect) -> list[Rect]:
    """At random places, again and again."""
    dims = [dim for dim, n in enumerate(rect.shape) if n > 1]
    if not dims or chance.random() < 0.3:
        return [rect]
    dim = chance.choice(dims)
    at = chance.randrange(1, rect.shape[dim])
    low = Rect(rect.offset, (*rect.shape[:dim], at, *rect.shape[dim + 1 :]))
    offset = (*rect.offset[:dim], rect.offset[dim] + at, *rect.offset[dim + 1 :])
    high = Rect(offset, (*rect.shape[:dim], rect.shape[dim] - at, *rect.shape[dim + 1 :]))
    return cut(chance, low) + cut(chance, high)


def test_the_picture():
    """A fused qkv on two ranks: three rectangles each, one after another in the piece."""
    whole = torch.arange(24.0).reshape(6, 4)
    for rank in (0, 1):
        places = tuple(Rect((row, 0), (1, 4)) for row in (rank, 2 + rank, 4 + rank))
        piece = Slice("qkv", whole[rank::2].clone(), whole.shape, places, LocalGroup())
        assert not piece.is_whole
        rectangles = piece.rectangles()
        assert [one.places for one in rectangles] == [(place,) for place in places]
        for one in rectangles:
            assert torch.equal(one.tensor, whole[one.places[0].index_in(whole_rect(whole.shape))])
            assert one.tensor.untyped_storage().data_ptr() == piece.tensor.untyped_storage().data_ptr()  # no copy


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_a_whole_one_is_its_own_rectangle(shape: tuple[int, ...]):
    piece = whole_slice("x", torch.zeros(shape), LocalGroup())
    assert piece.is_whole
    assert piece.rectangles() == [piece]
    assert piece.places == (whole_rect(shape),)
