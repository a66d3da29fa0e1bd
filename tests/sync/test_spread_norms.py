"""Norms of whole tensors whose parts lie on several ranks, and means of tensors of several types."""

import torch
from threads import ThreadGroup, on_ranks

from hvdtrain.slices import Rect, Slice
from hvdtrain.sync.means import put_mean
from hvdtrain.sync.norms import SpreadNorms

CPU = torch.device("cpu")


def piece(name: str, group: ThreadGroup, *numbers: float, copies: int = 1) -> Slice:
    """This rank's half of four numbers, or all of two."""
    tensor = torch.tensor(numbers)
    first = 0 if copies > 1 else 2 * group.rank
    return Slice(name, tensor, torch.Size([2 if copies > 1 else 4]), (Rect((first,), (2,)),), group, copies)


def test_others_than_in_the_step_before_have_norms_of_their_own():
    """As where a tensor has no gradient in a step. What both ranks hold counts once."""

    def work(group: ThreadGroup) -> list[list[list[float]]]:
        a = piece("a", group, *([3.0, 0.0] if group.rank else [0.0, 4.0]))
        b = piece("b", group, 0.0, 2.0, copies=2)
        norms = SpreadNorms([a, b], group, lambda numbers: group.all_reduce_sum(numbers, "norms"), CPU)
        both, one = [a.tensor, b.tensor], [b.tensor]
        nothing = norms([], []) if group.rank else norms(both, both)  # a rank that moves nothing takes part
        assert nothing.shape[1] == (0 if group.rank else 2)
        return [norms(weights, [2 * w for w in weights]).tolist() for weights in (both, one, both)]

    for found in on_ranks(2, work):
        assert found == [[[5.0, 2.0], [10.0, 4.0]], [[2.0], [4.0]], [[5.0, 2.0], [10.0, 4.0]]]


def test_a_mean_keeps_types():
    def work(group: ThreadGroup) -> tuple[list[torch.Tensor], float]:
        tensors = [torch.full((1,), 2.0 * group.rank), torch.full((), 1 + 2**-40 * group.rank, dtype=torch.float64)]
        return tensors, float(put_mean(group, tensors, "test"))

    for (single, double), square in on_ranks(2, work):
        assert single.dtype == torch.float32 and single.tolist() == [1.0]
        assert double.dtype == torch.float64 and double.item() == 1 + 2**-41
        assert square == 1.0
