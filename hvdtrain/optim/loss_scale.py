"""Dynamic loss scaling, for gradients that fp16 would round to 0."""

from collections.abc import Mapping

import torch


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

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All that it is made of: the tensors themselves."""
        return {"scale": self.scale, "good": self._good}

    def state(self) -> tuple[float, int]:
        """For a checkpoint: (scale, good steps since it last changed)."""
        return self.scale.item(), int(self._good.item())

    def load(self, state: tuple[float, int]) -> None:
        self.scale.fill_(state[0])
        self._good.fill_(state[1])
