"""The parts of a Transformer block.

Shape letters:  B rows, T positions, S positions of an encoder's output (the memory), D model width, H heads,
                G heads of keys and values (H, or fewer that each serve H / G heads of queries),
                K width of a head (D / H, unless given), F feed-forward width
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.models.attention import Runs, attend
from hvdtrain.models.cache import LayerCache
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import is_here
from hvdtrain.models.positions import rotate
from hvdtrain.models.recompute import AnyBlock


class ResidualBlock(AnyBlock):
    """Base of the two: each part's output is added to what it read."""

    def __init__(self, options: TransformerOptions):
        super().__init__()
        self.norm_first = options.norm_first
        self.dropout = nn.Dropout(options.dropout)

    def add(self, x_BTD: torch.Tensor, norm: nn.Module, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x + part(norm(x)), or post-norm: norm(x + part(x))."""
        if self.norm_first:
            return x_BTD + self.dropout(part(norm(x_BTD)))
        return norm(x_BTD + self.dropout(part(x_BTD)))


class Block(ResidualBlock):
    """Attention, then a feed-forward part."""

    def __init__(self, options: TransformerOptions, causal: bool = True):
        super().__init__(options)
        self.attention_norm = make_norm(options)
        self.attention = Attention(options, causal)
        self.feed_forward_norm = make_norm(options)
        self.feed_forward = FeedForward(options)

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
        if is_here(self.attention):
            self.begins(0)
            x_BTD = self.add(x_BTD, self.attention_norm, lambda x: self.attention(x, rotary, cache, mask))
        if is_here(self.feed_forward):
            self.begins(1)
            x_BTD = self.add(x_BTD, self.feed_forward_norm, self.feed_forward)
        return x_BTD


class CrossBlock(ResidualBlock):
    """Of an encoder-decoder's decoder: causal attention, cross-attention, then a feed-forward part."""

    def __init__(self, options: TransformerOptions):
        super().__init__(options)
        self.attention_norm = make_norm(options)
        self.attention = Attention(options)
        self.cross_attention_norm = make_norm(options)
        self.cross_attention = CrossAttention(options)
        self.feed_forward_norm = make_norm(options)
        self.feed_forward = FeedForward(options)

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
        if is_here(self.attention):
            self.begins(0)
            x_BTD = self.add(x_BTD, self.attention_norm, lambda x: self.attention(x, rotary, cache, mask))
        if is_here(self.cross_attention):
            self.begins(1)
            if memory_BSD is not None:
                keys_values = self.cross_attention.keys_values(memory_BSD)
            else:
                assert cache is not None, "neither a memory nor a cache that has read one"
                keys_values = cache.memory
            look = partial(self.cross_attention, keys_values=keys_values, memory_mask=memory_mask)
            x_BTD = self.add(x_BTD, self.cross_attention_norm, look)
        if is_here(self.feed_forward):
            self.begins(2)
            x_BTD = self.add(x_BTD, self.feed_forward_norm, self.feed_forward)
        return x_BTD


class AnyAttention(nn.Module):
    """Base of the two: ``kv_heads`` of keys and values divide ``heads`` (grouped-query attention); ``dropout`` is of
    who sees whom, in training. ``scale`` of queries: 1, or what undoes the division by the root of K (T5).
    """

    def __init__(self, options: TransformerOptions):
        super().__init__()
        self.heads, self.kv_heads = options.heads, options.kv_heads or options.heads
        self.q_width, self.kv_width = (heads * options.width_of_head for heads in (self.heads, self.kv_heads))
        self.scale = 1.0 if options.attention_scale else math.sqrt(options.width_of_head)
        self.dropout = options.dropout

    def scaled(self, q_BHTK: torch.Tensor) -> torch.Tensor:
        return q_BHTK if self.scale == 1.0 else q_BHTK * self.scale


class Attention(AnyAttention):
    """Multi-head self-attention (Vaswani et al. 2017) through torch's scaled_dot_product_attention.

    ``causal``: a position sees itself and earlier ones, else all. A ``mask`` says instead of it who sees whom: bool,
    [B, 1, T, T] or what spreads to it, True where a query (third dim) may see a key (last dim); or numbers that are
    added to the scores, [B, H, T, T] or what spreads to it; or ``Runs``, the documents of packed rows: causal in each.
    ``window``: of causal attention, how many positions one sees, itself and those before; 0: all. Not for a mask.
    """

    def __init__(self, options: TransformerOptions, causal: bool = True):
        super().__init__(options)
        self.causal, self.window = causal, options.window if causal else 0
        self.qkv = nn.Linear(options.width, self.q_width + 2 * self.kv_width, bias=options.biased_qkv)
        self.out = nn.Linear(self.q_width, options.width, bias=options.bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        mask: torch.Tensor | Runs | None = None,
    ) -> torch.Tensor:
        assert cache is None or self.causal, "a cache is for causal attention alone"
        heads = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv(x_BTD)
        # Not of x_BTD: a cut that spreads positions over ranks hands it some of them, with a dim in front that says so.
        *split, rows, positions, _ = qkv.shape
        q, k, v = qkv.view(rows, positions, sum(heads), -1).transpose(1, 2).split(heads, dim=1)  # BHTK, BGTK, BGTK
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        # With a cache the queries are either prompts (causal) or what goes on from them: one token, which sees all, or
        # what the mask says.
        causal = self.causal and positions > 1
        dropout = self.dropout if self.training else 0.0
        out_BHTK = attend(self.scaled(q), k, v, mask, causal, self.window, dropout)
        return self.out(out_BHTK.transpose(1, 2).reshape(*split, rows, positions, self.q_width))


class CrossAttention(AnyAttention):
    """Multi-head attention from a decoder's positions to an encoder's output (Vaswani et al. 2017, 3.2.3).

    The two sides count their positions apart, so nothing is rotated here.
    """

    def __init__(self, options: TransformerOptions):
        super().__init__(options)
        self.q = nn.Linear(options.width, self.q_width, bias=options.biased_qkv)
        self.kv = nn.Linear(options.width, 2 * self.kv_width, bias=options.biased_qkv)
        self.out = nn.Linear(self.q_width, options.width, bias=options.bias)

    def keys_values(self, memory_BSD: torch.Tensor) -> torch.Tensor:
        """[2, B, G, S, K]: the same at every step of decoding."""
        kv = self.kv(memory_BSD)
        return kv.view(*kv.shape[:2], 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(
        self, x_BTD: torch.Tensor, keys_values: torch.Tensor, memory_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``memory_mask``: bool [B, 1, 1, S], True on tokens, False on padding."""
        q = self.q(x_BTD)
        *split, rows, positions, _ = q.shape
        q_BHTK = q.view(rows, positions, self.heads, -1).transpose(1, 2)
        k_BGSK, v_BGSK = keys_values
        dropout = self.dropout if self.training else 0.0
        out_BHTK = attend(self.scaled(q_BHTK), k_BGSK, v_BGSK, memory_mask, dropout=dropout)
        return self.out(out_BHTK.transpose(1, 2).reshape(*split, rows, positions, self.q_width))


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,  # Hendrycks and Gimpel 2016, by the error function
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # as GPT-2 computes it
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """Two matrices with an activation between them; gated (Shazeer 2020): three, at about as many parameters.

    ``up`` of a gated one: rows of the gate, which is activated, then of what it multiplies.
    """

    def __init__(self, options: TransformerOptions):
        super().__init__()
        self.gated, self.activation = options.gated, ACTIVATIONS[options.activation]
        width, hidden = options.width, options.hidden_width
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=options.bias)
        self.out = nn.Linear(hidden, width, bias=options.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        hidden_BTF = self.up(x_BTD)
        if self.gated:
            gate, value = hidden_BTF.chunk(2, dim=-1)
            return self.out(self.activation(gate) * value)
        return self.out(self.activation(hidden_BTF))


def make_norm(options: TransformerOptions) -> nn.Module:
    """``layernorm`` (Ba et al. 2016) or ``rmsnorm`` (Zhang and Sennrich 2019, which has no bias)."""
    if options.norm == "rmsnorm":
        return nn.RMSNorm(options.width, eps=options.norm_eps)
    return nn.LayerNorm(options.width, eps=options.norm_eps, bias=options.bias)


def make_embedding_norm(options: TransformerOptions) -> nn.Module:
    """Before the first block, of the sum of the embeddings; most models have none there."""
    return make_norm(options) if options.embedding_norm else nn.Identity()


def make_last_norm(options: TransformerOptions) -> nn.Module:
    """Behind the last block; post-norm blocks end with one of their own."""
    return make_norm(options) if options.norm_first else nn.Identity()
