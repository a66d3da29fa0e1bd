"""Beam search over a batch of rows: which beams go on, which hypotheses are kept, when a row has ended.

The rules, and so the results, are those of transformers 5:

- each step looks at the 2 N best continuations of a row; those that end a text end a beam only if they are among the N
  best of them, and the N best of those that end nothing go on;
- the score of a hypothesis is its sum of log p / n^length_penalty, over its n new tokens, the end's among them;
- the N best hypotheses are kept. A row ends when it has N and the best beam cannot win any more; what that means,
  ``early_stopping`` says.

Shape letters:  B rows (inputs), N beams of a row, C candidates of a row, V vocabulary, L tokens of a text
"""

from collections.abc import Sequence

import torch

from hvdtrain.tasks.next_token import likeliest
from hvdtrain.tasks.search_options import SearchOptions

NEVER = -1e9  # the score of what does not exist; below all real ones


class Beams:
    """Of a batch. ``values_BN``: sums of log p. ``text_BNL``: tokens so far, -1 before the shorter ones.

    ``count_B``, ``limit_B``: how many were added, and may be. ``has_ended``: bool [B], of which no more is to come.
    """

    def __init__(
        self,
        options: SearchOptions,
        stop: int | None,
        texts: Sequence[Sequence[int]],
        counts: Sequence[int],
        values: Sequence[float],
        limits: Sequence[int],
        device: torch.device,
    ):
        """texts: what rows begin with, of which ``counts`` tokens were added before, with these sums of log p."""
        rows, beams = len(texts), options.beam
        self._options, self._stop = options, stop
        width = max(map(len, texts))
        begun = torch.tensor([[-1] * (width - len(text)) + list(text) for text in texts], device=device)
        self.text_BNL = begun.long().reshape(rows, 1, width).repeat(1, beams, 1)
        self.count_B, self.limit_B = torch.tensor(counts, device=device), torch.tensor(limits, device=device)
        self.values_BN = torch.full((rows, beams), NEVER, device=device)
        self.values_BN[:, 0] = torch.tensor(values, device=device)
        self.has_ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._scores_BN = torch.full((rows, beams), NEVER, device=device)  # of hypotheses, from the best down
        self._kept_BN = torch.zeros(rows, beams, dtype=torch.bool, device=device)
        self._texts_BNL = self.text_BNL

    def candidates(self, log_p_BNV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best continuations of each row, from the best down: sums of log p, beams and tokens, each [B, C]."""
        if self._options.beam == 1:  # then an end among two would end the row too
            values_BC, tokens_BC = log_p_BNV[:, 0].max(-1, keepdim=True)
            return values_BC + self.values_BN, torch.zeros_like(tokens_BC), tokens_BC
        values_BNV = log_p_BNV + self.values_BN[:, :, None]
        values_BC, places_BC = likeliest(values_BNV, 2 * self._options.beam)
        vocabulary = log_p_BNV.shape[2]
        return values_BC, places_BC // vocabulary, places_BC % vocabulary

    def advance(
        self, values_BC: torch.Tensor, parents_BC: torch.Tensor, tokens_BC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take these candidates: the beams from which the new ones go on, and their tokens, int64 [B, N] each."""
        beams = self._options.beam
        self.count_B = self.count_B + 1
        ends_BC = (self.count_B == self.limit_B)[:, None].expand_as(tokens_BC)
        if self._stop is not None:
            ends_BC = ends_BC | (tokens_BC == self._stop)
        if ends_BC[:, :beams].any():
            self._keep(values_BC[:, :beams], parents_BC[:, :beams], tokens_BC[:, :beams], ends_BC[:, :beams])
        self.values_BN, chosen_BN = (values_BC + ends_BC * NEVER).topk(beams)
        parents_BN, tokens_BN = parents_BC.gather(1, chosen_BN), tokens_BC.gather(1, chosen_BN)
        self.text_BNL = torch.cat([_of_beams(self.text_BNL, parents_BN), tokens_BN[:, :, None]], dim=2)
        self.has_ended = ends_BC.all(1) | ~self._may_improve()
        return parents_BN, tokens_BN

    def _keep(self, values: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor, ends: torch.Tensor) -> None:
        """Put the hypotheses that end, of the N best candidates, among those that are kept."""
        scores = values / _power(self.count_B, self._options.length_penalty)
        scores_B2N = torch.cat([self._scores_BN, scores + ~ends * NEVER], dim=1)
        self._scores_BN, chosen_BN = scores_B2N.topk(self._options.beam)
        self._kept_BN = torch.cat([self._kept_BN, ends], dim=1).gather(1, chosen_BN)
        texts = torch.cat([_of_beams(self.text_BNL, parents), tokens[:, :, None]], dim=2)
        grown = torch.nn.functional.pad(self._texts_BNL, (texts.shape[2] - self._texts_BNL.shape[2], 0), value=-1)
        self._texts_BNL = _of_beams(torch.cat([grown, texts], dim=1), chosen_BN)

    def _may_improve(self) -> torch.Tensor:
        """May the best beam still become one of the N best hypotheses? [B]"""
        options, full_B = self._options, self._kept_BN.all(1)
        at_its_longest = options.early_stopping == "never" and options.length_penalty > 0
        length_B = self.limit_B if at_its_longest else self.count_B
        best_B = self.values_BN[:, 0] / _power(length_B, options.length_penalty)[:, 0]
        improves_B = best_B > torch.where(full_B, self._scores_BN[:, -1], NEVER)
        return improves_B & ~full_B if options.early_stopping == "yes" else improves_B

    def text(self, row: int) -> list[int]:
        """A row's best beam, prompt included."""
        return [token for token in self.text_BNL[row, 0].tolist() if token >= 0]

    def hypotheses(self, row: int) -> list[tuple[list[int], float]]:
        """A row's texts, prompt and end included, and their scores, from the best down."""
        kept = zip(
            self._kept_BN[row].tolist(), self._texts_BNL[row].tolist(), self._scores_BN[row].tolist(), strict=True
        )
        return [([token for token in text if token >= 0], score) for is_kept, text, score in kept if is_kept]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows alone, in this order: int64."""
        for name in (
            "text_BNL",
            "count_B",
            "limit_B",
            "values_BN",
            "has_ended",
            "_scores_BN",
            "_kept_BN",
            "_texts_BNL",
        ):
            setattr(self, name, getattr(self, name).index_select(0, rows))


def _of_beams(x_BNL: torch.Tensor, beams_BN: torch.Tensor) -> torch.Tensor:
    return x_BNL.gather(1, beams_BN[:, :, None].expand(-1, -1, x_BNL.shape[2]))


def _power(count_B: torch.Tensor, penalty: float) -> torch.Tensor:
    """n^penalty: [B, 1] fp32."""
    return (count_B.double() ** penalty).float()[:, None]
