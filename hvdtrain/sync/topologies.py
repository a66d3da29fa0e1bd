"""Who gossips with whom: mixing matrices, and how fast they bring ranks together.

W[i, j] is what rank i takes of rank j's numbers. Columns add up to 1, so that nothing is lost of what a rank has; rows
do too, so that ranks that are equal stay so. A topology may have several matrices, one step after another:

ring          i: i - 1, i + 1                             thirds                 Lian et al. 2017, 1705.09056
torus         a x b: the four around it                   fifths                 as square as the ranks allow
hypercube     2^d: one bit of its number changed          1 / (d + 1)
exponential   step k: i - 2^(k mod d), one peer a step    halves                 Assran et al. 2019, 1811.10792; after
                                                                                 d steps 2^d ranks have the exact mean
"""

import math
from collections.abc import Callable, Sequence

import torch

_NEAR = 64  # counts of ranks that are tried, up and down, for one that fits


def matrices(topology: str, ranks: int) -> Sequence[torch.Tensor]:
    """fp64 [ranks, ranks] for each step of a period. ranks: see ``fits``."""
    return [torch.ones(1, 1, dtype=torch.float64)] if ranks == 1 else _MAKERS[topology](ranks)


def fits(topology: str, ranks: int) -> bool:
    """One rank, which has nobody to ask, fits always."""
    if ranks <= 2 and topology != "torus":
        return True
    if topology == "torus":
        return ranks == 1 or _sides(ranks)[0] > 1
    return topology != "hypercube" or ranks & (ranks - 1) == 0


def counts_near(topology: str, ranks: int) -> list[int]:
    """The nearest counts of ranks that fit, below and above; none below 2."""
    below = next((n for n in range(ranks - 1, 1, -1) if fits(topology, n)), None)
    above = next(n for n in range(ranks + 1, 2 * ranks + _NEAR) if fits(topology, n))
    return [above] if below is None else [below, above]


def spectral_gap(mixing: Sequence[torch.Tensor]) -> float:
    """1 - the share of the distance from the mean that a step leaves at most; of a period, a step's in the mean."""
    ranks = len(mixing[0])
    product = torch.eye(ranks, dtype=torch.float64)
    for matrix in mixing:
        product = matrix @ product
    left = torch.linalg.matrix_norm(product - 1 / ranks, 2).item()
    return 1 - (0.0 if left < 1e-12 else left ** (1 / len(mixing)))


def _ring(ranks: int) -> Sequence[torch.Tensor]:
    return [_with_neighbours(ranks, lambda i: {(i - 1) % ranks, (i + 1) % ranks})]


def _torus(ranks: int) -> Sequence[torch.Tensor]:
    _, width = _sides(ranks)

    def around(i: int) -> set[int]:
        row = i - i % width
        return {row + (i - 1) % width, row + (i + 1) % width, (i - width) % ranks, (i + width) % ranks}

    return [_with_neighbours(ranks, around)]


def _hypercube(ranks: int) -> Sequence[torch.Tensor]:
    return [_with_neighbours(ranks, lambda i: {i ^ (1 << bit) for bit in range(ranks.bit_length() - 1)})]


def _exponential(ranks: int) -> Sequence[torch.Tensor]:
    hops = [1 << k for k in range((ranks - 1).bit_length())]
    return [_with_neighbours(ranks, lambda i, hop=hop: {(i - hop) % ranks}) for hop in hops]  # type: ignore[misc]


def _with_neighbours(ranks: int, sources: Callable[[int], set[int]]) -> torch.Tensor:
    """Equal shares of a rank itself and of its ``sources``, which are as many for each."""
    matrix = torch.eye(ranks, dtype=torch.float64)
    for i in range(ranks):
        matrix[i, list(sources(i))] = 1
    return matrix / matrix.sum(dim=1, keepdim=True)


def _sides(ranks: int) -> tuple[int, int]:
    """Of the torus that is as square as can be."""
    height = next(n for n in range(math.isqrt(ranks), 0, -1) if ranks % n == 0)
    return height, ranks // height


_MAKERS = {"ring": _ring, "torus": _torus, "hypercube": _hypercube, "exponential": _exponential}
