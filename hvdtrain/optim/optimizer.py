"""The optimizer that a recipe names, with weight decay on matrices only."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from hvdtrain.optim.adam import AdamW, Moments
from hvdtrain.optim.lamb import Lamb
from hvdtrain.optim.lars import Lars, Norms, whole_norms
from hvdtrain.optim.muon import Matrices, Muon, MuonOptions
from hvdtrain.optim.sgd import Sgd
from hvdtrain.options import Options, option

Groups = list[dict[str, Any]]


class OptimOptions(Options):
    name: Literal["adamw", "lamb", "lars", "muon", "sgd"] = option(
        "adamw",
        "AdamW (Loshchilov and Hutter 2019) and SGD with momentum, torch's fused kernels; for large batches LAMB (You "
        "et al. 2020), LARS (You et al. 2017), and Muon (Jordan et al. 2024) on the matrices of blocks, AdamW on the "
        "rest",
    )
    lr: float = option(1e-3, "peak learning rate (muon: of the matrices of blocks)", gt=0)
    adamw_lr: float = option(0.0, "of muon: peak learning rate of all but the matrices of blocks; 0: lr", ge=0)
    beta1: float = option(0.9, "decay of the first moment (adamw, lamb, muon)", ge=0, lt=1)
    beta2: float = option(0.95, "decay of the second moment (adamw, lamb, muon)", ge=0, lt=1)
    eps: float = option(1e-8, "added to the root of the second moment (adamw, lamb, muon)", gt=0)
    momentum: float = option(0.9, "share of the last step that goes on (lars, sgd)", ge=0, lt=1)
    weight_decay: float = option(0.1, "on matrices and embeddings; never on biases and norms", ge=0)
    trust_coefficient: float = option(1e-3, "of lars: a tensor's step / its norm, at lr 1 and without decay", gt=0)
    trust_clip: float = option(0.0, "largest trust ratio of a tensor (lamb, lars); 0: any", ge=0)
    bias_correction: bool = option(True, "of lamb: divide moments by 1 - beta^step, as Adam does")
    muon: MuonOptions = MuonOptions()
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
    matrices: Matrices | None = None,
) -> torch.optim.Optimizer:
    """Matrices and embeddings decay and have trust ratios, vectors (biases, norms) not; what is frozen stays out.

    norms: of a model whose tensors are cut over ranks, see Norms in lars.py. A rank that moves nothing, because others
    keep the parameters, has a group without any.
    shares: what each of ``parameters`` takes of the learning rate; None: all of it.
    matrices: of blocks, which muon makes orthogonal.
    """
    parameters = list(parameters)
    if options.name == "muon":
        assert matrices is not None, "muon has to be told which parameters are matrices of blocks"
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for parameter, share in zip(parameters, shares or [1.0] * len(parameters), strict=True):
        if not parameter.requires_grad:
            continue
        kind = _kind(parameter, options, matrices)
        group = groups.setdefault((kind, share), {"params": [], **_settings(kind, share, options)})
        group["params"].append(parameter)
    if not parameters:
        groups[_VECTOR, 1.0] = {"params": [], **_settings(_VECTOR, 1.0, options)}
    in_order = sorted(groups, key=lambda key: key[0])
    return _MAKERS[options.name]([groups[key] for key in in_order], options, norms, matrices)


_ORTHOGONAL, _MATRIX, _VECTOR = range(3)


def _kind(parameter: torch.Tensor, options: OptimOptions, matrices: Matrices | None) -> int:
    if options.name == "muon" and matrices is not None and matrices.has(parameter):
        return _ORTHOGONAL
    return _MATRIX if parameter.dim() >= 2 else _VECTOR


def _settings(kind: int, share: float, options: OptimOptions) -> dict[str, Any]:
    """Of a group."""
    decay = 0.0 if kind == _VECTOR else options.weight_decay
    if options.name != "muon":
        return {"weight_decay": decay, "is_adapted": kind == _MATRIX, "lr_share": share}
    if kind != _ORTHOGONAL and options.adamw_lr:
        share *= options.adamw_lr / options.lr
    return {"weight_decay": decay, "is_orthogonal": kind == _ORTHOGONAL, "lr_share": share}


def state_bytes(options: OptimOptions, parameters: int, matrices: int) -> int:
    """What the optimizer keeps of so many parameters, in fp32: two moments, or one momentum where there is any.

    matrices: how many of them are in matrices of blocks, of which muon keeps one momentum.
    """
    if options.name in ("adamw", "lamb"):
        return 2 * 4 * parameters
    if options.name == "muon":
        return 2 * 4 * (parameters - matrices) + 4 * matrices
    return 4 * parameters if options.momentum else 0


def _adamw(groups: Groups, options: OptimOptions, norms: Norms, matrices: Matrices | None) -> torch.optim.Optimizer:
    return AdamW(groups, lr=options.lr, moments=Moments(options.beta1, options.beta2, options.eps))


def _lamb(groups: Groups, options: OptimOptions, norms: Norms, matrices: Matrices | None) -> torch.optim.Optimizer:
    return Lamb(
        groups,
        lr=options.lr,
        moments=Moments(options.beta1, options.beta2, options.eps, options.bias_correction),
        trust_clip=options.trust_clip,
        norms=norms,
    )


def _lars(groups: Groups, options: OptimOptions, norms: Norms, matrices: Matrices | None) -> torch.optim.Optimizer:
    return Lars(
        groups,
        lr=options.lr,
        momentum=options.momentum,
        trust_coefficient=options.trust_coefficient,
        trust_clip=options.trust_clip,
        norms=norms,
    )


def _muon(groups: Groups, options: OptimOptions, norms: Norms, matrices: Matrices | None) -> torch.optim.Optimizer:
    assert matrices is not None
    moments = Moments(options.beta1, options.beta2, options.eps)
    return Muon(groups, lr=options.lr, moments=moments, options=options.muon, matrices=matrices)


def _sgd(groups: Groups, options: OptimOptions, norms: Norms, matrices: Matrices | None) -> torch.optim.Optimizer:
    return Sgd(groups, lr=options.lr, momentum=options.momentum)


_MAKERS = {"adamw": _adamw, "lamb": _lamb, "lars": _lars, "muon": _muon, "sgd": _sgd}
