"""Cross-entropy over a vocabulary without keeping the logits.

The logits of N targets over V words are the largest tensor of a training step, and their gradient is another. Here
a few rows at a time are multiplied, scored and, while they are still in the cache, turned into their share of both
gradients; then they are dropped. The matrix products are the same three as always: nothing is computed twice, and
N x V numbers need not be kept. Gradients in the forward pass are those of Hsu et al. 2024, "Liger Kernel", 3.2.
torch's own `linear_cross_entropy` sums bf16 losses in bf16, which is too coarse to compare runs by.

Shape letters:  N targets, D model width, V vocabulary (padded)
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_CHUNK_ELEMENTS = {"cpu": 1 << 21}  # logits held at once: as many as a core's share of the last cache
_CHUNK_ELEMENTS_GPU = 1 << 26  # enough to keep every multiprocessor at work
_CHUNK_ELEMENTS_FUSED = 1 << 29  # on a GPU, where nothing stands beside the logits: fewer sums of the weight's gradient
_MIN_ROWS = 256  # fewer would make thin, slow matrix products
_TILE = 1024  # rows: a multiple of what the multiprocessors of a GPU make at once


@dataclass(frozen=True)
class LossTerms:
    """``label_smoothing``: Szegedy et al. 2016, spread over all V. ``z_loss``: weight of (log Z)^2, Chowdhery et al.
    2022, "PaLM", 5; keeps the logits from drifting. ``ignore``: target that does not count.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore: int = -100


# Logits of some rows, their targets, the terms, are gradients wanted -> sum of the losses, fp32 scalar; and, if so, its
# gradient by these logits, in their type, maybe in their place.
Score = Callable[[torch.Tensor, torch.Tensor, LossTerms, bool], tuple[torch.Tensor, torch.Tensor | None]]


def score_rows(
    logits: torch.Tensor, targets: torch.Tensor, terms: LossTerms, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``Score`` of logits over the whole vocabulary."""
    counts = targets != terms.ignore
    targets = targets.where(counts, 0)
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = log_p.gather(1, targets[:, None]).squeeze(1)
    smoothing, vocabulary = terms.label_smoothing, log_p.shape[1]
    losses = -picked
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_p.mean(dim=1)
    slope = counts.float()  # d loss / d log Z
    if terms.z_loss:
        log_z = logits[:, 0].float() - log_p[:, 0]
        losses = losses + terms.z_loss * log_z.square()
        slope = slope * (1 + 2 * terms.z_loss * log_z)
    total = (losses * counts).sum()
    if not with_grad:
        return total, None
    grad = log_p.exp_().mul_(slope[:, None])
    if smoothing:
        grad -= (counts * (smoothing / vocabulary))[:, None]
    grad.scatter_add_(1, targets[:, None], (counts * (smoothing - 1.0))[:, None])
    return total, grad.to(logits.dtype)


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    terms: LossTerms,
    rows_at_once: int = 0,
    bias: torch.Tensor | None = None,
    score: Score | None = None,
) -> torch.Tensor:
    """SUM over the targets of -log softmax(hidden @ weight.T + bias)[target] plus ``terms``: fp32 scalar, in nats.

    Products are made in the type of ``hidden`` (autocast's where that is on), everything else in fp32.
    bias: [V].
    rows_at_once: targets scored together; 0: see ``chunk_rows``. It changes the order of sums, nothing else.
    score: what makes a loss and a gradient of logits; None: as fast as it goes here, where all of the vocabulary is.
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    way = score or _score_on(device)
    rows = rows_at_once or chunk_rows(device, len(weight_VD), score is None and way is not score_rows)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias, targets_N, terms, rows, way)


@functools.cache
def _score_on(device: str) -> Score:
    """Triton builds its kernels with a C compiler."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if device == "cuda" and importlib.util.find_spec("triton") and any(map(shutil.which, filter(None, compilers))):
        return score_rows_fused
    return score_rows


def score_rows_fused(
    logits: torch.Tensor, targets: torch.Tensor, terms: LossTerms, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``score_rows`` by the GPU's kernel; the gradient comes in the logits' place."""
    from hvdtrain.models.fused_scores import score_fused  # Triton

    return score_fused(logits, targets, terms.label_smoothing, terms.z_loss, terms.ignore, with_grad)


def chunk_rows(device: str, vocabulary: int, fused: bool = False) -> int:
    """How many targets are scored at once on a type of device, over a padded vocabulary. fused: by the GPU's kernel."""
    if device in _CHUNK_ELEMENTS:
        return max(_MIN_ROWS, _CHUNK_ELEMENTS[device] // vocabulary)
    elements = _CHUNK_ELEMENTS_FUSED if fused else _CHUNK_ELEMENTS_GPU
    return max(_MIN_ROWS, elements // vocabulary // _TILE * _TILE)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        terms: LossTerms,
        rows: int,
        score: Score,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias)
            loss, grad_logits = score(logits, targets[part], terms, any(ctx.needs_input_grad))
            total += loss
            if need_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if need_weight:
                product = grad_logits.T @ hidden[part]
                if grad_weight is None:  # more than one chunk is added up in fp32
                    grad_weight = product.float() if rows < len(targets) else product
                else:
                    grad_weight += product
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = ctx.saved_tensors
        if grad.device.type == "cpu" and grad.item() == 1.0:  # elsewhere looking would wait for the device
            return *found, None, None, None, None
        return *(None if g is None else g.mul_(grad) for g in found), None, None, None, None
