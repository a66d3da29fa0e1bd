"""What decoder, encoder and encoder-decoder share: options, how a token becomes a vector, how the weights start.

Shape letters:  B rows, T positions, D model width, K width of a head
"""

import math
from collections import Counter
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import nn

from hvdtrain.models.layers import KVCache, rotary_table
from hvdtrain.options import Options, option


class TransformerOptions(Options):
    layers: int = option(4, "Transformer blocks", ge=1)
    encoder_layers: int = option(
        0, "Transformer blocks of the encoder in an encoder-decoder; 0: as many as layers", ge=0
    )
    heads: int = option(4, "attention heads; must divide width", ge=1)
    kv_heads: int = option(
        0, "heads of keys and values, shared by groups of heads; must divide heads; 0: as many", ge=0
    )
    window: int = option(
        0, "positions that causal attention sees, its own and those before (tokens); 0: all; not for encoders", ge=0
    )
    width: int = option(128, "model width (residual stream)", ge=1)
    context: int = option(256, "positions a model sees at once (tokens)", ge=1)
    ff_ratio: float = option(4.0, "feed-forward width / model width", gt=0)
    positions: Literal["learned", "rotary"] = option("learned", "how positions are told apart")
    activation: Literal["gelu", "swiglu"] = option("gelu", "of the feed-forward part")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalisation before each part")
    bias: bool = option(True, "biases in linear layers and LayerNorm")
    tied: bool = option(True, "output layer shares the embedding's matrix")
    dropout: float = option(0.0, "probability, on embeddings, attention and residual branches", ge=0, lt=1)
    vocab_multiple: int = option(1, "pad the vocabulary up to a multiple of this (64 suits GPUs)", ge=1)

    def padded(self, vocab_size: int) -> int:
        """The vocabulary with its padding: rows of the embedding, columns of the output layer."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TransformerOptions":
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.width}/{self.heads}")
        return self


class Transformer(nn.Module):
    """Base of the models: the embedding and the positions. Which blocks follow, each model says itself."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        self.embedding = nn.Embedding(options.padded(vocab_size), options.width)
        self.position = nn.Embedding(options.context, options.width) if options.positions == "learned" else None
        if options.positions == "rotary":
            table = rotary_table(options.context, options.width // options.heads)
            self.register_buffer("rotary", table, persistent=False)
        self.dropout = nn.Dropout(options.dropout)

    def initialise(self, seed: int) -> None:
        """See ``initialise``, the function."""
        initialise(self, seed)

    def embed(
        self, tokens_BT: torch.Tensor, start: int = 0, positions_BT: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors [B, T, D], and the rotary table of their positions (None where positions are learned).

        Positions count from ``start``, or are ``positions_BT``: int64, 0 <= position < context, on padding too.
        """
        end = start + tokens_BT.shape[1]
        given = positions_BT is not None
        assert given or end <= self.options.context, f"{end} positions in a context of {self.options.context}"
        x_BTD = self.embedding(tokens_BT)
        if self.position is not None:
            x_BTD = x_BTD + (self.position(positions_BT) if given else self.position.weight[start:end])
            return self.dropout(x_BTD), None
        # [2, B, 1, T, K / 2]: a table for each row, shared by its heads; or [2, T, K / 2]: one for all
        rotary = self.rotary[:, positions_BT].unsqueeze(2) if given else self.rotary[:, start:end]
        return self.dropout(x_BTD), rotary

    def make_blocks(self, kind: type[nn.Module], count: int, **more: Any) -> nn.ModuleList:
        o = self.options
        sizes = (o.width, o.heads, o.ff_ratio, o.activation, o.norm, o.bias, o.dropout, o.kv_heads)
        return nn.ModuleList(kind(*sizes, **more) for _ in range(count))

    def make_head(self) -> nn.Linear:
        """From hidden states to logits over the padded vocabulary."""
        head = nn.Linear(self.options.width, self.embedding.num_embeddings, bias=False)
        if self.options.tied:
            head.weight = self.embedding.weight
        return head

    def make_cache(self, layers: int, rows: int) -> list[KVCache]:
        o = self.options
        heads, head_width = o.kv_heads or o.heads, o.width // o.heads
        return [KVCache(rows, heads, o.context, head_width, self.embedding.weight) for _ in range(layers)]


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """GPT-2's initialisation: N(0, 0.02); residual projections N(0, 0.02 / sqrt(n)); biases 0, norms 1.

    n: how many projections add to the same residual stream. 2 a block (attention, feed-forward), 3 with
    cross-attention; an encoder's stream and a decoder's are counted apart.

    Drawn on the CPU from ``seed`` alone: the same on every rank and device. Source: Radford et al. 2019, 2.3.
    """
    generator = torch.Generator().manual_seed(seed)
    added = Counter(_stream(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        stream = _stream(name)
        deviation = 0.02 / math.sqrt(added[stream]) if stream else 0.02
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))


def _stream(name: str) -> str:
    """``encoder.blocks.3.attention.out.weight`` adds to the stream of ``encoder.blocks``; "": it is no projection."""
    if name.endswith(("attention.out.weight", "feed_forward.out.weight")):
        return name.rsplit(".", 4)[0]
    return ""
