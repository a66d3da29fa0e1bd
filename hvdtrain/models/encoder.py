"""Encoder-only Transformer, and what is made of one: a classifier, a masked language model, a finder of answers.

Source: Devlin et al. 2018, "BERT".

Shape letters:  B rows, T positions, D model width, C classes, V vocabulary (padded)
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.draws import END
from hvdtrain.models.flops import classifier_flops, encoder_flops, masked_flops, span_flops
from hvdtrain.models.heads import MaskedHead, SpanHead
from hvdtrain.models.initial import fill, initial
from hvdtrain.models.layers import Block, make_last_norm
from hvdtrain.models.masks import padding_mask
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Flow, Piece, Staged, block_pieces, is_here
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
        self.number_blocks()

    def pieces(self) -> list[Piece]:
        return [
            Piece("embed", ("embedding", "position", "token_type", "embedding_norm")),
            *block_pieces("blocks", self.options.layers, ("attention", "feed_forward"), also="relative"),
            Piece("end", ("norm",)),
        ]

    def forward(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [B, T, D]; finite and without meaning from each row's length on. All inputs int64.

        types_BT: the kind of each token, below ``token_types``; None: all 0.
        """
        return self.stage((), tokens_BT, lengths_B, types_BT)[-1]

    def stage(
        self, flow: Flow, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> Flow:
        """Flow: hidden states [B, T, D]."""
        x_BTD = flow[0] if flow else self.embed(tokens_BT, types_BT=types_BT)
        rotary, mask = self.turns(tokens_BT.shape[1]), padding_mask(lengths_B, tokens_BT.shape[1])
        if is_here(self.relative):
            mask = self.relative(tokens_BT.shape[1], mask)
        for block in self.blocks:
            if self.enters(block, x_BTD):
                x_BTD = block(x_BTD, rotary, mask=mask)
        return (self.out_of_blocks(self.norm(x_BTD)),) if self.has("end") else (x_BTD,)

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return encoder_flops(self.options, rows, positions, self.trained)


class OnEncoder(Staged):
    """Base of what is made of an encoder: ``encoder``, and a ``head`` of each one's own.

    own: the modules behind the encoder, by name; ``finish`` runs them.
    """

    own: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        self.encoder = Encoder(options, vocab_size)
        self.draws = self.encoder.draws

    def initial(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """See models/initial.py."""
        return initial(self, self.options, seed)

    def initialise(self, seed: int) -> None:
        """Fill the model with ``initial``'s."""
        fill(self, self.initial(seed))

    def pieces(self) -> list[Piece]:
        *before, end = (
            piece._replace(needs=tuple(f"encoder.{name}" for name in piece.needs)) for piece in self.encoder.pieces()
        )
        return [*before, end._replace(needs=(*end.needs, *self.own))]

    def forward(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What ``finish`` says of it. Inputs as of ``Encoder``."""
        return self.stage((), tokens_BT, lengths_B, types_BT)[-1]

    def stage(
        self, flow: Flow, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, types_BT: torch.Tensor | None = None
    ) -> Flow:
        """Flow: the encoder's hidden states [B, T, D]."""
        (hidden_BTD,) = self.encoder.stage(flow, tokens_BT, lengths_B, types_BT)
        return (self.finish(hidden_BTD),) if self.has("end") else (hidden_BTD,)

    def finish(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What the model returns, of the encoder's hidden states."""
        raise NotImplementedError


class Classifier(OnEncoder):
    """``forward(tokens, lengths) -> logits``, from the first position's state; data prep puts a token there for it.

    several: a row may have several of the classes, each yes or no. Then each begins at the probability 1 / classes, by
    its bias (Lin et al. 2017, "Focal Loss", 3.3): from 1 / 2 the way to the rare ones' no is the shortest through the
    pooler, which then says the same of all texts, and stays so.
    """

    own = ("pooler", "head")

    def __init__(self, options: TransformerOptions, vocab_size: int, classes: int, several: bool = False):
        super().__init__(options, vocab_size)
        self.classes, self._several = classes, several
        self.pooler = nn.Linear(options.width, options.width, bias=options.bias)
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(options.width, classes, bias=options.bias)

    def initial(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().initial(seed):
            is_rare = name == "head.bias" and self._several and self.classes > 1
            yield name, tensor.fill_(-math.log(self.classes - 1)) if is_rare else tensor

    def finish(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, C] fp32 or autocast's type."""
        self.draws.at(END)
        return self.head(self.dropout(torch.tanh(self.pooler(hidden_BTD[:, 0]))))

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return classifier_flops(self.options, self.classes, rows, positions, self.trained)


class MaskedLanguageModel(OnEncoder):
    """``forward(tokens, lengths) -> hidden`` of all positions; ``head`` is for those of them that were masked.

    Where the head's scores are products with the embeddings, its own matrix begins as the identity: what attention
    brings to a masked position then counts for its own token from the first step on. Behind a random matrix, BERT's
    own beginning, that must be learned first, which takes a small model most of a short run.
    """

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__(options, vocab_size)
        self.head = MaskedHead(options, self.encoder.embedding)

    def initial(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().initial(seed):
            is_turned = name == "head.dense.weight" and self.options.tied
            yield name, torch.eye(len(tensor), device="cpu") if is_turned else tensor

    def finish(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D], as it is."""
        return hidden_BTD

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V] fp32 or autocast's type."""
        return self.head(hidden)

    def training_flops(self, shape: Sequence[int], masked: int) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T), of which ``masked`` are scored."""
        rows, positions = shape
        return masked_flops(self.options, self.vocab_size, rows, positions, masked, self.trained)


class SpanModel(OnEncoder):
    """``forward(tokens, lengths) -> logits`` of an answer's first and last position."""

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__(options, vocab_size)
        self.head = SpanHead(options)

    def finish(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, 2] fp32 or autocast's type; on padding without meaning."""
        return self.head(hidden_BTD)

    def training_flops(self, shape: Sequence[int]) -> int:
        """Model FLOPs of forward and backward over tokens of ``shape`` (B, T); see models/flops.py."""
        rows, positions = shape
        return span_flops(self.options, rows, positions, self.trained)
