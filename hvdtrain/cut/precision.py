"""In which numbers a replica computes; the weights that the optimizer moves are fp32 in every case.

precision      products   activations   gradients summed in   extra memory a parameter
fp32           fp32       fp32          fp32                  -
bf16           bf16       bf16, fp32    fp32                  - (autocast casts the weights in every pass)
bf16-weights   bf16       bf16          fp32                  2 bytes: a copy of the weights to compute with
fp16           fp16       fp16, fp32    fp32                  - (autocast; the loss is scaled)
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """``autocast``: type of the products; ``weights``: type of a copy of the weights that computes instead of them;
    ``scaled``: the loss is multiplied before backward, because small gradients would become 0.
    """

    autocast: torch.dtype | None = None
    weights: torch.dtype | None = None
    scaled: bool = False

    def autocasting(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Within: products are made in ``autocast``'s type, where there is one."""
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)


PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(autocast=torch.bfloat16),
    "bf16-weights": Precision(weights=torch.bfloat16),
    "fp16": Precision(autocast=torch.float16, scaled=True),
}
