"""The layers of a model that is cut over the tensor axis: those of the whole model, with fewer rows or columns.

    stream -> norm -> column: enter, own rows of the weight  -> own heads, or own hidden units
    own heads, or own hidden units -> row: own columns of the weight, leave, and the bias once -> stream

A layer *becomes* one of these (see tensor.py): each is a subclass that adds what happens where numbers cross (see
crossings.py), so that names, parameters and flags stay.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.cut.crossings import Parts, enter, is_split, leave, scale_gradient
from hvdtrain.models.attention import product_dtype
from hvdtrain.models.draws import Draws
from hvdtrain.models.lora import AdaptedLinear

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Across:
    """The cut that a layer is part of. draws: of the model.

    is_shared: norms and biases of the stream are computed for own positions in training, and the parts' gradients of
    them add up. In a microbatch whose positions do not divide, each part gives its share of the whole gradient.
    """

    parts: Parts
    draws: Draws
    is_shared: bool

    @property
    def share(self) -> float:
        return 1 / self.parts.size

    def gives_share(self, x: torch.Tensor) -> bool:
        """Do all parts have the whole gradient of what ``x`` meets, so that each shall give its share?"""
        return self.is_shared and not is_split(x)


class _Column:
    """Reads the stream. Dropout before it is alike on all parts, behind it each has its own."""

    across: Across
    weight: torch.Tensor

    def read(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        found = layer(enter(x.to(product_dtype(self.weight)), self.across.parts))
        self.across.draws.fork()
        return found


class ColumnLinear(_Column, nn.Linear):
    weight: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x, super().forward)


class ColumnAdapted(_Column, AdaptedLinear):
    """All parts have an adapter's ``a``, whose gradient is the sum of theirs: each has its own rows of ``b``."""

    weight: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x, super().forward)


class _Row:
    """Adds to the stream: the parts' products summed, then the bias."""

    across: Across
    bias: nn.Parameter

    def add_up(self, product: torch.Tensor) -> torch.Tensor:
        found = leave(product, self.across.parts)
        if not is_split(product):  # then the stream, and dropout of it, is the same on all parts
            self.across.draws.join()
        bias: torch.Tensor | None = self.bias
        if bias is None:
            return found
        return found + (scale_gradient(bias, self.across.share) if self.across.gives_share(product) else bias)


class RowLinear(_Row, nn.Linear):
    bias: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add_up(F.linear(x, self.weight))


class RowAdapted(_Row, AdaptedLinear):
    """All parts have an adapter's ``b``, whose gradient is the sum of theirs: each has its own columns of ``a``."""

    bias: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add_up(self.product(x, None))


class _OfStream:
    """A norm of the stream. ``is_memory``: that behind an encoder, whose output a decoder's own weights read."""

    across: Across
    is_memory: bool

    def normalise(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        if self.across.gives_share(x):  # inside, gradients are a share of what they are outside
            inside = layer(scale_gradient(x, self.across.parts.size))
            found = scale_gradient(inside, self.across.share)
        else:
            found = layer(x)
        if not self.is_memory:
            return found
        memory = enter(found, self.across.parts)
        return memory[0] if is_split(found) else memory


class StreamLayerNorm(_OfStream, nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalise(x, super().forward)


class StreamRMSNorm(_OfStream, nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalise(x, super().forward)


class StreamIdentity(_OfStream, nn.Identity):
    """Where post-norm blocks have none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalise(x, super().forward)
