"""The optimizer that a recipe names, with weight decay on matrices only."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from hvdtrain.optim.lamb import Lamb, Moments
from hvdtrain.optim.lars import Lars, Norms, whole_norms
from hvdtrain.options import Options, option


class OptimOptions(Options):
    name: Literal["adamw", "lamb", "lars", "sgd"] = option(
        "adamw",
        "AdamW (Loshchilov and Hutter 2019) and SGD with momentum, torch's fused ones; LAMB (You et al. 2020) and "
        "LARS (You et al. 2017) for large batches",
    )
    lr: float = option(1e-3, "peak learning rate", gt=0)
    beta1: float = option(0.9, "decay of the first moment (adamw, lamb)", ge=0, lt=1)
    beta2: float = option(0.95, "decay of the second moment (adamw, lamb)", ge=0, lt=1)
    eps: float = option(1e-8, "added to the root of the second moment (adamw, lamb)", gt=0)
    momentum: float = option(0.9, "share of the last step that goes on (lars, sgd)", ge=0, lt=1)
    weight_decay: float = option(0.1, "on matrices and embeddings; never on biases and norms", ge=0)
    trust_coefficient: float = option(1e-3, "of lars: a tensor's step / its norm, at lr 1 and without decay", gt=0)
    trust_clip: float = option(0.0, "largest trust ratio of a tensor (lamb, lars); 0: any", ge=0)
    bias_correction: bool = option(True, "of lamb: divide moments by 1 - beta^step, as Adam does")
    clip_norm: float = option(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    layer_decay: float = option(
        1.0,
        "a layer's rate / that of the layer above it, for fine-tuning (0.75 to 0.95); the head has lr, the embeddings "
        "the least; 1: all alike",
        gt=0,
        le=1,
    )
    freeze: int | str = option(
        "",
        "parameters that stay as they are: a number N (the embeddings and the N lowest layers; 0: the embeddings), or "
        "names, their beginnings or globs, with commas between them (encoder.embedding,encoder.blocks.0)",
    )


def make_optimizer(
    parameters: Iterable[torch.Tensor],
    options: OptimOptions,
    norms: Norms = whole_norms,
    shares: Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """Matrices and embeddings decay and have trust ratios, vectors (biases, norms) not; what is frozen stays out.

    norms: of a model whose tensors are cut over ranks, see Norms in lars.py. A rank that moves nothing, because others
    keep the parameters, has a group without any.
    shares: what each of ``parameters`` takes of the learning rate; None: all of it.
    """
    parameters = list(parameters)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter, share in zip(parameters, shares or [1.0] * len(parameters), strict=True):
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() >= 2
        decay = options.weight_decay if is_matrix else 0.0
        group = {"params": [], "weight_decay": decay, "is_adapted": is_matrix, "lr_share": share}
        groups.setdefault((is_matrix, share), group)["params"].append(parameter)
    if not parameters:
        groups[False, 1.0] = {"params": [], "weight_decay": 0.0, "is_adapted": False}
    matrices_first = sorted(groups, key=lambda kind: not kind[0])
    return _MAKERS[options.name]([groups[kind] for kind in matrices_first], options, norms)


def state_bytes(options: OptimOptions) -> int:
    """What the optimizer keeps for each parameter, in fp32: two moments, or one momentum where there is any."""
    if options.name in ("adamw", "lamb"):
        return 2 * 4
    return 4 if options.momentum else 0


def _adamw(groups: list[dict[str, Any]], options: OptimOptions, norms: Norms) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True)


def _lamb(groups: list[dict[str, Any]], options: OptimOptions, norms: Norms) -> torch.optim.Optimizer:
    return Lamb(
        groups,
        lr=options.lr,
        moments=Moments(options.beta1, options.beta2, options.eps, options.bias_correction),
        trust_clip=options.trust_clip,
        norms=norms,
    )


def _lars(groups: list[dict[str, Any]], options: OptimOptions, norms: Norms) -> torch.optim.Optimizer:
    return Lars(
        groups,
        lr=options.lr,
        momentum=options.momentum,
        trust_coefficient=options.trust_coefficient,
        trust_clip=options.trust_clip,
        norms=norms,
    )


def _sgd(groups: list[dict[str, Any]], options: OptimOptions, norms: Norms) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=True)
    if options.momentum:
        optimizer.register_step_pre_hook(_begin_momenta)
    return optimizer


def _begin_momenta(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Momenta begin as zeros, which gives the same first step as torch's way, to set them in it.

    That way leaves them as memory happened to be where the first step is skipped (``found_inf``), and fails where a
    parameter has its first gradient later than others.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


_MAKERS = {"adamw": _adamw, "lamb": _lamb, "lars": _lars, "sgd": _sgd}
