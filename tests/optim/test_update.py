"""What becomes of a summed gradient: divided once, clipped by the norm of whole tensors, kept from the weights."""

from dataclasses import replace

import pytest
import torch
from in_halves import update_of
from threads import ThreadGroup, on_ranks

from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.update import Gradient, Summed, Update


def summed(*gradients: Gradient, loss: float = 12.0, weight: float = 4.0) -> Summed:
    numbers = (torch.tensor(number, dtype=torch.float64) for number in (loss, weight, 0.0))
    return Summed(gradients, *numbers, torch.zeros(3, dtype=torch.float64))


def optimizer_of(*weights: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, fused=True)


def test_sums_are_divided_once_by_the_global_weight():
    flat = torch.tensor([4.0, 8.0])
    agreed = update_of(optimizer_of(torch.zeros(1))).divide(summed(Gradient(flat)))
    assert flat.tolist() == [1.0, 2.0]
    assert (agreed.loss.item(), agreed.weight.item()) == (3.0, 4.0)
    assert agreed.grad_norm.item() == pytest.approx(5**0.5)
    assert agreed.loss_scale is None


@pytest.mark.parametrize("copies", [1, 2])
def test_the_norm_is_that_of_whole_tensors(copies: int):
    """Two ranks of one replica: each has half of a matrix; a bias lies on both, or each has its own half of it."""
    halves, biases = [torch.tensor([4.0, 8.0]), torch.tensor([0.0, 16.0])], [torch.tensor([12.0])] * 2
    if copies == 1:
        biases = [torch.tensor([12.0]), torch.tensor([20.0])]
    everything = torch.cat([*halves, *biases[: 1 if copies == 2 else 2]])

    def work(group: ThreadGroup) -> tuple[float, list[float]]:
        update = Update(
            optimizer_of(torch.zeros(1)),
            clip_norm=1.0,
            guard=Guard(GuardOptions(), torch.device("cpu")),
        )
        matrix, bias = halves[group.rank].clone(), biases[group.rank].clone()
        whole = summed(Gradient(matrix), Gradient(bias, copies))
        agreed = update.divide(replace(whole, over_ranks=lambda total: group.all_reduce_sum(total, "norm")))
        return agreed.grad_norm.item(), [*matrix.tolist(), *bias.tolist()]

    norm = (everything / 4).norm().item()
    for rank, (found, clipped) in enumerate(on_ranks(2, work)):
        assert found == pytest.approx(norm)
        expected = torch.cat([halves[rank], biases[rank]]) / 4 / norm
        assert clipped == pytest.approx(expected.tolist())


def test_a_step_that_the_guard_refuses_moves_nothing():
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.tensor([torch.nan, 1.0])
    update = Update(optimizer_of(weight), 0.0, Guard(GuardOptions(policy="skip"), torch.device("cpu")))
    update.divide(summed(Gradient(weight.grad)))
    update.apply(0.5)
    assert weight.tolist() == [1.0, 1.0]
    weight.grad.copy_(torch.tensor([4.0, 8.0]))
    update.divide(summed(Gradient(weight.grad)))
    update.apply(0.5)
    assert weight.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("pieces", [1, 10])
def test_the_norm_of_a_long_gradient_is_that_of_its_pieces(pieces: int):
    """torch's own is 2e-5 off here, on a CPU: a run whose model is cut would have clipped otherwise."""
    flat = torch.randn(1_000_001, generator=torch.Generator().manual_seed(1))
    gradients = [Gradient(piece.clone()) for piece in flat.chunk(pieces)]
    agreed = update_of(optimizer_of(torch.zeros(1))).divide(summed(*gradients, weight=1.0))
    assert agreed.grad_norm.item() == pytest.approx(flat.double().norm().item(), rel=1e-7)
