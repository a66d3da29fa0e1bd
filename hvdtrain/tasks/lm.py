"""Language-model pretraining: predict the next token."""

import math

import torch.nn.functional as F
from torch import nn

from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.tasks.task import LossSum


class LanguageModel:
    """Cross-entropy of the next token, in nats, summed over the targets that count."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        logits = model.logits(model(batch.tokens))
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return LossSum(total, batch.target_tokens)

    def scores(self, total: float, weight: float) -> dict[str, float]:
        loss = total / weight
        return {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
