"""Decoder-only Transformer language model (Radford et al. 2019, with the common later choices as options).

Shape letters:  B rows, T positions, D model width, V vocabulary
"""

from collections.abc import Sequence

import torch
from torch import nn

from hvdtrain.models.attention import Runs, document_runs, product_dtype, row_runs, runs_fit
from hvdtrain.models.cache import Cache, LayerCache
from hvdtrain.models.flops import decoder_flops, packed_pairs
from hvdtrain.models.heads import OutputHead
from hvdtrain.models.layers import Block, make_last_norm
from hvdtrain.models.masks import packed_mask, window_mask
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Flow, Piece, block_pieces, is_here
from hvdtrain.models.positions import make_relative_bias
from hvdtrain.models.transformer import Transformer, refuse


class Decoder(Transformer):
    """``forward(tokens) -> hidden`` and ``logits(hidden)``: apart, so that a loss may avoid keeping all logits."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        refuse(options, "a decoder", "token_types", "separate_positions")
        super().__init__(options, vocab_size)
        self.relative = make_relative_bias(options, causal=True)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = make_last_norm(options)
        self.head = OutputHead(options, self.embedding)
        self.number_blocks()

    def pieces(self) -> list[Piece]:
        return [
            Piece("embed", ("embedding", "position", "embedding_norm")),
            *block_pieces("blocks", self.options.layers, ("attention", "feed_forward"), also="relative"),
            Piece("end", ("norm", "head")),
        ]

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D]. Rows packed with several documents, int64 each:

        positions_BT: each token's position in its own document, below the context; any on padding.
        segments_BT: each token's document, numbered within the row, -1 on padding; no document sees another.
            It may stay on the host: a GPU then need not be waited for.
        """
        return self.stage((), tokens_BT, positions_BT, segments_BT)[-1]

    def stage(
        self,
        flow: Flow,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
    ) -> Flow:
        """Flow: hidden states [B, T, D]."""
        x_BTD = flow[0] if flow else self.embed(tokens_BT, positions_BT)
        rotary, mask = self.turns(tokens_BT.shape[1], positions_BT), self._sight(tokens_BT, segments_BT)
        for block in self.blocks:
            if self.enters(block, x_BTD):
                x_BTD = block(x_BTD, rotary, mask=mask)
        return (self.out_of_blocks(self.norm(x_BTD)),) if self.has("end") else (x_BTD,)

    def decode(self, tokens_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden states [B, T, D] of prompts, padded at their end; from the second call on of one more token of each
        of T branches. The last of a prompt of n tokens is at n - 1. See models/cache.py.
        """
        return self.decode_stage((), tokens_BT, cache)[-1]

    def decode_stage(self, flow: Flow, tokens_BT: torch.Tensor, cache: Cache) -> Flow:
        """``decode`` of what is here; each stage has a cache of its own."""
        positions_BT, mask = cache.place(*tokens_BT.shape)
        if is_here(self.relative):
            mask = self.relative.of_cache(cache, positions_BT, mask)
        x_BTD = flow[0] if flow else self.embed(tokens_BT, positions_BT)
        rotary = self.turns(tokens_BT.shape[1], positions_BT)
        for number, block in enumerate(self.blocks_here()):
            x_BTD = block(x_BTD, rotary, LayerCache(cache, number), mask)
        return (self.norm(x_BTD),)

    def _sight(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None) -> torch.Tensor | Runs | None:
        """Who sees whom, for all layers; None: as the blocks were made, causal and with their window."""
        o, device, positions = self.options, tokens_BT.device, tokens_BT.shape[1]
        if is_here(self.relative):
            return self.relative(positions, None if segments_BT is None else packed_mask(segments_BT.to(device)))
        dtype = product_dtype(self.any_weight)
        fit = runs_fit(device, dtype, o.width_of_head, o.dropout if self.training else 0.0)
        if segments_BT is None:  # flash attention knows windows by itself
            windowed = 0 < o.window < positions
            return row_runs(tokens_BT) if windowed and fit and device.type == "cuda" else None
        if fit:
            return document_runs(segments_BT, device)
        mask = packed_mask(segments_BT.to(device))
        return mask & window_mask(positions, o.window, device) if o.window else mask

    def training_flops(self, shape: Sequence[int], segments_BT: torch.Tensor | None = None) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py.

        segments_BT: as in ``forward``. Those on a device are not looked at, since it would have to be waited for: then
        each row counts as one document, whose attention is more than is done.
        """
        rows, positions = shape
        pairs = None
        if segments_BT is not None and segments_BT.device.type == "cpu":
            pairs = packed_pairs(segments_BT, self.options.window)
        return decoder_flops(self.options, self.vocab_size, rows, positions, pairs, self.trained)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V padded] fp32 or autocast's type."""
        return self.head(hidden_BTD)
