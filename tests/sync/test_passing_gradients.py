"""When the gradients of a run that are not kept are offered, and when those of a step came out of order."""

import pytest
import torch
from torch import nn

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.slices import whole_slices
from hvdtrain.sync.buckets import make_runs
from hvdtrain.sync.passing import PassingGradients
from hvdtrain.sync.scatter import Room


class Passing:
    """Two parameters, a and b, in one run. ``offered``: what the run held when it was offered, as a + b."""

    def __init__(self, uses: list[int] | None = None):
        self.model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(32)), "b": nn.Parameter(torch.zeros(32))})
        slices = whole_slices(self.model, LocalGroup())
        runs = make_runs(slices, 1 << 20)
        assert len(runs) == 1
        self.offered: list[float] = []
        self.observed: list[float] = []
        self.gradients = PassingGradients(
            slices, list(self.model.parameters()), runs, Room(), self._offer,
            lambda run, flat: self.observed.append(float(flat.sum()) / 32), uses,
        )  # fmt: skip

    def _offer(self, number: int) -> None:
        self.offered.append(float(self.gradients.take(number).sum()) / 32)

    def backward(self, **factors: float) -> None:
        sum(factor * self.model[name].sum() for name, factor in factors.items()).backward()


def test_each_pass_is_offered_when_all_of_it_is_there():
    passing = Passing()
    passing.gradients.begin(2)
    passing.backward(a=1, b=10)
    assert (passing.offered, passing.gradients.is_complete) == ([11], False)
    passing.backward(a=2, b=20)
    assert (passing.offered, passing.observed) == ([11, 22], [11])  # the first pass alone
    assert passing.gradients.is_complete
    assert all(parameter.grad is None for parameter in passing.model.values())


def test_a_parameter_that_is_left_out_of_a_pass_leaves_the_step_incomplete():
    passing = Passing()
    passing.gradients.begin(2)
    passing.backward(a=1)
    passing.backward(a=2, b=20)
    assert not passing.gradients.is_complete
    passing.gradients.begin(1)  # the next step is like any other
    passing.gradients.take(0)  # what was left over
    passing.backward(a=1, b=1)
    assert (passing.offered[-1], passing.gradients.is_complete) == (2, True)


def test_a_pass_that_comes_between_those_of_another_is_noticed():
    """Each has as many gradients as there are passes in the end, but a's second one came before b's first."""
    passing = Passing()
    passing.gradients.begin(2)
    for name in "aabb":
        passing.backward(**{name: 1})
    assert not passing.gradients.is_complete


def test_more_gradients_than_passes():
    passing = Passing()
    passing.gradients.begin(1)
    passing.backward(a=1, b=1)
    with pytest.raises(RuntimeError, match="arrived twice"):
        passing.backward(a=1)


def test_a_parameter_that_is_used_twice_in_a_pass():
    passing = Passing(uses=[2, 1])
    passing.gradients.begin(1)
    passing.backward(a=1)
    passing.backward(b=10)
    assert passing.offered == []
    passing.backward(a=2)
    assert passing.offered == [13]
    assert passing.gradients.is_complete
