"""Encoder-decoder Transformer (Vaswani et al. 2017).

One embedding serves source and target, and its matrix the output too where tied. So does one table of positions, unless
each side is to have its own (``separate_positions``). Relative positions and norms of embeddings are of one side.

Shape letters:  B rows, S source positions, T target positions, D model width, V vocabulary
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from hvdtrain.models.cache import Cache, LayerCache
from hvdtrain.models.flops import seq2seq_flops
from hvdtrain.models.heads import OutputHead
from hvdtrain.models.layers import Block, CrossBlock, make_embedding_norm, make_last_norm
from hvdtrain.models.masks import padding_mask
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.positions import make_relative_bias, make_table
from hvdtrain.models.transformer import Side, Transformer, refuse


class Seq2Seq(Transformer):
    """``forward(source, source_lengths, tokens) -> hidden`` and ``logits(hidden)``.

    Token by token: ``cache = new_cache()`` and ``read(source, source_lengths, cache)``, then ``decode`` each time.
    """

    def __init__(self, options: TransformerOptions, vocab_size: int):
        refuse(options, "an encoder-decoder", "token_types")
        super().__init__(options, vocab_size)
        self.relative = make_relative_bias(options, causal=True)
        self.encoder_position = make_table(options) if options.separate_positions else None
        self.encoder_relative = make_relative_bias(options, causal=False)
        self.encoder_embedding_norm = make_embedding_norm(options)
        encoder_layers = options.encoder_layers or options.layers
        self.encoder_blocks = nn.ModuleList(Block(options, causal=False) for _ in range(encoder_layers))
        self.encoder_norm = make_last_norm(options)
        self.blocks = nn.ModuleList(CrossBlock(options) for _ in range(options.layers))
        self.norm = make_last_norm(options)
        self.head = OutputHead(options, self.embedding)

    def encode(self, source_BS: torch.Tensor, source_lengths_B: torch.Tensor) -> torch.Tensor:
        """The memory [B, S, D]; finite and without meaning from each source's length on. Both inputs int64."""
        own = Side(self.encoder_position or self.position, self.encoder_embedding_norm)
        x_BSD, rotary = self.embed(source_BS, side=own)
        mask = padding_mask(source_lengths_B, source_BS.shape[1])
        if self.encoder_relative is not None:
            mask = self.encoder_relative(source_BS.shape[1], mask)
        for block in self.encoder_blocks:
            x_BSD = block(x_BSD, rotary, mask=mask)
        return self.encoder_norm(x_BSD)

    def forward(self, source_BS: torch.Tensor, source_lengths_B: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] of all target positions at once. All inputs int64.

        Targets are padded at their end, where no earlier position looks.
        """
        memory_BSD = self.encode(source_BS, source_lengths_B)
        memory_mask = padding_mask(source_lengths_B, source_BS.shape[1])
        x_BTD, rotary = self.embed(tokens_BT)
        mask = None if self.relative is None else self.relative(tokens_BT.shape[1])
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary, None, mask, memory_BSD, memory_mask)
        return self.norm(x_BTD)

    def read(self, source_BS: torch.Tensor, source_lengths_B: torch.Tensor, cache: Cache) -> None:
        """Encode the sources and put what every step of decoding needs of them into ``cache``."""
        memory_BSD = self.encode(source_BS, source_lengths_B)
        layers = [cast(CrossBlock, block).cross_attention for block in self.blocks]
        cache.memory = torch.stack([layer.keys_values(memory_BSD) for layer in layers])
        cache.memory_mask = padding_mask(source_lengths_B, source_BS.shape[1])

    def decode(self, tokens_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden states [B, T, D] of what begins the targets, padded at its end; from the second call on of one more
        token of each of T branches. See models/cache.py.
        """
        positions_BT, mask = cache.place(*tokens_BT.shape)
        if self.relative is not None:
            mask = self.relative.of_cache(cache, positions_BT, mask)
        x_BTD, rotary = self.embed(tokens_BT, positions_BT=positions_BT)
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotary, LayerCache(cache, number), mask, None, cache.memory_mask)
        return self.norm(x_BTD)

    def training_flops(self, source_shape: Sequence[int], shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over sources of ``source_shape`` (B, S) and targets of ``shape`` (B, T);
        see models/flops.py.
        """
        rows, positions = shape
        return seq2seq_flops(self.options, self.vocab_size, rows, source_shape[1], positions)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V padded] fp32 or autocast's type."""
        return self.head(hidden_BTD)
