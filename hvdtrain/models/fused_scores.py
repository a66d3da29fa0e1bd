"""``Score`` (losses.py) on NVIDIA's GPUs in one kernel: the logits are read twice and overwritten by their gradient.

Eager torch makes the softmax in fp32 and goes over it once for each term: ten times as many bytes. Triton comes with
torch's CUDA builds; it compiles the kernel once for each type of logits, which takes a C compiler.

The running maximum and sum are those of Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
"""

import torch
import triton
import triton.language as tl

_BLOCK, _WARPS = 4096, 8  # columns at once; 16 numbers a thread


def score_fused(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float, ignore: int, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``Score`` of logits over the whole vocabulary; with_grad: what it returns is ``logits``, overwritten."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    _score[(len(targets),)](
        logits, targets, losses, logits.shape[1], logits.stride(0),
        float(label_smoothing), float(z_loss), ignore,
        with_grad, _BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return losses.sum(), logits if with_grad else None


@triton.jit
def _score(
    logits, targets, losses, width, stride, smoothing, z_loss, ignore,
    WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target != ignore
    # Before the loop, at whose sums all threads meet: below this number is overwritten.
    own = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)

    top, exps, plain = -float("inf"), 0.0, 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        exps = exps * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        plain += tl.sum(tl.where(columns < width, x, 0.0), axis=0)
        top = higher
    log_z = top + tl.log(exps)
    loss = (1 - smoothing) * (log_z - own) + smoothing * (log_z - plain / width) + z_loss * log_z * log_z
    tl.store(losses + row, tl.where(counts, loss, 0.0))

    if WITH_GRAD:
        slope = 1 + 2 * z_loss * log_z
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
            grad = tl.exp(x - log_z) * slope - smoothing / width
            grad = grad - tl.where(columns == target, 1 - smoothing, 0.0)
            grad = tl.where(counts, grad, 0.0)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=columns < width)
