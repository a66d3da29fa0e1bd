"""A vocabulary whose rows are spread over the tensor axis: its embedding, its scores, their cross-entropy.

    V = 10 over 4 parts     part 0: 0 1    part 1: 2 3 4    part 2: 5 6    part 3: 7 8 9

No part ever holds the logits of a training step for the whole vocabulary. Of each target a part tells the others what
its own logits come to, a few numbers; from these all of them have log Z (Shoeybi et al. 2019, "Megatron-LM", 3):

    part p      m = max, s = sum of exp(logit - m), t = the target's logit, where it is p's (else 0)
    gathered    M = max of m;  log Z = M + log(sum of s exp(m - M));  loss = log Z - sum of t

Shape letters:  N targets, D model width, V vocabulary (padded), W its words on this part
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.cut.crossings import Parts, sum_gradients, sum_of_parts
from hvdtrain.data.sampler import even_parts
from hvdtrain.models.heads import MaskedHead, OutputHead
from hvdtrain.models.losses import LossTerms, chunk_rows, linear_cross_entropy


@dataclass(frozen=True)
class Words:
    """Who has which of ``whole`` words."""

    parts: Parts
    whole: int

    @property
    def first(self) -> int:
        return even_parts(self.whole, self.parts.size)[self.parts.rank][0]

    @property
    def count(self) -> int:
        return even_parts(self.whole, self.parts.size)[self.parts.rank][1]

    @property
    def most(self) -> int:
        """That a part has."""
        return max(count for _, count in even_parts(self.whole, self.parts.size))

    def own(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Their places here, 0 for those of others; and which are here: bool."""
        places = tokens - self.first
        here = (places >= 0) & (places < self.count)
        return places.where(here, 0), here

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The parts' values of their own words [..., W], one after another: [..., V]."""
        padded = F.pad(values, (0, self.most - self.count))[None]
        gathered = self.parts.axis.gather(padded.contiguous(), 0)
        counts = [count for _, count in even_parts(self.whole, self.parts.size)]
        return torch.cat([part[..., :count] for part, count in zip(gathered, counts, strict=True)], dim=-1)


class SpreadEmbedding(nn.Embedding):
    """``weight``: [W, D]. Every token's vector is one part's: the sum over the parts is exact."""

    words: Words

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., D], the same on all parts."""
        places, here = self.words.own(tokens)
        return sum_of_parts(super().forward(places) * here[..., None], self.words.parts)


class SpreadHead(OutputHead):
    """``weight``: [W, D]; ``bias``: [W] or None. What goes in and what comes out is the same on all parts."""

    words: Words

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary, for what has no gradient: [..., D] -> [..., V]."""
        return self.words.gather(super().forward(hidden))

    def cross_entropy(self, features: torch.Tensor, targets: torch.Tensor, terms: LossTerms) -> torch.Tensor:
        words = self.words
        rows = chunk_rows(features.device.type, words.most)  # of all parts alike: they meet once a chunk
        features = sum_gradients(features, words.parts)
        return linear_cross_entropy(features, self.weight, targets, terms, rows, self.bias, _Scoring(words))

    def best(self, features: torch.Tensor) -> torch.Tensor:
        words = self.words
        found = []
        for chunk in features.split(chunk_rows(features.device.type, words.most)):
            values, places = F.linear(chunk, self.weight, self.bias).max(-1)
            told = torch.stack([values.double(), (places + words.first).double()])[None]
            values_PN, words_PN = words.parts.axis.gather(told, 0).unbind(1)
            found.append(words_PN.gather(0, values_PN.argmax(0, keepdim=True))[0].long())
        return torch.cat(found) if found else features.new_zeros(0, dtype=torch.int64)


class SpreadMaskedHead(SpreadHead, MaskedHead):
    """The same behind BERT's matrix and norm, which all parts have."""


HEADS: dict[type[OutputHead], type[SpreadHead]] = {OutputHead: SpreadHead, MaskedHead: SpreadMaskedHead}


@dataclass(frozen=True)
class _Scoring:
    """``losses.Score`` of logits over this part's words: the loss of all, and the gradient of its own logits."""

    words: Words

    def __call__(
        self, logits: torch.Tensor, targets: torch.Tensor, terms: LossTerms, with_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        counts, smoothing = targets != terms.ignore, terms.label_smoothing
        places, here = self.words.own(targets)
        own = logits.float()
        own_most = own.amax(1)
        picked = own.gather(1, places[:, None]).squeeze(1) * here
        mean = own.sum(1) / self.words.whole if smoothing else torch.zeros_like(picked)
        exp = (own - own_most[:, None]).exp_()
        told = torch.stack([own_most, exp.sum(1), picked, mean])[None]
        mosts, sums, pickeds, means = self.words.parts.axis.gather(told, 0).unbind(1)
        most = mosts.amax(0)
        log_z = most + (sums * (mosts - most).exp()).sum(0).log()
        losses = log_z - pickeds.sum(0)
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (log_z - means.sum(0))
        slope = counts.float()  # d loss / d log Z
        if terms.z_loss:
            losses = losses + terms.z_loss * log_z.square()
            slope = slope * (1 + 2 * terms.z_loss * log_z)
        total = (losses * counts).sum()
        if not with_grad:
            return total, None
        grad = exp.mul_((slope * (own_most - log_z).exp())[:, None])
        if smoothing:
            grad -= (counts * (smoothing / self.words.whole))[:, None]
        grad.scatter_add_(1, places[:, None], (counts * here * (smoothing - 1.0))[:, None])
        return total, grad.to(logits.dtype)
