"""What tests of optimizers share: steps at a rate that changes, and looks at every bit of what came of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Gradients = Callable[[Sequence[Tensor], int], list[Tensor]]  # of these weights, in a step


def rate_of(step: int) -> float:
    return 0.1 / (1 + step)


def walk(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[nn.Parameter],
    gradients_of: Gradients,
    steps: int,
    first: int = 0,
) -> None:
    """Steps ``first`` .. of a run whose rate changes, like that of a schedule."""
    for step in range(first, first + steps):
        for weight, gradient in zip(weights, gradients_of(weights, step), strict=True):
            weight.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        optimizer.step()


def bits(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights and states as integers, which tell 0.0 from -0.0 and hold NaN equal to itself."""
    states = [tensor for weight in weights for _, tensor in sorted(optimizer.state[weight].items())]
    return [tensor.detach().clone().view(torch.int32) for tensor in [*weights, *states]]


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
