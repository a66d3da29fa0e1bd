"""What decoder, encoder and encoder-decoder share: how a token becomes a vector.

Shape letters:  B rows, T positions, D model width, K width of a head
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.cache import Cache
from hvdtrain.models.initial import initialise
from hvdtrain.models.layers import make_embedding_norm
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.positions import Sinusoids, make_table, rotary_table


class Side(NamedTuple):
    """What an encoder and a decoder may each have of its own: a table of positions, and a norm of what comes in."""

    position: nn.Embedding | Sinusoids | None
    norm: nn.Module


class Transformer(nn.Module):
    """Base of the models: the embedding and the positions. Which blocks follow, each model says itself."""

    rotary: torch.Tensor

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        self.embedding = nn.Embedding(options.padded(vocab_size), options.width)
        self.position = make_table(options)
        if options.positions == "rotary":
            table = rotary_table(options.context, options.width_of_head, options.rotary)
            self.register_buffer("rotary", table, persistent=False)
        self.token_type = nn.Embedding(options.token_types, options.width) if options.token_types else None
        self.embedding_norm = make_embedding_norm(options)
        self.dropout = nn.Dropout(options.dropout)

    def initialise(self, seed: int) -> None:
        """See models/initial.py."""
        initialise(self, self.options, seed)

    def embed(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        types_BT: torch.Tensor | None = None,
        side: Side | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors [B, T, D], and the rotary table of their positions (None where nothing is rotated).

        positions_BT: int64, 0 <= position < context, on padding too; None: 0 to T - 1.
        types_BT: int64, the kind of each token where there are ``token_types``; None: all 0.
        """
        end = tokens_BT.shape[1]
        fits = positions_BT is not None or end <= self.options.context
        assert fits, f"{end} positions in a context of {self.options.context}"
        table, norm = side or Side(self.position, self.embedding_norm)
        x_BTD = self.embedding(tokens_BT)
        if self.options.embedding_scale:
            x_BTD = x_BTD * math.sqrt(self.options.width)
        if self.token_type is not None:
            x_BTD = x_BTD + (self.token_type.weight[0] if types_BT is None else self.token_type(types_BT))
        if table is not None:
            row = self.options.position_offset
            vectors = table.weight[row : row + end] if positions_BT is None else table(row + positions_BT)
            x_BTD = x_BTD + vectors
        x_BTD = self.dropout(norm(x_BTD))
        if self.options.positions != "rotary":
            return x_BTD, None
        # [2, B, 1, T, K / 2]: a table for each row, shared by its heads; or [2, T, K / 2]: one for all
        return x_BTD, self.rotary[:, :end] if positions_BT is None else self.rotary[:, positions_BT].unsqueeze(2)

    def new_cache(self, lengths_B: torch.Tensor | None = None) -> Cache:
        """An empty cache of keys and values. lengths_B: int64, how long the prompts are; None: all alike."""
        o = self.options
        heads = o.kv_heads or o.heads
        return Cache(self.embedding.weight, o.layers, heads, o.width_of_head, o.window, lengths_B)


def refuse(options: TransformerOptions, model: str, *names: str) -> None:
    """Errors: ConfigError where an option is set that ``model`` has no use for."""
    for name in names:
        value, default = getattr(options, name), TransformerOptions.model_fields[name].default
        if value != default:
            raise ConfigError(f"model.{name}={str(value).lower()} is not for {model}; set it to {str(default).lower()}")
