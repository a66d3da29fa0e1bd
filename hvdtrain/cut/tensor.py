"""The tensor cut: each layer spread over the ranks of an axis, by heads, hidden units and the vocabulary's words.

                         weight                a part has
    attention.qkv        q | k | v rows        rows of its heads, of each of the three
    cross_attention.q    q rows                rows of its heads; of kv those of k and those of v
    attention.out                              columns of its heads
    feed_forward.up      gate | up rows        rows of its hidden units, of each
    feed_forward.out                           columns of its hidden units
    embedding, head      the vocabulary's      rows of its words
    relative             [buckets, heads]      columns of its heads
    all else                                   all: positions, norms, biases of what adds to the stream, poolers, heads
                                               of labels and spans

Hidden units and words may be shared out unevenly, so whole shapes never depend on the mesh; heads must divide.

Source: Shoeybi et al. 2019, "Megatron-LM"; for the sequence split Korthikanti et al. 2022.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from hvdtrain.comm.axis import Axis
from hvdtrain.cut.blueprint import Placed
from hvdtrain.cut.crossings import Parts, begin_split, end_split, parts_of
from hvdtrain.cut.spread_layers import (
    Across,
    ColumnAdapted,
    ColumnLinear,
    RowAdapted,
    RowLinear,
    StreamIdentity,
    StreamLayerNorm,
    StreamRMSNorm,
)
from hvdtrain.cut.vocabulary import HEADS, SpreadEmbedding, Words
from hvdtrain.data.sampler import even_parts
from hvdtrain.errors import ConfigError, say
from hvdtrain.models import lora
from hvdtrain.models.heads import OutputHead
from hvdtrain.models.layers import AnyAttention, FeedForward, ResidualBlock
from hvdtrain.models.lora import AdaptedLinear
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Staged
from hvdtrain.models.positions import RelativeBias
from hvdtrain.models.transformer import Transformer
from hvdtrain.slices import Rect, whole_rect

AnyLinear = nn.Linear | AdaptedLinear
_NORMS = {nn.LayerNorm: StreamLayerNorm, nn.RMSNorm: StreamRMSNorm, nn.Identity: StreamIdentity}


def spread(model: Staged, axis: Axis, sequence: bool, tell: Callable[[str], None] = say) -> Mapping[str, Placed]:
    """Leave in a whole model the part that this rank computes (local).

    Returns where each parameter that is left lies in the whole one, by its way in the model.

    model: on the meta device, with the adapters and frozen parameters that it shall have; the axis divides its heads,
    see combinations.py. sequence: in training the residual stream is shared by positions, where these divide. tell:
    gets what the user should know.

    Errors: ConfigError where there are fewer hidden units or words than ranks.
    """
    options = cast(TransformerOptions, model.options)
    words = options.padded(cast(int, model.vocab_size))
    for what, count in (("hidden units", options.hidden_width), ("tokens in its vocabulary", words)):
        if count < axis.size:
            raise ConfigError(f"mesh.tensor={axis.size}: the model has {count} {what}, fewer than ranks; lower it")
    across = Across(parts_of(axis), model.draws, sequence)
    cutter = _Cutter(options, words, across, tell)
    for name, module in list(model.named_modules()):
        cutter.cut(name, module)
    return {way: cutter.placed(own) for way, own in model.named_parameters(remove_duplicate=False)}


class Split:
    """What goes into the first block becomes split, in training. ``missed``: how often its positions did not divide.

    tell: gets a sentence the first time that it happens.
    """

    def __init__(self, parts: Parts, tell: Callable[[str], None]):
        self._parts, self._tell, self.missed = parts, tell, 0

    def __call__(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return x_BTD
        positions, size = x_BTD.shape[1], self._parts.size
        if positions % size == 0:
            return begin_split(x_BTD, self._parts)
        if not self.missed:
            self._tell(
                f"note: cut.sequence is off for rows of {positions} tokens, and wherever mesh.tensor={size} does not "
                "divide the longest row of a batch"
            )
        self.missed += 1
        return x_BTD


@dataclass(frozen=True)
class Join:
    """What comes out of the last block is the same on all parts."""

    parts: Parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return end_split(x, self.parts)


class _Cutter:
    def __init__(self, options: TransformerOptions, vocabulary: int, across: Across, tell: Callable[[str], None]):
        self._options, self._vocabulary, self._across, self._tell = options, vocabulary, across, tell
        self._parts, self._sequence = across.parts, across.is_shared
        self._cut: dict[nn.Parameter, nn.Parameter] = {}  # whole -> own, so that what was tied stays tied
        self._places: dict[nn.Parameter, tuple[Rect, ...]] = {}
        self._partial: set[nn.Parameter] = set()

    def placed(self, own: nn.Parameter) -> Placed:
        if own in self._places:
            return Placed(self._places[own])
        return Placed((whole_rect(own.shape),), self._parts.size, own in self._partial)

    def cut(self, name: str, module: nn.Module) -> None:
        """A module, and the layers that lie directly in it."""
        if isinstance(module, Transformer):
            self._ends(module)
        elif isinstance(module, OutputHead):
            self._words(module, HEADS[type(module)])
        elif isinstance(module, ResidualBlock):
            for own, norm in module.named_children():
                if own.endswith("_norm"):
                    self._norm(norm)
        elif isinstance(module, AnyAttention):
            self._attention(name, module)
        elif isinstance(module, FeedForward):
            self._column(f"{name}.up", module.up)
            self._row(module.out)
        elif isinstance(module, RelativeBias):
            self._columns(module, "weight")

    # --- layers ----------------------------------------------------------------------------------------------------

    def _ends(self, model: Transformer) -> None:
        model.draws.part = self._parts.rank
        self._words(model.embedding, SpreadEmbedding)
        self._norm(cast(nn.Module, model.norm))
        if isinstance(last_of_encoder := getattr(model, "encoder_norm", None), nn.Module):
            self._norm(last_of_encoder, is_memory=True)
        if self._sequence:
            model.into_blocks, model.out_of_blocks = Split(self._parts, self._tell), Join(self._parts)

    def _words(self, layer: nn.Embedding | OutputHead, kind: type[nn.Module]) -> None:
        self._rows(layer, "weight", [self._vocabulary])
        self._rows(layer, "bias", [self._vocabulary])
        self._become(layer, kind, words=Words(self._parts, self._vocabulary))

    def _norm(self, norm: nn.Module, is_memory: bool = False) -> None:
        if self._sequence:
            self._partial.update(norm.parameters())
        self._become(norm, _NORMS[type(norm)], across=self._across, is_memory=is_memory)

    def _attention(self, name: str, attention: AnyAttention) -> None:
        for count in ("heads", "kv_heads", "q_width", "kv_width"):
            setattr(attention, count, getattr(attention, count) // self._parts.size)
        for own, layer in attention.named_children():
            if own == "out":
                self._row(cast(AnyLinear, layer))
            else:  # a memory, which kv reads, has been read for all layers
                self._column(f"{name}.{own}", cast(AnyLinear, layer), reads_stream=own != "kv")

    def _column(self, name: str, layer: AnyLinear, reads_stream: bool = True) -> None:
        rows = lora.parts_of(name, self._options)
        self._rows(layer, "weight", list(rows.values()))
        self._rows(layer, "bias", list(rows.values()))
        if isinstance(layer, AdaptedLinear):
            layer.parts = {part: self._own(count)[1] for part, count in rows.items()}
            for part, adapter in layer.lora.items():
                self._rows(adapter, "b", [rows[part]])
                self._partial.add(cast(nn.Parameter, adapter.a))
        if reads_stream:
            kind = ColumnAdapted if isinstance(layer, AdaptedLinear) else ColumnLinear
            self._become(layer, kind, across=self._across)

    def _row(self, layer: AnyLinear) -> None:
        self._columns(layer, "weight")
        if isinstance(layer, AdaptedLinear):
            for adapter in layer.lora.values():
                self._columns(adapter, "a")
                self._partial.add(cast(nn.Parameter, adapter.b))
        if self._sequence and layer.bias is not None:
            self._partial.add(layer.bias)
        self._become(layer, RowAdapted if isinstance(layer, AdaptedLinear) else RowLinear, across=self._across)

    def _become(self, module: nn.Module, kind: type[nn.Module], **more: Any) -> None:
        """``kind`` is a subclass of the module's class, and has nothing of its own but ``more``."""
        module.__class__ = kind
        vars(module).update(more)

    # --- parameters ------------------------------------------------------------------------------------------------

    def _own(self, length: int) -> tuple[int, int]:
        """Of so many rows or columns: where this part's begin, and how many there are."""
        return even_parts(length, self._parts.size)[self._parts.rank]

    def _rows(self, module: nn.Module, name: str, lengths: Sequence[int]) -> None:
        """Own rows of each of several that lie one behind another in a parameter, if there is one."""
        whole = getattr(module, name, None)
        if whole is None:
            return
        places, begin, rest = [], 0, tuple(whole.shape[1:])
        for length in lengths:
            first, count = self._own(length)
            places.append(Rect((begin + first, *(0 for _ in rest)), (count, *rest)))
            begin += length
        assert begin == len(whole), (name, lengths, whole.shape)
        self._keep(module, name, tuple(places))

    def _columns(self, module: nn.Module, name: str) -> None:
        rows, columns = getattr(module, name).shape
        first, count = self._own(columns)
        self._keep(module, name, (Rect((0, first), (rows, count)),))

    def _keep(self, module: nn.Module, name: str, places: tuple[Rect, ...]) -> None:
        whole = getattr(module, name)
        if whole not in self._cut:
            shape = (sum(place.shape[0] for place in places), *places[0].shape[1:])
            own = nn.Parameter(whole.new_empty(shape), whole.requires_grad)
            self._cut[whole], self._places[own] = own, places
        setattr(module, name, self._cut[whole])
