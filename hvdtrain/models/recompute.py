"""Activation checkpointing: blocks that forget what they computed, and compute it again for backward.

full       a block keeps its input alone, and computes everything again: about a third more arithmetic
selective  it keeps also what was dear to compute, the outputs of matrix products and of attention, and computes norms,
           activations and dropout again; nearly free, and saves less. Where attention is made of plain products (the
           CPU, without flash attention), its T x T scores are computed again too

On the CPU a recomputing block leaves torch.compile where rows are packed: attention over documents breaks its graph.

Gradients are those of ``none``, bit for bit in eager mode; dropout draws the same numbers again.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; selective: Korthikanti et al. 2022.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hvdtrain.models.draws import Draws
from hvdtrain.options import Options, option


class RecomputeOptions(Options):
    name: Literal["none", "full", "selective"] = option(
        "none", "what blocks compute again in backward; selective: all but matrix products and attention"
    )
    every: int = option(1, "only the first of so many Transformer blocks", ge=1)


class AnyBlock(nn.Module):
    """Base of the blocks, of which a model has a stack: what is compiled, recomputed and accounted for by itself.

    ``run`` is ``compute``, and may do it twice. It is called inside of ``forward``, so that torch.compile sees it: a
    compiled block recomputes in its own backward.

    draws, number: whose random numbers its dropout draws, and its place there (see draws.py).
    """

    recompute: str = "none"
    draws: Draws | None = None
    number: int = 0

    def begins(self, part: int) -> None:
        """The random numbers that follow are those of this part."""
        if self.draws is not None:
            self.draws.at(self.number, part)

    def compute(self, x_BTD: torch.Tensor, *inputs: Any) -> torch.Tensor:
        raise NotImplementedError

    def run(self, x_BTD: torch.Tensor, *inputs: Any) -> torch.Tensor:
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return self.compute(x_BTD, *inputs)
        how: dict[str, Any] = {} if self.recompute == "full" else {"context_fn": _KEEP_PRODUCTS}

        return checkpoint(self._again(*inputs), x_BTD, use_reentrant=False, **how)

    def _again(self, *inputs: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """``compute`` with the random numbers of the present microbatch, whichever is the present one by then."""
        if self.draws is None or torch.compiler.is_compiling():
            return lambda x_BTD: self.compute(x_BTD, *inputs)
        draws, seed = self.draws, self.draws.seed

        def again(x_BTD: torch.Tensor) -> torch.Tensor:
            present, draws.seed = draws.seed, seed
            try:
                return self.compute(x_BTD, *inputs)
            finally:
                draws.seed = present

        return again


def use_recompute(model: nn.Module, options: RecomputeOptions) -> None:
    """Set what the blocks of ``model`` compute again (local); each stack of blocks is counted by itself."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for number, block in enumerate(stack):
                if isinstance(block, AnyBlock):
                    block.recompute = "none" if number % options.every else options.name


_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
}


def _keep_products(context: Any, op: Any, *args: Any, **more: Any) -> CheckpointPolicy:
    name = op.name()
    if name in _KEPT or (name == "aten::bmm" and _is_small(*args)) or (name == "hvdtrain::cross" and "sum" in args[1]):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_small(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Is a product no larger than its factors? That of scores and values is, the scores themselves are not."""
    (rows, inner), columns = left.shape[-2:], right.shape[-1]
    return rows * columns <= rows * inner + inner * columns


_KEEP_PRODUCTS = partial(create_selective_checkpoint_contexts, _keep_products)
