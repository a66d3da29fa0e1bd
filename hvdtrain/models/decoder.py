"""Decoder-only Transformer language model (Radford et al. 2019, with the common later choices as options).

Shape letters:  B rows, T positions, D model width, V vocabulary
"""

import torch

from hvdtrain.models.layers import Block, KVCache, make_norm
from hvdtrain.models.masks import packed_mask
from hvdtrain.models.transformer import Transformer, TransformerOptions


class Decoder(Transformer):
    """``forward(tokens) -> hidden`` and ``logits(hidden)``: apart, so that a loss may avoid keeping all logits."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__(options, vocab_size)
        self.blocks = self.make_blocks(Block, options.layers)
        self.norm = make_norm(options.norm, options.width, options.bias)
        self.head = self.make_head()

    def new_cache(self, rows: int) -> list[KVCache]:
        """An empty key/value cache, one entry a layer, for ``forward(tokens, cache)``."""
        return self.make_cache(self.options.layers, rows)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        cache: list[KVCache] | None = None,
        positions_BT: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D]. With a cache: the whole prefix first, later one token at a time.

        Rows packed with several documents, int64 each, without a cache:
        positions_BT: each token's position in its own document, below the context; any on padding.
        segments_BT: each token's document, numbered within the row, -1 on padding; no document sees another.
        """
        assert cache is None or (positions_BT is None and segments_BT is None), "packed rows have no cache"
        x_BTD, rotary = self.embed(tokens_BT, cache[0].length if cache else 0, positions_BT)
        mask = packed_mask(segments_BT) if segments_BT is not None else None
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotary, cache[number] if cache else None, mask)
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V padded] fp32 or autocast's type."""
        return self.head(hidden_BTD)
