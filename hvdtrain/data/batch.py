"""What a microbatch is: the tensors that a task's loss reads."""

from dataclasses import dataclass

import numpy as np
import torch

IGNORE = -100  # a target that does not count; torch's cross-entropy skips it


@dataclass(frozen=True)
class Batch:
    """``tokens`` and ``targets``: int64 [B, T]; ``targets[b, t]`` is what follows ``tokens[b, t]``, or IGNORE.

    ``target_tokens``: how many targets count; known on the host, so that no one has to ask the device.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    target_tokens: int

    @classmethod
    def from_windows(cls, windows: np.ndarray, device: torch.device) -> "Batch":
        """windows: [B, T + 1] token ids; each gives T inputs and T targets."""
        ids = torch.from_numpy(windows.astype(np.int64)).to(device, non_blocking=True)
        return cls(ids[:, :-1], ids[:, 1:], windows.shape[0] * (windows.shape[1] - 1))
