"""What decoding keeps of the positions that it has seen.

Shape letters:  B rows, T positions, S positions of an encoder's output (the memory), G heads of keys and values,
                K width of a head
"""

import torch


class KVCache:
    """Keys and values of the positions seen so far, for one layer: [B, G, T_max, K] each.

    ``memory``: those of an encoder's output, [2, B, G, S, K], where there is one; made at the first step.
    """

    def __init__(self, rows: int, heads: int, positions: int, head_width: int, like: torch.Tensor):
        shape = (rows, heads, positions, head_width)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0
        self.memory: torch.Tensor | None = None

    def append(self, keys_BGTK: torch.Tensor, values_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new positions; returns all keys and values up to and including them."""
        end = self.length + keys_BGTK.shape[2]
        self.keys[:, :, self.length : end] = keys_BGTK
        self.values[:, :, self.length : end] = values_BGTK
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]
