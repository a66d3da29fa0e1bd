"""A checkpoint's parameters under the model's own names: the last step's, or their average; adapters merged."""

from collections.abc import Sequence
from typing import Protocol

import torch

from hvdtrain.checkpoint.reader import Checkpoint, Weights
from hvdtrain.errors import ConfigError
from hvdtrain.models.lora import LoraOptions, Merged
from hvdtrain.models.options import TransformerOptions
from hvdtrain.slices import Rect, Tensors


class Named(Tensors, Protocol):
    """Tensors that know their names."""

    @property
    def names(self) -> Sequence[str]: ...


class Parameters:
    """``Tensors`` of a checkpoint (local). ``weights``, and errors: see ``which_weights``."""

    def __init__(self, saved: Checkpoint, weights: Weights | None):
        self._saved, self.weights = saved, which_weights(saved, weights)
        self.names = [name.removeprefix("model.") for name in saved if name.startswith("model.")]

    def whole(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self._saved.whole(self._stored(name))

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        return self._saved.read(self._stored(name), places)

    def _stored(self, name: str) -> str:
        """A parameter without an average was not trained."""
        averaged = f"ema.{name}"
        return averaged if self.weights == "ema" and averaged in self._saved else f"model.{name}"


def which_weights(saved: Checkpoint, asked: Weights | None) -> Weights:
    """None: the average where there is one. Errors: ConfigError where one is asked for that is not there."""
    if asked == "ema" and not saved.has_ema:
        raise ConfigError(f"{saved.folder} has no averaged weights (ema.decay was 0); take --weights raw")
    return asked or ("ema" if saved.has_ema else "raw")


def without_adapters(parameters: Parameters, shape: TransformerOptions, lora: LoraOptions | None) -> Named:
    """shape, lora: of the model that was saved."""
    return parameters if lora is None else Merged(parameters, parameters.names, shape, lora)
