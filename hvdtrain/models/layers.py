"""The parts of a Transformer block.

Shape letters:  B rows, T positions, D model width, H heads, K width of a head (D / H), F feed-forward width
"""

import torch
import torch.nn.functional as F
from torch import nn


class KVCache:
    """Keys and values of the positions seen so far, for one layer: [B, H, T_max, K] each."""

    def __init__(self, rows: int, heads: int, positions: int, head_width: int, like: torch.Tensor):
        shape = (rows, heads, positions, head_width)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, keys_BHTK: torch.Tensor, values_BHTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new positions; returns all keys and values up to and including them."""
        end = self.length + keys_BHTK.shape[2]
        self.keys[:, :, self.length : end] = keys_BHTK
        self.values[:, :, self.length : end] = values_BHTK
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def make_norm(kind: str, width: int, bias: bool) -> nn.Module:
    """``layernorm`` (Ba et al. 2016) or ``rmsnorm`` (Zhang and Sennrich 2019, which has no bias)."""
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=1e-5)
    return nn.LayerNorm(width, eps=1e-5, bias=bias)


def rotary_table(positions: int, head_width: int) -> torch.Tensor:
    """cos and sin of every position's angles: [2, positions, K / 2] fp32.

    Source: Su et al. 2021, "RoFormer", eq. 34, base 10,000.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x_BHTK: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[k], x[k + K/2]) by its position's angle; ``table``: [2, T, K / 2]."""
    cos, sin = table.to(x_BHTK.dtype)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017) through torch's scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int, bias: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self, x_BTD: torch.Tensor, rotary: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        rows, positions, width = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(rows, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each B H T K
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        assert cache is None or cache.length == positions or positions == 1, "a filled cache takes one token at a time"
        # With a cache the queries are either the whole prefix (causal) or one last position, which sees everything.
        out_BHTK = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=positions > 1
        )
        return self.out(out_BHTK.transpose(1, 2).reshape(rows, positions, width))


class FeedForward(nn.Module):
    """Two matrices with GELU between them, or SwiGLU (Shazeer 2020) at about the same number of parameters."""

    def __init__(self, width: int, ratio: float, activation: str, bias: bool):
        super().__init__()
        self.gated = activation == "swiglu"
        hidden = int(width * ratio)
        if self.gated:
            hidden = -(-2 * hidden // 24) * 8  # two thirds of it, up to a multiple of 8
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        hidden_BTF = self.up(x_BTD)
        if self.gated:
            gate, value = hidden_BTF.chunk(2, dim=-1)
            return self.out(F.silu(gate) * value)
        return self.out(F.gelu(hidden_BTF))


class Block(nn.Module):
    """Pre-norm residual block:  x + attention(norm(x)),  then  x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, ratio: float, activation: str, norm: str, bias: bool, dropout: float):
        super().__init__()
        self.attention_norm = make_norm(norm, width, bias)
        self.attention = Attention(width, heads, bias, dropout)
        self.feed_forward_norm = make_norm(norm, width, bias)
        self.feed_forward = FeedForward(width, ratio, activation, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: torch.Tensor, rotary: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
