"""Norms of whole tensors, whose parts lie on several ranks: for LAMB and LARS.

rank 0    rows 0 .. 2 of q     half of k      [|q|^2, |k|^2, 0    ]   squares of what it has
rank 1    rows 3 .. 5 of q     half of v      [|q|^2, 0    , |v|^2]
                                               one sum a step, of a number for each tensor there is
"""

from collections.abc import Sequence

import torch

from hvdtrain.comm.ranks import Ranks
from hvdtrain.optim.lars import norms_of
from hvdtrain.optim.update import SumOverRanks
from hvdtrain.slices import Slice


class SpreadNorms:
    """See ``Norms`` in optim/lars.py. Making it and calling it are collectives of ``ranks``.

    pieces: what this rank's optimizer moves; ``copies`` of them are counted once.
    """

    def __init__(self, pieces: Sequence[Slice], ranks: Ranks, over_ranks: SumOverRanks, device: torch.device):
        names = sorted(set().union(*ranks.all_gather_object([piece.name for piece in pieces])))
        places = {name: number for number, name in enumerate(names)}
        self._of_piece = {id(piece.tensor): (places[piece.name], piece.copies) for piece in pieces}
        self._device, self._count, self._over_ranks = device, len(names), over_ranks
        self._known: list[int] = []

    def __call__(self, weights: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
        squares = torch.zeros(2, self._count, dtype=torch.float64, device=self._device)
        if not weights:
            self._over_ranks(squares)
            return torch.zeros(2, 0, device=self._device)
        places, copies = self._places(weights)
        own = norms_of([*weights, *others]).view(2, -1).double().square() / copies
        squares.index_add_(1, places, own)
        return self._over_ranks(squares).sqrt().float()[:, places]

    def _places(self, weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each its tensor's place among all, and copies. The device is told when they are others than before."""
        keys = [id(weight) for weight in weights]
        if keys != self._known:
            self._known, of_each = keys, torch.tensor([self._of_piece[key] for key in keys])
            self._places_of, self._copies_of = of_each.to(self._device).unbind(1)
        return self._places_of, self._copies_of
