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
from hvdtrain.models.pieces import Flow, Kind, Piece, block_pieces, is_here
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
        self.number_blocks()

    def pieces(self) -> list[Piece]:
        o, table = self.options, "position" if self.encoder_position is None else "encoder_position"
        own: tuple[Kind, ...] = ("attention", "feed_forward")
        return [
            Piece("embed", ("embedding", table, "encoder_embedding_norm"), of_encoder=True),
            *block_pieces("encoder_blocks", len(self.encoder_blocks), own, of_encoder=True, also="encoder_relative"),
            Piece("bridge", ("encoder_norm", "embedding", "position", "embedding_norm")),
            *block_pieces("blocks", o.layers, ("attention", "cross_attention", "feed_forward"), also="relative"),
            Piece("end", ("norm", "head")),
        ]

    def forward(self, source_BS: torch.Tensor, source_lengths_B: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] of all target positions at once. All inputs int64.

        Targets are padded at their end, where no earlier position looks.
        """
        return self.stage((), source_BS, source_lengths_B, tokens_BT)[-1]

    def stage(
        self, flow: Flow, source_BS: torch.Tensor, source_lengths_B: torch.Tensor, tokens_BT: torch.Tensor
    ) -> Flow:
        """Flow: the encoder's hidden states [B, S, D] on its side; from the bridge on the memory [B, S, D] and the
        decoder's hidden states [B, T, D].
        """
        if len(flow) < 2:
            flow = self._encode_stage(flow, source_BS, source_lengths_B)
            if not self.has("bridge"):
                return flow
            flow = (*flow, self.embed(tokens_BT))
        memory_BSD, x_BTD = flow
        memory_mask = padding_mask(source_lengths_B, source_BS.shape[1])
        rotary = self.turns(tokens_BT.shape[1])
        mask = self.relative(tokens_BT.shape[1]) if is_here(self.relative) else None
        for block in self.blocks:
            if self.enters(block, x_BTD):
                x_BTD = block(x_BTD, rotary, None, mask, memory_BSD, memory_mask)
        return memory_BSD, self.out_of_blocks(self.norm(x_BTD)) if self.has("end") else x_BTD

    def encode(self, source_BS: torch.Tensor, source_lengths_B: torch.Tensor) -> torch.Tensor:
        """The memory [B, S, D]; finite and without meaning from each source's length on. Both inputs int64."""
        return self._encode_stage((), source_BS, source_lengths_B)[-1]

    def _encode_stage(self, flow: Flow, source_BS: torch.Tensor, source_lengths_B: torch.Tensor) -> Flow:
        own = Side(self.encoder_position or self.position, self.encoder_embedding_norm, place=1)
        x_BSD = flow[0] if flow else self.embed(source_BS, side=own)
        rotary, mask = self.turns(source_BS.shape[1]), padding_mask(source_lengths_B, source_BS.shape[1])
        if is_here(self.encoder_relative):
            mask = self.encoder_relative(source_BS.shape[1], mask)
        for block in self.encoder_blocks:
            if self.enters(block, x_BSD):
                x_BSD = block(x_BSD, rotary, mask=mask)
        return (self.encoder_norm(x_BSD) if self.has("bridge") else x_BSD,)

    def read(self, source_BS: torch.Tensor, source_lengths_B: torch.Tensor, cache: Cache) -> None:
        """Encode the sources and put what every step of decoding needs of them into ``cache``."""
        self.read_stage((), source_BS, source_lengths_B, cache)

    def read_stage(self, flow: Flow, source_BS: torch.Tensor, source_lengths_B: torch.Tensor, cache: Cache) -> Flow:
        """``read`` of what is here. Flow: the encoder's hidden states, from the bridge on the memory twice: two
        tensors say that it is ready.
        """
        if len(flow) < 2:
            flow = self._encode_stage(flow, source_BS, source_lengths_B)
            if not self.has("bridge"):
                return flow
            flow = (flow[0], flow[0])
        layers = [cast(CrossBlock, block).cross_attention for block in self.blocks_here()]
        read = [layer.keys_values(flow[0]) if is_here(layer) else None for layer in layers]
        if some := [one for one in read if one is not None]:
            cache.memory = torch.stack([torch.zeros_like(some[0]) if one is None else one for one in read])
            cache.memory_mask = padding_mask(source_lengths_B, source_BS.shape[1])
        return flow

    def decode(self, tokens_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden states [B, T, D] of what begins the targets, padded at its end; from the second call on of one more
        token of each of T branches. See models/cache.py.
        """
        return self.decode_stage((), tokens_BT, cache)[-1]

    def decode_stage(self, flow: Flow, tokens_BT: torch.Tensor, cache: Cache) -> Flow:
        """``decode`` of what is here; each stage has a cache of its own. Flow: the decoder's hidden states."""
        positions_BT, mask = cache.place(*tokens_BT.shape)
        if is_here(self.relative):
            mask = self.relative.of_cache(cache, positions_BT, mask)
        x_BTD = flow[0] if flow else self.embed(tokens_BT, positions_BT)
        rotary = self.turns(tokens_BT.shape[1], positions_BT)
        for number, block in enumerate(self.blocks_here()):
            x_BTD = block(x_BTD, rotary, LayerCache(cache, number), mask, None, cache.memory_mask)
        return (self.norm(x_BTD),)

    def training_flops(self, source_shape: Sequence[int], shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over sources of ``source_shape`` (B, S) and targets of ``shape`` (B, T);
        see models/flops.py.
        """
        rows, positions = shape
        return seq2seq_flops(self.options, self.vocab_size, rows, source_shape[1], positions, self.trained)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V padded] fp32 or autocast's type."""
        return self.head(hidden_BTD)
