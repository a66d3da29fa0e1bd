"""What decoder, encoder and encoder-decoder share: how a token becomes a vector, how the weights start.

Shape letters:  B rows, T positions, D model width, K width of a head
"""

import math
from collections import Counter

import torch
from torch import nn

from hvdtrain.models.cache import Cache
from hvdtrain.models.layers import rotary_table
from hvdtrain.models.options import TransformerOptions


class Transformer(nn.Module):
    """Base of the models: the embedding and the positions. Which blocks follow, each model says itself."""

    rotary: torch.Tensor

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

    def new_cache(self, lengths_B: torch.Tensor | None = None) -> Cache:
        """An empty cache of keys and values. lengths_B: int64, how long the prompts are; None: all alike."""
        o = self.options
        heads, head_width = o.kv_heads or o.heads, o.width // o.heads
        return Cache(self.embedding.weight, o.layers, heads, head_width, o.window, lengths_B)


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
