"""The optimizer that a recipe names, with weight decay on matrices only."""

from typing import Literal

import torch
from torch import nn

from hvdtrain.options import Options, option


class OptimOptions(Options):
    name: Literal["adamw"] = option("adamw", "AdamW (Loshchilov and Hutter 2019), torch's fused one")
    lr: float = option(1e-3, "peak learning rate", gt=0)
    beta1: float = option(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = option(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = option(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = option(0.1, "on matrices and embeddings; never on biases and norms", ge=0)
    clip_norm: float = option(1.0, "largest global gradient norm; 0: no clipping", ge=0)


def make_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """AdamW over ``model``: matrices and embeddings decay, vectors (biases, norms) do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )
