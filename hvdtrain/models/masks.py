"""Which keys a query may see, where "all of them" or "those up to itself" does not say it.

A mask is boolean, True where a query may look, and goes as it is into scaled_dot_product_attention. It is made once per
forward pass and serves every layer.

Shape letters:  B rows, T positions
"""

import torch


def padding_mask(lengths_B: torch.Tensor, positions: int) -> torch.Tensor:
    """Keys that are tokens, the same for every head and query: int64 lengths -> bool [B, 1, 1, positions].

    A row of length 0 sees its first position: a softmax over nothing would be NaN, and spread.
    """
    # lengths 3, 1, 4:   x x x .
    #                    x . . .
    #                    x x x x
    places_T = torch.arange(positions, device=lengths_B.device)
    return (places_T < lengths_B.clamp(min=1)[:, None])[:, None, None]


def packed_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """Causal attention within each document of a packed row: int64 numbers of documents -> bool [B, 1, T, T].

    Padding is numbered -1 and treated as a document: each of its positions sees at least itself, as a softmax must.
    """
    # segments       0 0 0 1 1 -1
    #
    # query    0     x . . . .  .
    #          0     x x . . .  .
    #          0     x x x . .  .
    #          1     . . . x .  .
    #          1     . . . x x  .
    #         -1     . . . . .  x
    return (segments_BT[:, None, :, None] == segments_BT[:, None, None, :]).tril()


def window_mask(positions: int, window: int, device: torch.device) -> torch.Tensor:
    """Causal attention to the last ``window`` positions, its own included: bool [positions, positions]."""
    # window 3   x . . . .
    #            x x . . .
    #            x x x . .
    #            . x x x .
    #            . . x x x
    return torch.ones(positions, positions, dtype=torch.bool, device=device).tril().triu(1 - window)
