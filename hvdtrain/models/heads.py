"""What turns hidden states into scores.

Shape letters:  D model width, V vocabulary (padded)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.models.layers import ACTIVATIONS, make_norm
from hvdtrain.models.losses import LossTerms, chunk_rows, linear_cross_entropy
from hvdtrain.models.options import TransformerOptions


class OutputHead(nn.Linear):
    """Scores of the next token over the padded vocabulary: ``features(hidden) @ weight.T + bias``.

    ``features`` apart, so that a loss may score a few rows at a time and keep no logits (losses.py).

    weight: [V, D], the embedding's own where ``tied``. bias: [V], None without ``head_bias``.
    """

    def __init__(self, options: TransformerOptions, embedding: nn.Embedding):
        super().__init__(options.width, embedding.num_embeddings, bias=options.head_bias)
        if options.tied:
            self.weight = embedding.weight
        self.scale = 1 / math.sqrt(options.width) if options.head_scale else 1.0

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """What ``weight`` multiplies: [..., D] -> [..., D]. T5 scales it where the matrix is the embedding's."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits: [..., D] -> [..., V]."""
        return F.linear(self.features(hidden), self.weight, self.bias)

    def cross_entropy(self, features_ND: torch.Tensor, targets_N: torch.Tensor, terms: LossTerms) -> torch.Tensor:
        """See ``linear_cross_entropy``: fp32 scalar, the SUM over the targets."""
        return linear_cross_entropy(features_ND, self.weight, targets_N, terms, bias=self.bias)

    def best(self, features_ND: torch.Tensor) -> torch.Tensor:
        """The token of the highest score, int64 [N]; the logits of a few rows at a time."""
        rows = chunk_rows(features_ND.device.type, len(self.weight))
        return torch.cat([F.linear(part, self.weight, self.bias).argmax(-1) for part in features_ND.split(rows)])


class MaskedHead(OutputHead):
    """BERT's: what was hidden behind a mask. A matrix, the activation and a norm come before the product.

    They need be made for the masked positions alone: ``features(hidden[masked])``.
    """

    def __init__(self, options: TransformerOptions, embedding: nn.Embedding):
        super().__init__(options, embedding)
        self.dense = nn.Linear(options.width, options.width, bias=options.bias)
        self.activation = ACTIVATIONS[options.activation]
        self.norm = make_norm(options)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        active = self.activation(self.dense(hidden)).to(self.dense.weight.dtype)  # not autocast's, on a CPU either
        return super().features(self.norm(active))


class SpanHead(nn.Linear):
    """Scores of each position as the first and as the last of an answer: [..., D] -> [..., 2]."""

    def __init__(self, options: TransformerOptions):
        super().__init__(options.width, 2, bias=options.bias)
