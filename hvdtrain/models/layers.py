"""The parts of a Transformer block.

Shape letters:  B rows, T positions, S positions of an encoder's output (the memory), D model width, H heads,
                G heads of keys and values (H, or fewer that each serve H / G heads of queries),
                K width of a head (D / H), F feed-forward width
"""

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.models.attention import Runs, attend
from hvdtrain.models.cache import LayerCache
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.recompute import AnyBlock


class Block(AnyBlock):
    """Pre-norm residual block:  x + attention(norm(x)),  then  x + feed_forward(norm(x))."""

    def __init__(self, options: TransformerOptions, causal: bool = True):
        super().__init__()
        self.attention_norm = make_norm(options)
        self.attention = Attention(options, causal)
        self.feed_forward_norm = make_norm(options)
        self.feed_forward = FeedForward(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        mask: torch.Tensor | Runs | None = None,
    ) -> torch.Tensor:
        return self.run(x_BTD, rotary, cache, mask)

    def compute(
        self,
        x_BTD: torch.Tensor,
        rotary: torch.Tensor | None,
        cache: LayerCache | None,
        mask: torch.Tensor | Runs | None,
    ) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache, mask))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))


class CrossBlock(AnyBlock):
    """Pre-norm block of an encoder-decoder's decoder: causal attention, cross-attention, feed-forward, each added."""

    def __init__(self, options: TransformerOptions):
        super().__init__()
        self.attention_norm = make_norm(options)
        self.attention = Attention(options)
        self.cross_attention_norm = make_norm(options)
        self.cross_attention = CrossAttention(options)
        self.feed_forward_norm = make_norm(options)
        self.feed_forward = FeedForward(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: torch.Tensor | None,
        cache: LayerCache | None,
        mask: torch.Tensor | None,
        memory_BSD: torch.Tensor | None,
        memory_mask: torch.Tensor,
    ) -> torch.Tensor:
        """mask: as in Attention. memory_BSD: an encoder's output; None: its keys and values are in the cache."""
        return self.run(x_BTD, rotary, cache, mask, memory_BSD, memory_mask)

    def compute(
        self,
        x_BTD: torch.Tensor,
        rotary: torch.Tensor | None,
        cache: LayerCache | None,
        mask: torch.Tensor | None,
        memory_BSD: torch.Tensor | None,
        memory_mask: torch.Tensor,
    ) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache, mask))
        if memory_BSD is not None:
            keys_values = self.cross_attention.keys_values(memory_BSD)
        else:
            assert cache is not None, "neither a memory nor a cache that has read one"
            keys_values = cache.memory
        x_BTD = x_BTD + self.dropout(self.cross_attention(self.cross_attention_norm(x_BTD), keys_values, memory_mask))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))


class AnyAttention(nn.Module):
    """Base of the two: ``kv_heads`` of keys and values divide ``heads`` (grouped-query attention); ``dropout`` is of
    who sees whom, in training.
    """

    def __init__(self, options: TransformerOptions):
        super().__init__()
        self.heads, self.kv_heads = options.heads, options.kv_heads or options.heads
        self.dropout = options.dropout


class Attention(AnyAttention):
    """Multi-head self-attention (Vaswani et al. 2017) through torch's scaled_dot_product_attention.

    ``causal``: a position sees itself and earlier ones, else all. A ``mask`` says instead of it who sees whom: bool,
    [B, 1, T, T] or what spreads to it, True where a query (third dim) may see a key (last dim); or ``Runs``, the
    documents of packed rows: causal in each.
    ``window``: of causal attention, how many positions one sees, itself and those before; 0: all. Not for a mask.
    """

    def __init__(self, options: TransformerOptions, causal: bool = True):
        super().__init__(options)
        self.causal, self.window = causal, options.window if causal else 0
        width, kv_width = options.width, self.kv_heads * (options.width // self.heads)
        self.qkv = nn.Linear(width, width + 2 * kv_width, bias=options.bias)
        self.out = nn.Linear(width, width, bias=options.bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        mask: torch.Tensor | Runs | None = None,
    ) -> torch.Tensor:
        assert cache is None or self.causal, "a cache is for causal attention alone"
        rows, positions, width = x_BTD.shape
        heads = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv(x_BTD).view(rows, positions, sum(heads), -1).transpose(1, 2)
        q, k, v = qkv.split(heads, dim=1)  # B H T K, B G T K, B G T K
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        # With a cache the queries are either prompts (causal) or what goes on from them: one token, which sees all, or
        # what the mask says.
        causal = self.causal and positions > 1
        dropout = self.dropout if self.training else 0.0
        out_BHTK = attend(q, k, v, mask, causal, self.window, dropout)
        return self.out(out_BHTK.transpose(1, 2).reshape(rows, positions, width))


class CrossAttention(AnyAttention):
    """Multi-head attention from a decoder's positions to an encoder's output (Vaswani et al. 2017, 3.2.3).

    The two sides count their positions apart, so nothing is rotated here.
    """

    def __init__(self, options: TransformerOptions):
        super().__init__(options)
        width, kv_width = options.width, self.kv_heads * (options.width // self.heads)
        self.q = nn.Linear(width, width, bias=options.bias)
        self.kv = nn.Linear(width, 2 * kv_width, bias=options.bias)
        self.out = nn.Linear(width, width, bias=options.bias)

    def keys_values(self, memory_BSD: torch.Tensor) -> torch.Tensor:
        """[2, B, G, S, K]: the same at every step of decoding."""
        rows, positions, _ = memory_BSD.shape
        return self.kv(memory_BSD).view(rows, positions, 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(
        self, x_BTD: torch.Tensor, keys_values: torch.Tensor, memory_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``memory_mask``: bool [B, 1, 1, S], True on tokens, False on padding."""
        rows, positions, width = x_BTD.shape
        q_BHTK = self.q(x_BTD).view(rows, positions, self.heads, -1).transpose(1, 2)
        k_BGSK, v_BGSK = keys_values
        out_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, memory_mask, dropout=self.dropout if self.training else 0.0)
        return self.out(out_BHTK.transpose(1, 2).reshape(rows, positions, width))


class FeedForward(nn.Module):
    """Two matrices with GELU between them, or SwiGLU (Shazeer 2020) at about the same number of parameters."""

    def __init__(self, options: TransformerOptions):
        super().__init__()
        self.gated = options.activation == "swiglu"
        width, hidden = options.width, options.hidden_width
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=options.bias)
        self.out = nn.Linear(hidden, width, bias=options.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        hidden_BTF = self.up(x_BTD)
        if self.gated:
            gate, value = hidden_BTF.chunk(2, dim=-1)
            return self.out(F.silu(gate) * value)
        return self.out(F.gelu(hidden_BTF))


def make_norm(options: TransformerOptions) -> nn.Module:
    """``layernorm`` (Ba et al. 2016) or ``rmsnorm`` (Zhang and Sennrich 2019, which has no bias)."""
    if options.norm == "rmsnorm":
        return nn.RMSNorm(options.width, eps=1e-5)
    return nn.LayerNorm(options.width, eps=1e-5, bias=options.bias)


def rotary_table(positions: int, head_width: int) -> torch.Tensor:
    """cos and sin of every position's angles: [2, positions, K / 2] fp32.

    Source: Su et al. 2021, "RoFormer", eq. 34, base 10,000.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x_BHTK: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[k], x[k + K/2]) by its position's angle.

    ``table``: [2, T, K / 2], or [2, B, 1, T, K / 2] where the rows' positions differ.
    """
    cos, sin = table.to(x_BHTK.dtype)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
