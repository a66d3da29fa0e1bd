"""Causal attention on a CPU as batched products, where that is faster than flash attention: for short rows.

The scores of a block of queries are one product, their softmax is kept in the type of the products, and backward is
four products more: fewer and larger ones than flash attention's, which makes small tiles and computes the scores again.
The price is memory for the probabilities: T x T for each head, less in longer rows. Forward and backward on two threads
of an AMD EPYC with AVX-512, as many times as fast as torch's flash attention (`make bench BENCH=attention`):

positions      64     128    256    512    1,024
bf16           5.4    4.2    2.8    2.4    1.8
fp32           6.6    3.9    2.0    1.6    0.8

An Intel Xeon with AMX had the same order. Hence ``MOST_POSITIONS``; at 1,024 the memory would be too dear. It is a
rule, and not measured when a run starts: a run that goes on has to add up in the order in which it began. Scores are
rounded to the type of the products before the softmax, which adds up in fp32.

Shape letters:  N rows times heads, T positions, K width of a head
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

MOST_POSITIONS = 512
_WHOLE = 256  # positions of a row that is one block of queries; in a longer one a block sees the keys up to its end
_BLOCK = {torch.bfloat16: 256, torch.float32: 128}
_allowed = True


def products_fit(q: torch.Tensor, dropout: float) -> bool:
    """Is ``attend_by_products`` the way to take? q: [B, H, T, K], of as many heads and positions as keys have."""
    return flash_fits(q, dropout) and q.shape[2] <= MOST_POSITIONS


def flash_fits(q: torch.Tensor, dropout: float) -> bool:
    """May ``attend_by_flash`` be taken, on a CPU?"""
    return _allowed and q.device.type == "cpu" and dropout == 0 and q.dtype in _BLOCK


@contextlib.contextmanager
def no_products() -> Iterator[None]:
    """Within: ``products_fit`` says no, as if this were no CPU (for what plans a GPU's memory here)."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def attend_by_products(q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(K)) V: [B, H, T, K], where a query sees keys up to its own position."""
    out: torch.Tensor = _Attention.apply(q_BHTK, k_BHTK, v_BHTK)
    return out


def attend_by_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by torch's flash attention, also where that is switched off for the sake of short rows."""
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shape, scale = q.shape, 1 / math.sqrt(q.shape[3])
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        outs, kept = [], []
        with torch.autocast("cpu", enabled=False):  # which would have the softmax in fp32
            for begin, end in _blocks(shape[2], q.dtype):
                hidden = _hidden(begin, end, q.dtype)
                scores = torch.baddbmm(hidden, q[:, begin:end], k[:, :end].transpose(1, 2), alpha=scale)
                kept.append(scores.softmax(-1))
                outs.append(torch.bmm(kept[-1], v[:, :end]))
        ctx.save_for_backward(q, k, v, *kept)
        return _joined(outs).view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *kept = ctx.saved_tensors
        shape, scale = gradient.shape, 1 / math.sqrt(gradient.shape[3])
        gradient = gradient.flatten(0, 1)
        dqs: list[torch.Tensor] = []
        blocks = list(zip(_blocks(shape[2], q.dtype), kept, strict=True))
        for (begin, end), probabilities in reversed(blocks):  # the last one sees all keys
            of_block = gradient[:, begin:end]
            wanted = torch.bmm(of_block, v[:, :end].transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(wanted, probabilities, -1, q.dtype)
            dqs.insert(0, torch.bmm(scores, k[:, :end]))
            if len(dqs) == 1:
                dk = torch.bmm(scores.transpose(1, 2), q[:, begin:])
                dv = torch.bmm(probabilities.transpose(1, 2), of_block)
            else:
                dk[:, :end].baddbmm_(scores.transpose(1, 2), q[:, begin:end])
                dv[:, :end].baddbmm_(probabilities.transpose(1, 2), of_block)
        return _joined(dqs).mul_(scale).view(shape), dk.mul_(scale).view(shape), dv.view(shape)


def _joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _blocks(positions: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    length = positions if positions <= _WHOLE else _BLOCK[dtype]
    return [(begin, min(begin + length, positions)) for begin in range(0, positions, length)]


def _hidden(begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores: -inf where the key comes after the query. [end - begin, end]"""
    return torch.full((end - begin, end), -math.inf, dtype=dtype).triu(begin + 1)
