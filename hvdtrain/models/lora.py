"""Low-rank adapters (Hu et al. 2021, "LoRA"): a linear layer learns a product of two thin matrices, its own stays.

    y = W x + b + alpha / rank * B A dropout(x)        A [rank, in] random, B [out, rank] zeros: begins as the layer was

Queries, keys and values are one matrix here, and gate and up are one; each has adapters of its own all the same, on its
rows of the whole:

    attention.qkv.weight          [q | k | v, in]
    attention.qkv.lora.q.a, .b    [rank, in], [q, rank]
    attention.qkv.lora.v.a, .b    [rank, in], [v, rank]

Shape letters:  D what goes in, E what comes out, R rank
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.options import TransformerOptions
from hvdtrain.options import Options, option
from hvdtrain.slices import Rect, Tensors

TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


class LoraOptions(Options):
    rank: int = option(8, "rank of each adapter", ge=1)
    alpha: float = option(16.0, "an adapter's product is multiplied by alpha / rank", gt=0)
    dropout: float = option(0.0, "probability, on what goes into adapters", ge=0, lt=1)
    targets: str = option(
        "q,v", f"what has an adapter, with commas between: {', '.join(TARGETS)} (out: of attention), or all"
    )
    also: str = option(
        "",
        "what is trained beside the adapters, as optim.freeze names it; a head that scores no tokens (labels, spans) "
        "is in any case",
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def wanted(self, there: Iterable[str]) -> set[str]:
        """Errors: ConfigError for a target that is not among ``there``."""
        found = set(there)
        there = [target for target in TARGETS if target in found]
        asked = [target.strip() for target in self.targets.split(",")]
        if unknown := [target for target in asked if target not in (*there, "all")]:
            raise ConfigError(f"model.lora.targets: the model has no {unknown[0]!r}; it has: {', '.join(there)}, all")
        return found if "all" in asked else set(asked)


class Adapter(nn.Module):
    """``a`` [R, D], ``b`` [E, R]."""

    def __init__(self, options: LoraOptions, width: int, rows: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(options.rank, width))
        self.b = nn.Parameter(torch.empty(rows, options.rank))
        self.scale = options.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., E]"""
        return F.linear(F.linear(x, self.a), self.b) * self.scale


class AdaptedLinear(nn.Module):
    """A linear layer with adapters on ``parts`` of its rows, of which ``adapted`` have one."""

    def __init__(self, linear: nn.Linear, parts: Mapping[str, int], adapted: Iterable[str], options: LoraOptions):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.parts = dict(parts)
        width = linear.in_features
        self.lora = nn.ModuleDict({part: Adapter(options, width, self.parts[part]) for part in adapted})
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., E]"""
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same with this bias, or none."""
        dropped = self.dropout(x)
        outs = F.linear(x, self.weight, bias).split(list(self.parts.values()), dim=-1)
        pairs = zip(self.parts, outs, strict=True)
        outs = [out + self.lora[part](dropped) if part in self.lora else out for part, out in pairs]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def adapt(model: nn.Module, shape: TransformerOptions, options: LoraOptions | None) -> None:
    """Put adapters on the layers of ``model``; their numbers are not set yet, see ``initial_adapters``.

    shape: what the model was made of. options: None: it has no adapters.
    Errors: ConfigError for a target that it has not.
    """
    if options is None:
        return
    layers = dict(_adaptable(model, shape))
    wanted = options.wanted(part for parts in layers.values() for part in parts)
    for name, parts in layers.items():
        if adapted := [part for part in parts if part in wanted]:
            parent, _, own = name.rpartition(".")
            linear = model.get_submodule(name)
            setattr(model.get_submodule(parent), own, AdaptedLinear(linear, parts, adapted, options))


def initial_adapters(model: nn.Module, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each: ``a`` uniform within 1 / sqrt(D), as peft draws it; ``b`` zeros. From ``seed`` and the
    adapter's name alone; of ``model`` names and shapes are read.
    """
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = 1 / math.sqrt(module.a.shape[1])
            drawn = torch.empty(module.a.shape, device="cpu")
            yield f"{name}.a", drawn.uniform_(-bound, bound, generator=generator)
            yield f"{name}.b", torch.zeros(module.b.shape, device="cpu")


def is_adapter(name: str) -> bool:
    """Is a parameter of this name one of an adapter?"""
    return ".lora." in name


def parts_of(layer: str, shape: TransformerOptions) -> dict[str, int]:
    """Part -> its rows in the weight of a linear layer, in order; empty: it takes no adapter."""
    heads, kv_heads, width = shape.heads, shape.kv_heads or shape.heads, shape.width_of_head
    q, kv, hidden = heads * width, kv_heads * width, shape.hidden_width
    of_attention = {
        "qkv": {"q": q, "k": kv, "v": kv},
        "q": {"q": q},
        "kv": {"k": kv, "v": kv},
        "out": {"out": shape.width},
    }
    up = {"gate": hidden, "up": hidden} if shape.gated else {"up": hidden}
    parent, _, own = layer.rpartition(".")
    if parent.endswith("attention"):
        return of_attention.get(own, {})
    if parent.endswith("feed_forward"):
        return {"up": up, "out": {"down": shape.width}}.get(own, {})
    return {}


def _adaptable(model: nn.Module, shape: TransformerOptions) -> Iterator[tuple[str, dict[str, int]]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (parts := parts_of(name, shape)):
            yield name, parts


class Merged:
    """``Tensors`` of a model with adapters, as of one without: each is added to its layer's weight when that is read.

    names: of all that ``tensors`` has.
    """

    def __init__(self, tensors: Tensors, names: Sequence[str], shape: TransformerOptions, options: LoraOptions):
        self._tensors, self._shape, self._scale = tensors, shape, options.scale
        self._adapters = {name.removesuffix(".a") for name in names if is_adapter(name) and name.endswith(".a")}
        self.names = [name for name in names if not is_adapter(name)]

    def whole(self, name: str) -> tuple[torch.Size, torch.dtype]:
        if is_adapter(name):
            raise KeyError(name)
        return self._tensors.whole(name)

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        found = [(part, rows) for part, rows in self._rows_of(name) if f"{_layer(name)}.lora.{part}" in self._adapters]
        if not found:
            return self._tensors.read(name, places)
        merged = self._tensors.read(name).clone()
        for part, rows in found:
            adapter = f"{_layer(name)}.lora.{part}"
            a_RD, b_ER = self._tensors.read(f"{adapter}.a"), self._tensors.read(f"{adapter}.b")
            merged[rows] += self._scale * (b_ER @ a_RD)
        if places is None:
            return merged
        pieces = [merged[tuple(slice(a, a + n) for a, n in zip(*place, strict=True))] for place in places]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows_of(self, name: str) -> Iterator[tuple[str, slice]]:
        start = 0
        for part, rows in parts_of(_layer(name), self._shape).items() if name.endswith(".weight") else ():
            yield part, slice(start, start + rows)
            start += rows


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")
