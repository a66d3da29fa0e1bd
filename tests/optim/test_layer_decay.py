"""Parameters that take a share of the learning rate move as under an optimizer with that rate."""

import pytest
import torch
from in_halves import update_of

from hvdtrain.optim.optimizer import OptimOptions, make_optimizer

SHARES = [1.0, 0.5, 0.25]


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (4,), (2, 5)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def steps(parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, lr: float) -> None:
    update, generator = update_of(optimizer), torch.Generator().manual_seed(2)
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        update.apply(lr * (step + 1))


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_a_share_of_the_rate_is_that_rate(name: str):
    options = OptimOptions(name=name)
    together = weights()
    steps(together, make_optimizer(together, options, shares=SHARES), 1e-2)
    for number, share in enumerate(SHARES):
        apart = weights()
        steps(apart, make_optimizer(apart, options), 1e-2 * share)
        assert torch.equal(together[number], apart[number])


def test_parameters_of_one_rate_share_a_group():
    groups = make_optimizer(weights(), OptimOptions(), shares=[0.5, 0.5, 0.5]).param_groups
    assert [(len(group["params"]), group["lr_share"], group["weight_decay"] > 0) for group in groups] == [
        (2, 0.5, True),
        (1, 0.5, False),
    ]
