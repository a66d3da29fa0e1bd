"""Backward in two halves: gradients of inputs now, those of the linear layers' weights later.

    linear   y = x W^T          now    dx = dy W          for which the stage before waits
                                later  dW = dy^T x        for which nobody waits: see schedules.zero_bubble

What is cheap is made in the first half: biases, norms, embeddings; and what is not a plain linear layer.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.models.attention import product_dtype


class Halves:
    """The weights' gradients that backward has put off; whoever runs backward takes them, and makes them later."""

    def __init__(self) -> None:
        self._put_off: list[Callable[[], None]] = []

    def use(self, model: nn.Module) -> None:
        """Have backward of the plain linear layers in ``model`` put off their weights' gradients."""
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = _HalvedLinear  # its parameters, names and hooks stay
                module.__dict__["halves"] = self

    def put_off(self, weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> None:
        def make() -> None:
            with torch.no_grad():
                made = (grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
            torch.autograd.backward(_Gives.apply(weight, made))  # so that the weight's hooks are called

        self._put_off.append(make)

    def take(self) -> list[Callable[[], None]]:
        """What the last backward has put off, in its order."""
        taken, self._put_off = self._put_off, []
        return taken


class _HalvedLinear(nn.Linear):
    halves: Halves

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x.to(product_dtype(self.weight)), self.weight, self.bias, self.halves)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, halves: Halves) -> Any:
        ctx.save_for_backward(x)
        ctx.weight = weight  # itself: where a block is recomputed, what was saved comes back as another tensor
        ctx.halves, ctx.bias_dtype = halves, None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,), weight = ctx.saved_tensors, ctx.weight
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            ctx.halves.put_off(weight, x, grad)
        grad_x = grad @ weight.to(grad.dtype) if needs_x else None
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        return grad_x, None, grad_bias, None


class _Gives(torch.autograd.Function):
    """A number whose gradient by ``weight`` is ``grad``."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, grad: torch.Tensor) -> Any:
        ctx.grad = grad
        return grad.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return ctx.grad, None
