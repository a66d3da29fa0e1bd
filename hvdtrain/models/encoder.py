"""Encoder-only Transformer, and a classifier on it (Devlin et al. 2018, "BERT", here with the norm before each part).

Shape letters:  B rows, T positions, D model width, C classes
"""

from collections.abc import Sequence

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.flops import classifier_flops, encoder_flops
from hvdtrain.models.layers import Block, make_norm
from hvdtrain.models.masks import padding_mask
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.transformer import Transformer, initialise


class Encoder(Transformer):
    """``forward(tokens, lengths) -> hidden``: every position sees the whole row up to its length."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        if options.window:
            raise ConfigError(f"model.window={options.window}: an encoder's positions see the whole row; set it to 0")
        super().__init__(options, vocab_size)
        self.blocks = nn.ModuleList(Block(options, causal=False) for _ in range(options.layers))
        self.norm = make_norm(options)

    def forward(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D]; finite and without meaning from each row's length on. Both inputs int64."""
        x_BTD, rotary = self.embed(tokens_BT)
        mask = padding_mask(lengths_B, tokens_BT.shape[1])
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary, mask=mask)
        return self.norm(x_BTD)

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return encoder_flops(self.options, rows, positions)


class Classifier(nn.Module):
    """``forward(tokens, lengths) -> logits``, from the first position's state; data prep puts a token there for it."""

    def __init__(self, options: TransformerOptions, vocab_size: int, classes: int):
        super().__init__()
        self.options, self.vocab_size, self.classes = options, vocab_size, classes
        self.encoder = Encoder(options, vocab_size)
        self.pooler = nn.Linear(options.width, options.width, bias=options.bias)
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(options.width, classes, bias=options.bias)

    def initialise(self, seed: int) -> None:
        """See ``transformer.initialise``."""
        initialise(self, seed)

    def forward(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """[B, C] fp32 or autocast's type. Both inputs int64."""
        first_BD = self.encoder(tokens_BT, lengths_B)[:, 0]
        return self.head(self.dropout(torch.tanh(self.pooler(first_BD))))

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return classifier_flops(self.options, self.classes, rows, positions)
