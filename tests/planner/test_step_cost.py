"""The time of a step from figures alone: collectives and their timeline by hand, and what must grow with what."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.config import load_config
from hvdtrain.planner.cluster import Cluster
from hvdtrain.planner.collectives import Link, Place, all_reduce, hierarchical, ring, tree
from hvdtrain.planner.cost import Work, hold_up, place_of, slowest, step_time, work_of
from hvdtrain.planner.estimate import estimate
from hvdtrain.planner.replay import Bucket, exposed, ready_times

INSIDE, BETWEEN = Link(1e-6, 100e9), Link(10e-6, 10e9)
FIGURES = {
    "ranks_per_node": 4, "memory_gib": 40, "tflops": 100, "tokens_for_half": 0, "memory_gb_per_s": 1000,
    "inside_gb_per_s": 100, "inside_us": 1, "between_gb_per_s": 10, "between_us": 10, "operation_us": 0, "growth_s": 0,
    "jitter": 0, "save_gb_per_s": 10, "failures_per_rank_day": 0, "restart_s": 0, "requeue_s": 0, "watts_per_node": 0,
}  # fmt: skip
CLUSTER = Cluster("a test", FIGURES, {})
WORK = Work(flops=30e12, tokens=1024, microbatches=4, ranks=1, ranks_per_node=4, replicas=1)


DEVICES = ("cpu", "cuda")


def on(**figures: float) -> Cluster:
    return Cluster("a test", {**FIGURES, **figures}, {})


# --- collectives ---------------------------------------------------------------------------------------------------


def test_a_ring_by_hand():
    """Four ranks of a node, 100 MB: six turns of a quarter at 100 GB/s, and of 1 us."""
    assert ring(100e6, Place(1, 4, INSIDE, BETWEEN)) == pytest.approx(6 * (0.25e-3 + 1e-6))
    # Two nodes of four: 14 turns of an eighth at 10 GB/s; two of the fourteen hops leave a node.
    assert ring(100e6, Place(2, 4, INSIDE, BETWEEN)) == pytest.approx(14 * 1.25e-3 + 12e-6 + 20e-6)
    assert ring(100e6, Place(2, 1, INSIDE, BETWEEN)) == pytest.approx(2 * (5e-3 + 10e-6))


def test_a_hierarchical_sum_by_hand():
    """Scattered and gathered in a node as a ring of four; between two nodes, each half once there and back."""
    within = 6 * (0.25e-3 + 1e-6)
    assert hierarchical(100e6, Place(2, 4, INSIDE, BETWEEN)) == pytest.approx(within + 2 * (5e-3 + 10e-6))
    assert hierarchical(100e6, Place(1, 4, INSIDE, BETWEEN)) == pytest.approx(within)


def test_a_tree_wins_where_latency_counts_and_a_ring_where_bytes_do():
    many = Place(64, 8, INSIDE, BETWEEN)
    assert tree(1e3, many) < ring(1e3, many)
    few = Place(2, 1, INSIDE, BETWEEN)
    assert ring(1e9, few) < tree(1e9, few)
    assert all_reduce(1e3, many) <= tree(1e3, many)


@settings(max_examples=50, deadline=None)
@given(st.floats(1, 1e10), st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_more_bytes_and_less_bandwidth_take_longer(size: float, nodes: int, per_node: int, sharing: int):
    place = Place(nodes, per_node, INSIDE, BETWEEN, sharing)
    seconds = all_reduce(size, place)
    assert (seconds > 0) == (nodes * per_node > 1)
    assert all_reduce(2 * size, place) >= seconds
    slower = replace(place, inside=Link(2e-6, 50e9), between=Link(20e-6, 5e9))
    assert all_reduce(size, slower) >= seconds
    # No sum is quicker than its bytes through the slowest link: 2 (p - 1) / p of them; a hierarchical sum sends less.
    out = 2 * (nodes - 1) / nodes * size / place.out.bytes_per_s
    assert seconds >= 0.999 * out


# --- the timeline of the buckets -----------------------------------------------------------------------------------


def test_what_backward_hides_by_hand():
    """Backward of 4 s; buckets ready at 1, 2, 3, 4 s. Of 0.5 s each the last alone is seen; of 2 s, five seconds."""
    ready = ready_times([1, 1, 1, 1], 4.0)
    assert ready == [1, 2, 3, 4]
    assert exposed([Bucket(at, 0.5) for at in ready], 4.0) == 0.5
    assert exposed([Bucket(at, 2.0) for at in ready], 4.0) == 5.0
    assert exposed([], 4.0) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=8), st.floats(0.1, 10), st.floats(0.001, 3))
def test_of_an_exchange_between_its_last_bucket_and_all_is_seen(sizes: list, backward_s: float, each_s: float):
    buckets = [Bucket(at, each_s) for at in ready_times(sizes, backward_s)]
    seen = exposed(buckets, backward_s)
    assert each_s - 1e-9 <= seen <= each_s * len(sizes) + 1e-9


# --- a step --------------------------------------------------------------------------------------------------------


def test_one_rank_by_hand():
    """Four microbatches of 30 TFLOP at 100 TFLOP/s; 2 GB read and written at 1 TB/s; 5 GB saved every 100 steps."""
    work = replace(WORK, touched_bytes=2e9, saved_bytes=5e9, save_every=100)
    found = step_time(work, CLUSTER)
    assert found.compute == pytest.approx(1.2)
    assert found.optimizer == pytest.approx(0.002)
    assert found.save == pytest.approx(0.5 / 100)
    assert (found.tensor, found.bubble, found.exchange, found.growth, found.stragglers) == (
        0,
        pytest.approx(0),
        0,
        0,
        0,
    )
    assert found.total == pytest.approx(1.207)
    assert step_time(replace(WORK, recomputed=1.0), CLUSTER).compute == pytest.approx(1.6)  # forward again
    assert step_time(WORK, on(tokens_for_half=1024)).compute == pytest.approx(2.4)
    in_parts = replace(WORK, flops=WORK.flops / 4, tensor=4)  # what a pass takes however small it is stays whole
    assert step_time(in_parts, on(tokens_for_half=1024)).compute == pytest.approx(0.3 + 1.2)
    # Asynchronous: only until it is copied, read and written; of one rank.
    assert hold_up(replace(work, asynchronous=True), CLUSTER) == pytest.approx(0.01)


def test_an_exchange_is_hidden_by_the_last_backward_alone():
    """Backward of a microbatch takes 0.2 s. 1 GB over two nodes takes 0.1 s; its last bucket is seen."""
    work = replace(WORK, ranks=2, ranks_per_node=1, replicas=2, gradient_bytes=1e9, bucket_bytes=1e8)
    bucket = 2 * (0.5e8 / 10e9 + 10e-6)
    assert step_time(work, CLUSTER).exchange == pytest.approx(bucket)
    assert step_time(replace(work, hides=False), CLUSTER).exchange == pytest.approx(10 * bucket)
    # Ten times slower, 1.0 s: it began with the first bucket, at a tenth of backward.
    slow = on(between_gb_per_s=1)
    each = 2 * (0.5e8 / 1e9 + 10e-6)
    assert step_time(work, slow).exchange == pytest.approx(0.02 + 10 * each - 0.2)
    # Negotiating each bucket costs too; on twice the microbatches there is no more to hide behind.
    assert step_time(work, on(operation_us=5000)).exchange == pytest.approx(bucket + 0.005)
    assert step_time(replace(work, microbatches=8), slow).exchange == pytest.approx(step_time(work, slow).exchange)


def test_a_bubble_is_the_schedule_s_own():
    """GPipe's and 1F1B's, of s stages and m microbatches: (s - 1) / m of the time of all passes."""
    work = replace(WORK, flops=30e12, ranks=4, stages=4, microbatches=8)
    for schedule in ("gpipe", "1f1b"):
        found = step_time(replace(work, schedule=schedule), CLUSTER)
        assert found.bubble == pytest.approx(found.compute * 3 / 8, rel=1e-3)
    assert step_time(replace(work, schedule="zero_bubble"), CLUSTER).bubble < 0.5 * found.bubble
    half = step_time(replace(work, schedule="interleaved", stages_per_rank=2), CLUSTER)
    assert half.compute == pytest.approx(found.compute)
    assert half.bubble == pytest.approx(found.bubble / 2, rel=0.05)
    uneven = step_time(replace(work, balance=0.8), CLUSTER)
    assert uneven.compute + uneven.bubble == pytest.approx((found.compute + found.bubble) / 0.8, rel=1e-3)


def test_sums_within_layers_cost_more_where_they_leave_the_node():
    work = replace(WORK, ranks=4, tensor=4, tensor_bytes=1e8, tensor_sums=10)
    inside = step_time(work, CLUSTER).tensor
    assert inside == pytest.approx(4 * (1e-3 + 10 * 6e-6))
    assert step_time(replace(work, ranks_per_node=2), CLUSTER).tensor > 5 * inside


def test_where_the_ranks_of_a_part_are():
    """Eight ranks of two a replica on nodes of four: two replicas a node, and two groups share its link."""
    place = place_of(replace(WORK, ranks=8, replicas=4), CLUSTER)
    assert (place.nodes, place.per_node, place.sharing) == (2, 2, 2)
    assert place.out.bytes_per_s == pytest.approx(5e9)
    place = place_of(replace(WORK, ranks=16, replicas=2), CLUSTER)  # a replica has two nodes
    assert (place.nodes, place.per_node, place.sharing) == (2, 1, 4)
    place = place_of(replace(WORK, ranks=8, replicas=8), CLUSTER)
    assert (place.nodes, place.per_node, place.sharing) == (2, 4, 1)


def test_the_slowest_of_many_is_slower():
    """The largest of n standard normal numbers is 0.564, 1.029, 2.508 on average for 2, 4, 100 (Harter 1961)."""
    for ranks, expected in ((1, 0.0), (2, 0.564), (4, 1.029), (100, 2.508)):
        assert slowest(0.1, ranks) - 1 == pytest.approx(0.1 * expected, rel=0.05, abs=1e-12)
    work = replace(WORK, ranks=4, replicas=4)
    found = step_time(work, on(jitter=0.1))
    assert found.stragglers == pytest.approx(0.1029 * found.compute, rel=0.05)


def test_a_message_between_stages_waits_for_who_looks_after_it():
    """Two microbatches, two stages: the first one's end waits for two messages there and two back."""
    work = replace(WORK, ranks=2, stages=2, microbatches=2, schedule="gpipe")
    cluster = on(operation_us=1000)
    late = step_time(replace(work, looks=2), cluster).bubble - step_time(work, cluster).bubble
    assert late == pytest.approx(2 * 2e-3, rel=0.05)
    planned = [work_of(estimate(load_config("demo", ["mesh.pipeline=2", f"device={d}"]), 2, 2, 50)) for d in DEVICES]
    assert [one.looks for one in planned] == [2, 0]  # NCCL's own kernels wait for one another


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["between_gb_per_s", "inside_gb_per_s", "tflops", "memory_gb_per_s", "save_gb_per_s"]),
    st.sampled_from(["between_us", "inside_us", "operation_us", "growth_s", "jitter"]),
    st.integers(1, 4),
)
def test_better_figures_never_slow_a_step_down(more: str, less: str, doublings: int):
    work = replace(
        WORK, ranks=8 * 2**doublings, replicas=2**doublings, stages=2, tensor=4, tensor_bytes=1e8, tensor_sums=8,
        handed_bytes=1e7, gradient_bytes=1e9, touched_bytes=1e9, saved_bytes=1e9, save_every=10,
    )  # fmt: skip
    base = on(jitter=0.05, growth_s=0.01, operation_us=100)
    total = step_time(work, base).total
    assert step_time(work, Cluster("", {**base.figures, more: 2 * base[more]}, {})).total <= total
    assert step_time(work, Cluster("", {**base.figures, less: 0.5 * base[less]}, {})).total <= total
