"""When a bucket leaves, and what is seen of it on the way."""

import pytest
import torch
from threads import LateGroup
from torch import nn

from hvdtrain.slices import whole_slice, whole_slices
from hvdtrain.sync.buckets import Bucket, Buckets, make_runs
from hvdtrain.sync.needs import bucket_of, bytes_of_bucket


class Watched:
    """Buckets of one parameter each; notes what leaves and what is observed."""

    def __init__(self, model: nn.Module):
        self.events: list[str] = []
        self.seen: list[float] = []
        slices = whole_slices(model, LateGroup())
        runs = make_runs(slices, 1)
        self.buckets = Buckets(slices, list(model.parameters()), runs, self._send, self._observe)

    def _send(self, bucket: Bucket) -> None:
        bucket.pending = LateGroup().all_reduce_sum_async(torch.zeros(1), bucket.run.name)
        self.events.append(f"leaves {bucket.flat.sum().item():g}")

    def _observe(self, bucket: Bucket) -> None:
        self.events.append(f"seen {bucket.flat.sum().item():g}")


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(3, 1, bias=False) for name in "ab"})


def test_a_bucket_is_seen_after_the_first_of_several_passes_and_leaves_after_the_last():
    model = two_layers()
    watched = Watched(model)
    watched.buckets.begin(passes=2)
    for rows in (1, 2):
        (model["b"](model["a"].weight * rows)).sum().backward()
    kinds = [event.split()[0] for event in watched.events]
    assert kinds == ["seen", "seen", "leaves", "leaves"]
    assert watched.buckets.is_complete


def test_one_pass_is_all_there_is_to_see():
    model = two_layers()
    watched = Watched(model)
    watched.buckets.begin(passes=1)
    model["b"](model["a"].weight).sum().backward()
    assert [event.split()[0] for event in watched.events] == ["leaves", "leaves"]


def test_what_not_every_pass_used_leaves_with_the_rest_and_is_known_to_be_incomplete():
    """Nobody could tell then which gradients were the first pass's."""
    model = two_layers()
    watched = Watched(model)
    watched.buckets.begin(passes=2)
    model["a"](torch.ones(1, 3)).sum().backward()
    model["b"](torch.ones(2, 3)).sum().backward()
    assert not any(event.startswith("leaves") for event in watched.events)
    watched.buckets.send_rest()
    assert watched.events[-2:] == ["leaves 6", "leaves 3"]
    assert not watched.buckets.is_complete


@pytest.mark.parametrize(
    ("numbers", "mib"),
    [(1 << 18, 2), (20 << 18, 2), (256 << 18, 8), (1 << 30, 16)],
    ids=["few", "20 MiB", "256 MiB", "4 GiB"],
)
def test_buckets_of_which_a_recipe_says_nothing(numbers: int, mib: int):
    """1/32 of the gradients, of 2 to 16 MiB: a model of any size has few that nothing hides, and few in all."""
    assert bytes_of_bucket(0.0, 4 * numbers) == mib << 20
    assert bucket_of(numbers, 1, 0.0) == min(numbers, mib << 18)
    tensors = [torch.empty(numbers // 640, device="meta") for _ in range(640)]
    group = LateGroup()
    slices = [whole_slice(str(number), tensor, group) for number, tensor in enumerate(tensors)]
    runs = make_runs(slices, 0)
    most = max(sum(4 * tensor.numel() for _, tensor in run.members) for run in runs)
    assert 0 <= min(4 * numbers, mib << 20) - most < 4 * numbers // 500
