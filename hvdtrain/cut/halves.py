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
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        return _Linear.apply(x.to(product_dtype(self.weight)), self.bias, self)


class _Linear(torch.autograd.Function):
    """The weight is no input of it: autograd would call the weight's hooks in the first half, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: _HalvedLinear) -> Any:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,), layer = ctx.saved_tensors, ctx.layer
        if layer.weight.requires_grad:
            layer.halves.put_off(layer.weight, x, grad)
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(layer.bias.dtype)
        return grad @ layer.weight.to(grad.dtype), grad_bias, None


class _Gives(torch.autograd.Function):
    """A number whose gradient by ``weight`` is ``grad``."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, grad: torch.Tensor) -> Any:
        ctx.grad = grad
        return grad.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return ctx.grad, None
