"""Pieces over stages: the slowest stage is as fast as it can be."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_decoder

from hvdtrain.cut.stages import balance, count_costs, divide
from hvdtrain.errors import ConfigError
from hvdtrain.models.frozen import freeze
from hvdtrain.tasks.lm import LanguageModel


def slowest(costs: list[int], stages: list[range]) -> int:
    return max(sum(costs[piece] for piece in stage) for stage in stages)


def best_of_all(costs: list[int], stages: int) -> int:
    """By trying every way."""
    ways = combinations(range(1, len(costs)), stages - 1)
    return min(
        slowest(costs, [range(a, b) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True)]) for cuts in ways
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5))
def test_no_other_division_has_a_faster_slowest_stage(costs, stages):
    if stages > sum(cost > 0 for cost in costs):
        return
    found = divide(costs, stages)
    assert slowest(costs, found) == best_of_all(costs, stages)
    assert [piece for stage in found for piece in stage] == list(range(len(costs))), "each piece once, in order"
    assert len(found) == stages
    assert all(any(costs[piece] for piece in stage) for stage in found), "a stage has nothing to do"


@given(st.lists(st.floats(0.001, 1), min_size=6, max_size=40))
def test_measured_costs_are_divided_like_counted_ones(costs):
    assert len(divide(costs, 6)) == 6
    assert slowest(costs, divide(costs, 6)) <= slowest(costs, divide(costs, 5))


@given(st.lists(st.integers(0, 9), min_size=4, max_size=12), st.sampled_from([(2, 2), (3, 2), (2, 3)]))
def test_ranks_with_several_stages_are_alike_and_no_stage_is_dearer_for_it(costs, shape):
    ranks, stages = shape[0], shape[0] * shape[1]
    if stages > sum(cost > 0 for cost in costs):
        return
    found, plain = divide(costs, *shape), divide(costs, stages)
    assert [piece for stage in found for piece in stage] == list(range(len(costs))), "each piece once, in order"
    assert len(found) == stages
    assert slowest(costs, found) == slowest(costs, plain)
    assert all(any(costs[piece] for piece in stage) for stage in found), "a stage has nothing to do"

    def of_ranks(stages):
        return max(sum(costs[piece] for stage in stages[rank::ranks] for piece in stage) for rank in range(ranks))

    assert of_ranks(found) <= of_ranks(plain)


def test_two_stages_a_rank_leave_no_rank_waiting():
    """Eight blocks and a head of two and a half: three blocks are a stage, so that one stage has two or more parts."""
    costs = [0, *[5, 8] * 8, 35]
    assert [sum(costs[p] for p in stage) for stage in divide(costs, 4)] == [26, 39, 39, 35], "the ranks 65 and 74"
    assert [sum(costs[p] for p in stage) for stage in divide(costs, 2, 2)] == [31, 34, 39, 35], "70 and 69"


def test_stages_are_parted_between_attention_and_feed_forward():
    # Six blocks of attention 1 and feed-forward 2, and a head of two thirds of a block.
    costs = [0, *[1, 2] * 6, 2]
    assert balance(costs, divide(costs, 2)) == 1.0
    assert divide(costs, 2) == [range(8), range(8, 14)], "the cut is between the parts of the fourth block"
    whole_blocks = [range(7), range(7, 14)]
    assert balance(costs, whole_blocks) == 10 / 11


def test_the_first_stages_are_the_lightest_of_equal_ways():
    assert divide([1, 1, 1, 1, 1], 2) == [range(2), range(2, 5)]


def test_more_stages_than_pieces_are_refused_with_the_most_that_works():
    with pytest.raises(ConfigError, match="makes 6 stages, but the model can be cut into 5 at most"):
        divide([0, 1, 2, 1, 2, 3], 6)


def test_costs_are_the_flops_of_the_pieces():
    """Embedding; of each of two blocks attention and feed-forward; head."""
    model, task = tiny_decoder(width=32, context=8, heads=2), LanguageModel()
    embedding, attention, feed_forward, *again, head = count_costs(model, task)
    assert again == [attention, feed_forward]
    assert embedding == 0
    assert head == 3 * 2 * 8 * 32 * len(model.head.weight)
    assert feed_forward == 3 * 2 * 8 * (2 * 32 * 64)
    assert attention == 3 * 2 * (8 * 4 * 32 * 32 + 36 * 2 * 32)
    freeze(model, 1, None, True)
    assert count_costs(model, task) == [embedding, attention, feed_forward, attention, feed_forward, head]
