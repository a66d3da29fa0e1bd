"""In which numbers a replica computes; the weights that the optimizer moves are fp32 in every case.

precision      products   activations   gradients summed in   extra memory a parameter
fp32           fp32       fp32          fp32                  -
bf16           bf16       bf16, fp32    fp32                  - (autocast casts the weights in every pass)
bf16-weights   bf16       bf16          fp32                  2 bytes: a copy of the weights to compute with
fp16           fp16       fp16, fp32    fp32                  - (autocast; the loss is scaled)
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """``autocast``: type of the products; ``weights``: type of a copy of the weights that computes instead of them;
    ``scaled``: the loss is multiplied before backward, because small gradients would become 0.
    """

    autocast: torch.dtype | None = None
    weights: torch.dtype | None = None
    scaled: bool = False


PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(autocast=torch.bfloat16),
    "bf16-weights": Precision(weights=torch.bfloat16),
    "fp16": Precision(autocast=torch.float16, scaled=True),
}


class LossScale:
    """Dynamic loss scaling: halved after a step whose gradient overflowed, doubled after ``interval`` good ones.

    Whether a step overflowed is read off the summed gradient, which all ranks share: so they agree without asking. All
    of it stays on the device. It starts low because a loss is a sum: over 4,096 targets, 16 is a mean's 65,536.
    Source: Micikevicius et al. 2018, "Mixed Precision Training", 3.2.
    """

    def __init__(self, device: torch.device, start: float = 16.0, interval: int = 2000):
        self.interval = interval
        self.scale = torch.tensor(start, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflowed: torch.Tensor) -> None:
        """After each step (local). overflowed: scalar bool."""
        good = torch.where(overflowed, 0, self._good + 1)
        grows = good >= self.interval
        factor = torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0))
        self.scale.mul_(factor)
        self._good.copy_(torch.where(grows, 0, good))

    def state(self) -> tuple[float, int]:
        """For a checkpoint: (scale, good steps since it last changed)."""
        return self.scale.item(), int(self._good.item())

    def load(self, state: tuple[float, int]) -> None:
        self.scale.fill_(state[0])
        self._good.fill_(state[1])
