"""64 bits of a tensor: any change of its bits shows. And the words for replicas that differ."""

import random
import threading

import pytest
import torch
from checkpoints import tensors_of
from hypothesis import given
from hypothesis import strategies as st
from threads import ThreadGroup, on_ranks
from tiny import CPU, tiny_decoder

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.ranks import OneRank
from hvdtrain.errors import ReplicaError
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.sync import replicas
from hvdtrain.sync.replicas import ReplicaCheck, difference

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


def _hash(tensor: torch.Tensor) -> int:
    return ReplicaCheck(LocalGroup(), 0).hashes({"x": tensor})["x"]


def _flipped(tensor: torch.Tensor, element: int, bit: int) -> torch.Tensor:
    changed = tensor.clone()
    bits = changed.view(-1).view(INTEGERS[tensor.element_size()])
    mask = 1 << bit
    top = 8 * tensor.element_size() - 1
    bits[element] ^= mask - (1 << 64) if bit == top == 63 else mask - (1 << (top + 1)) if bit == top > 7 else mask
    return changed


@given(st.sampled_from(TYPES[:-1]), st.integers(1, 40), st.data())
def test_every_flipped_bit_shows(dtype: torch.dtype, count: int, data: st.DataObject):
    tensor = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 9).to(dtype)
    element = data.draw(st.integers(0, count - 1))
    bit = data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    assert _hash(tensor) == _hash(tensor.clone())
    assert _hash(tensor) != _hash(_flipped(tensor, element, bit))


def test_two_elements_that_change_places_show():
    tensor = torch.arange(12.0)
    seen = {_hash(tensor)}
    for first in range(12):
        for second in range(first):
            order = list(range(12))
            order[first], order[second] = order[second], order[first]
            seen.add(_hash(tensor[order]))
    assert len(seen) == 1 + 66


def test_the_places_do_not_cancel_out():
    """A change of 1, -2, 1 at three neighbours is invisible to factors 1, 3, 5, ..."""
    ints = torch.zeros(6, dtype=torch.int32)
    changed = ints + torch.tensor([1, -2, 1, 0, 0, 0], dtype=torch.int32)
    assert _hash(ints) != _hash(changed)


def test_equal_bits_are_equal_however_they_lie():
    tensor = torch.randn(6, 4)
    assert _hash(tensor) == _hash(tensor.T.contiguous().T)
    assert _hash(tensor) == _hash(torch.stack([tensor, tensor], 2)[:, :, 0])
    assert _hash(torch.tensor(2.0)) == _hash(torch.tensor([2.0]))
    assert _hash(torch.tensor(0.0)) != _hash(torch.tensor(-0.0))  # bits, not numbers
    assert _hash(torch.tensor([torch.nan])) == _hash(torch.tensor([torch.nan]))
    assert _hash(torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_the_sum_it_says(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """In plain arithmetic, over chunks of 4: what a GPU and a CPU, a small and a large chunk of memory agree on."""
    monkeypatch.setattr(replicas, "_CHUNK", 4)
    monkeypatch.setattr(replicas, "_CPU_PIECE", 3)
    tensor = (torch.randn(11, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    bits = tensor.view(INTEGERS[tensor.element_size()]).tolist()
    mask, total = (1 << 64) - 1, 0
    for start in range(0, 11, 4):
        total *= replicas._NEXT_CHUNK
        for place, value in enumerate(bits[start : start + 4], start=1):
            x = place * 0x9E3779B97F4A7C15 & mask
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
            x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
            total += value * ((x ^ x >> 31) | 1)
    assert _hash(tensor) & mask == total & mask


def test_the_optimizers_state_is_compared_too():
    model = tiny_decoder()
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = tensors_of(model, optimizer)
    count = len(list(model.parameters()))
    assert len(names) == 4 * count  # exp_avg, exp_avg_sq, step
    assert next(iter(names)) == next(name for name, _ in model.named_parameters())
    assert len(tensors_of(model)) == count
    hashes = ReplicaCheck(OneRank(), 0).hashes(names)
    assert list(hashes) == list(names)
    next(iter(optimizer.state.values()))["exp_avg"][0] += 1
    assert [name for name, value in ReplicaCheck(OneRank(), 0).hashes(names).items() if value != hashes[name]] == [
        f"optimizer.exp_avg.{next(iter(names))}"
    ]


def test_the_rank_that_differs_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.gethostname", lambda: threading.current_thread().name.replace("rank-", "n"))

    def work(group: ThreadGroup) -> ReplicaError:
        tensors = {"a": torch.zeros(3, device=CPU), "b": torch.ones(3), "c": torch.ones(2)}
        ReplicaCheck(group, group.rank).check(tensors, step=20)
        if group.rank == 2:
            tensors["b"] = _flipped(tensors["b"], element=1, bit=0)
        with pytest.raises(ReplicaError) as caught:
            ReplicaCheck(group, group.rank).check(tensors, step=40)
        return caught.value

    for error in on_ranks(4, work):
        assert str(error) == (
            "step 40: the replica of rank 2 on n2 differs from those of the other 3 ranks; first in b (1 of 3 tensors)"
            "; the last checkpoint is from before"
        )
        assert (error.exit_code, error.on_all_ranks) == (70, True)


def test_words_for_many_and_for_a_tie():
    right, wrong, other = {"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 5, "b": 2}
    ranks = [f"rank {rank} on n{rank}" for rank in range(12)]
    many = [wrong if rank % 2 else right for rank in range(12)]
    many[1] = many[11] = right
    assert difference(many, ranks) == (
        "the replica of rank 3 on n3, rank 5 on n5, rank 7 on n7, rank 9 on n9 differ from those of the other 8 ranks; "
        "first in b (1 of 2 tensors)"
    )
    many[1] = other
    assert ", rank 7 on n7 and 1 more differ from those of the other 7 ranks; first in a (1 of 2" in difference(
        many, ranks
    )
    assert difference([right, other], ranks[:2]) == (
        "the replicas of rank 0 on n0 and rank 1 on n1 differ, and no majority tells which is right; "
        "first in a (1 of 2 tensors)"
    )


def test_alone_nothing_is_computed():
    ReplicaCheck(OneRank(), 0).check({"a": random.Random(0)}, step=1)  # which has no bits
