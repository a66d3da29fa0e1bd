"""Decoder-only Transformer language model (Radford et al. 2019, with the common later choices as options).

Shape letters:  B rows, T positions, D model width, V vocabulary
"""

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import nn

from hvdtrain.models.layers import Block, KVCache, make_norm, rotary_table
from hvdtrain.options import Options, option


class DecoderOptions(Options):
    layers: int = option(4, "Transformer blocks", ge=1)
    heads: int = option(4, "attention heads; must divide width", ge=1)
    width: int = option(128, "model width (residual stream)", ge=1)
    context: int = option(256, "positions a model sees at once (tokens)", ge=1)
    ff_ratio: float = option(4.0, "feed-forward width / model width", gt=0)
    positions: Literal["learned", "rotary"] = option("learned", "how positions are told apart")
    activation: Literal["gelu", "swiglu"] = option("gelu", "of the feed-forward part")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalisation before each part")
    bias: bool = option(True, "biases in linear layers and LayerNorm")
    tied: bool = option(True, "output layer shares the embedding's matrix")
    dropout: float = option(0.0, "probability, on embeddings, attention and both residual branches", ge=0, lt=1)
    vocab_multiple: int = option(1, "pad the vocabulary up to a multiple of this (64 suits GPUs)", ge=1)

    @model_validator(mode="after")
    def _sizes_fit(self) -> "DecoderOptions":
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.width}/{self.heads}")
        return self


class Decoder(nn.Module):
    """``forward(tokens) -> hidden`` and ``logits(hidden)``: apart, so that a loss may avoid keeping all logits."""

    def __init__(self, options: DecoderOptions, vocab_size: int):
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        width = options.width
        padded = -(-vocab_size // options.vocab_multiple) * options.vocab_multiple
        self.embedding = nn.Embedding(padded, width)
        self.position = nn.Embedding(options.context, width) if options.positions == "learned" else None
        if options.positions == "rotary":
            self.register_buffer("rotary", rotary_table(options.context, width // options.heads), persistent=False)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(
            Block(
                width,
                options.heads,
                options.ff_ratio,
                options.activation,
                options.norm,
                options.bias,
                options.dropout,
            )
            for _ in range(options.layers)
        )
        self.norm = make_norm(options.norm, width, options.bias)
        self.head = nn.Linear(width, padded, bias=False)
        if options.tied:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """GPT-2's initialisation: N(0, 0.02); residual projections N(0, 0.02 / sqrt(2 layers)); biases 0, norms 1.

        Drawn on the CPU from ``seed`` alone: the same on every rank and device. Source: Radford et al. 2019, 2.3.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            residual = name.endswith(("attention.out.weight", "feed_forward.out.weight"))
            deviation = 0.02 / math.sqrt(2 * self.options.layers) if residual else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))

    def new_cache(self, rows: int) -> list[KVCache]:
        """An empty key/value cache, one entry a layer, for ``forward(tokens, cache)``."""
        o = self.options
        weight = self.embedding.weight
        return [KVCache(rows, o.heads, o.context, o.width // o.heads, weight) for _ in self.blocks]

    def forward(self, tokens_BT: torch.Tensor, cache: list[KVCache] | None = None) -> torch.Tensor:
        """Hidden states [B, T, D]. With a cache: the whole prefix first, later one token at a time."""
        start = cache[0].length if cache else 0
        end = start + tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT)
        if self.position is not None:
            x_BTD = x_BTD + self.position.weight[start:end]
        rotary = self.rotary[:, start:end] if self.position is None else None
        x_BTD = self.dropout(x_BTD)
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotary, cache[number] if cache else None)
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V padded] fp32 or autocast's type."""
        return self.head(hidden_BTD)
