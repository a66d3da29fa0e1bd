"""Encoder-only Transformer, and what is made of one: a classifier, a masked language model, a finder of answers.

Source: Devlin et al. 2018, "BERT".

Shape letters:  B rows, T positions, D model width, C classes, V vocabulary (padded)
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.flops import classifier_flops, encoder_flops, masked_flops, span_flops
from hvdtrain.models.heads import MaskedHead, SpanHead
from hvdtrain.models.initial import initialise
from hvdtrain.models.layers import Block, make_last_norm
from hvdtrain.models.masks import padding_mask
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.positions import make_relative_bias
from hvdtrain.models.transformer import Transformer, refuse


class Encoder(Transformer):
    """``forward(tokens, lengths) -> hidden``: every position sees the whole row up to its length."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        if options.window:
            raise ConfigError(f"model.window={options.window}: an encoder's positions see the whole row; set it to 0")
        refuse(options, "an encoder alone", "separate_positions")
        super().__init__(options, vocab_size)
        self.relative = make_relative_bias(options, causal=False)
        self.blocks = nn.ModuleList(Block(options, causal=False) for _ in range(options.layers))
        self.norm = make_last_norm(options)

    def forward(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [B, T, D]; finite and without meaning from each row's length on. All inputs int64.

        types_BT: the kind of each token, below ``token_types``; None: all 0.
        """
        x_BTD, rotary = self.embed(tokens_BT, types_BT=types_BT)
        mask = padding_mask(lengths_B, tokens_BT.shape[1])
        if self.relative is not None:
            mask = self.relative(tokens_BT.shape[1], mask)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary, mask=mask)
        return self.norm(x_BTD)

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return encoder_flops(self.options, rows, positions)


class OnEncoder(nn.Module):
    """Base of what is made of an encoder: ``encoder``, and a ``head`` of each one's own."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        self.encoder = Encoder(options, vocab_size)

    def initialise(self, seed: int) -> None:
        """See models/initial.py."""
        initialise(self, self.options, seed)


class Classifier(OnEncoder):
    """``forward(tokens, lengths) -> logits``, from the first position's state; data prep puts a token there for it.

    several: a row may have several of the classes, each yes or no. Then each begins at the probability 1 / classes, by
    its bias (Lin et al. 2017, "Focal Loss", 3.3): from 1 / 2 the way to the rare ones' no is the shortest through the
    pooler, which then says the same of all texts, and stays so.
    """

    def __init__(self, options: TransformerOptions, vocab_size: int, classes: int, several: bool = False):
        super().__init__(options, vocab_size)
        self.classes, self._several = classes, several
        self.pooler = nn.Linear(options.width, options.width, bias=options.bias)
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(options.width, classes, bias=options.bias)

    def initialise(self, seed: int) -> None:
        super().initialise(seed)
        if self._several and self.head.bias is not None and self.classes > 1:
            nn.init.constant_(self.head.bias, -math.log(self.classes - 1))

    def forward(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, C] fp32 or autocast's type. Inputs as of ``Encoder``."""
        first_BD = self.encoder(tokens_BT, lengths_B, types_BT)[:, 0]
        return self.head(self.dropout(torch.tanh(self.pooler(first_BD))))

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return classifier_flops(self.options, self.classes, rows, positions)


class MaskedLanguageModel(OnEncoder):
    """``forward(tokens, lengths) -> hidden`` of all positions; ``head`` is for those of them that were masked."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__(options, vocab_size)
        self.head = MaskedHead(options, self.encoder.embedding)

    def forward(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As of ``Encoder``."""
        return self.encoder(tokens_BT, lengths_B, types_BT)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V] fp32 or autocast's type."""
        return self.head(hidden)

    def training_flops(self, shape: Sequence[int], masked: int) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T), of which ``masked`` are scored."""
        rows, positions = shape
        return masked_flops(self.options, self.vocab_size, rows, positions, masked)


class SpanModel(OnEncoder):
    """``forward(tokens, lengths) -> logits`` of an answer's first and last position."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__(options, vocab_size)
        self.head = SpanHead(options)

    def forward(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, T, 2] fp32 or autocast's type; on padding without meaning. Inputs as of ``Encoder``."""
        return self.head(self.encoder(tokens_BT, lengths_B, types_BT))

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return span_flops(self.options, rows, positions)
