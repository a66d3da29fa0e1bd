"""Where the tensors of a model of ours lie in theirs.

    ours                          theirs
    attention.qkv.weight [3D, D]  q_proj.weight [D, D]     Part: rows of ours, one after another
                                  k_proj.weight [D, D]
                                  v_proj.weight [D, D]
    embedding.weight [V + p, D]   embed_tokens.weight [V, D]    the vocabulary's padding is ours alone
    feed_forward.up.weight [F, D] c_fc.weight [D, F]            transposed (GPT-2)

Shape letters:  D model width, F feed-forward width, V vocabulary, p padding of the vocabulary
"""

import re
from typing import Literal, NamedTuple

import torch
from torch import nn

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier, MaskedLanguageModel, SpanModel
from hvdtrain.models.hf.family import Architecture, Family
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.models.weightless import weightless

_OVER_TOKENS = ("Decoder", "Seq2Seq", "MaskedLanguageModel")  # models whose head scores the vocabulary


class Part(NamedTuple):
    """Rows of a tensor of ours, from ``begin`` on, that are all of the tensor ``theirs``; ``shape``: of these rows.

    turned: how theirs has them: ``transposed``; ``row``: a vector as a matrix of one row; or as ours has them.
    """

    theirs: str
    begin: int
    shape: tuple[int, ...]
    turned: Literal["", "transposed", "row"] = ""

    @property
    def end(self) -> int:
        return self.begin + self.shape[0]

    @property
    def their_shape(self) -> tuple[int, ...]:
        return (1, *self.shape) if self.turned == "row" else self.shape[::-1] if self.turned else self.shape

    def their_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a rectangle of the part lies in theirs."""
        return (slice(0, 1), *index) if self.turned == "row" else index[::-1] if self.turned else index

    def to_ours(self, theirs: torch.Tensor) -> torch.Tensor:
        return theirs[0] if self.turned == "row" else theirs.T if self.turned else theirs

    def to_theirs(self, ours: torch.Tensor) -> torch.Tensor:
        return ours[None] if self.turned == "row" else ours.T if self.turned else ours


class Layout:
    """``wholes``: shapes of our model's tensors by name. ``parts``: where each lies.

    A tied tensor is there once; padding of the vocabulary lies in no part.
    """

    def __init__(
        self, family: Family, architecture: Architecture, options: TransformerOptions, vocab_size: int, classes: int = 0
    ):
        self._family, self._zeros, self._options = family, family.zeros, options
        self._names = family.names(options, architecture.model)
        self._vocab_size = vocab_size if architecture.model in _OVER_TOKENS else 0
        model = _make_model(architecture.model, options, vocab_size, classes)
        self.wholes = {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if name.partition(".")[0] not in architecture.without
        }
        self.parts = {name: self._parts(name, shape) for name, shape in self.wholes.items()}
        self._copies = family.copies if self._vocab_size else {}
        self._main = {part.theirs for parts in self.parts.values() for part in parts}

    def called(self, part: Part) -> list[str]:
        """The names of a tensor of theirs: its own, and those of others that are tied to it."""
        return [part.theirs, *(name for name in self._copies.get(part.theirs, ()) if name not in self._main)]

    def doubled(self, part: Part) -> list[str]:
        """Names under which it is written: its own, and another where ours shares what theirs has twice."""
        other = self._family.doubles.get(part.theirs)
        return [part.theirs] if other is None or other in self._main else [part.theirs, other]

    @property
    def tables(self) -> tuple[str, ...]:
        return self._family.tables

    def _parts(self, name: str, shape: torch.Size) -> tuple[Part, ...]:
        parts: list[Part] = []
        theirs = self._theirs(name)
        for one, rows in zip(theirs, self._rows(name, shape, len(theirs)), strict=True):
            module, _, leaf = one.rpartition(".")
            turned: Literal["", "transposed", "row"] = ""
            if leaf == "weight" and module.rpartition(".")[2] in self._family.transposed:
                turned = "transposed"
            elif one in self._zeros.values():
                turned = "row"
            parts.append(Part(one, parts[-1].end if parts else 0, (rows, *shape[1:]), turned))
        return tuple(parts)

    def _theirs(self, name: str) -> list[str]:
        """The names of a tensor's parts: by its own name in the table, or by its module's."""
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        module, _, leaf = pattern.rpartition(".")
        found = self._names.get(pattern) or self._names[module]
        ending = "" if pattern in self._names else f".{leaf}"
        return [_numbered(one, numbers) + ending for one in ([found] if isinstance(found, str) else found)]

    def _rows(self, name: str, shape: torch.Size, count: int) -> list[int]:
        o = self._options
        if count == 3:  # heads of keys and values may be fewer
            return [heads * o.width_of_head for heads in (o.heads, o.kv_heads or o.heads, o.kv_heads or o.heads)]
        if count == 1 and self._vocab_size and name.rpartition(".")[0] in ("embedding", "encoder.embedding", "head"):
            return [self._vocab_size]
        return [shape[0] // count] * count


def _numbered(pattern: str, numbers: list[str]) -> str:
    return pattern.replace("*", numbers[0]) if numbers else pattern


def _make_model(model: str, options: TransformerOptions, vocab_size: int, classes: int) -> nn.Module:
    """Names and shapes alone: on the meta device it holds nothing."""
    with weightless():
        if model == "Classifier":
            return Classifier(options, vocab_size, classes)
        kinds = {
            "Decoder": Decoder,
            "Seq2Seq": Seq2Seq,
            "MaskedLanguageModel": MaskedLanguageModel,
            "SpanModel": SpanModel,
        }
        return kinds[model](options, vocab_size)
