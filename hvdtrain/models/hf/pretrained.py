"""A Hugging Face folder as tensors of ours.

Opening it reads config.json and the files' headers. A tensor is read where it is asked for, and of it only what is
asked for: a rank that holds a piece of a model touches no more than that.
"""

from collections.abc import Sequence
from pathlib import Path
from re import fullmatch

import torch

from hvdtrain.errors import CheckpointError
from hvdtrain.files import exists
from hvdtrain.models.hf.families import family_of
from hvdtrain.models.hf.family import HAS_OUTPUT, Config, Family, Misfit
from hvdtrain.models.hf.folder import CONFIG, TOKENIZER, TheirTensors, read_config, special_tokens
from hvdtrain.models.hf.layout import Layout, Part
from hvdtrain.models.options import TransformerOptions
from hvdtrain.slices import Rect, whole_rect

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float32, "BF16": torch.float32}  # as they are given
_SHOWN = 5  # of each thing that is wrong


class Pretrained:
    """``Tensors`` of a folder, under the names of our model; in fp32, or fp64 where they are fp64 (local).

    options: of TransformerOptions, as a dict. model: the class of ours that the names belong to; those of a bare BERT
    are a ``Classifier``'s without its head. vocab_size: of config.json. label_names: of a classifier, in order.
    left_over: tensors of theirs that say nothing to that model.
    tokenizer: their tokenizer.json, if there is one. special_tokens: role -> id, for the roles that are named there.

    vocab_multiple: rows of zeros pad the vocabulary up to a multiple of this, as ``model.vocab_multiple`` does.

    Errors: CheckpointError where the folder is of no known family, asks for what our models do not do, or its files do
    not hold the tensors that config.json says, each in its shape.
    """

    def __init__(self, folder: Path, vocab_multiple: int = 1):
        self.folder = folder
        config = read_config(folder)
        family, architecture = family_of(config, str(folder / CONFIG))
        self._theirs = TheirTensors(folder, family.prefix)
        config[HAS_OUTPUT] = "lm_head.weight" in self._theirs
        try:
            self.options = family.options(config) | {"vocab_multiple": vocab_multiple}
        except Misfit as misfit:
            raise CheckpointError(f"{folder / CONFIG} asks for what our models do not do: {misfit}") from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{folder / CONFIG} is damaged ({type(error).__name__}: {error})") from None
        self.model = architecture.model
        self.vocab_size = _vocab_size(folder, config)
        self.label_names = _label_names(config) if self.model == "Classifier" else ()
        self.tokenizer = folder / TOKENIZER if exists(folder / TOKENIZER) else None
        self.special_tokens = special_tokens(folder, config)
        options = TransformerOptions(**self.options)
        self._layout = Layout(family, architecture, options, self.vocab_size, len(self.label_names))
        self.names, self.left_over = self._check(family, {"pooler"} if architecture.without else set())

    def whole(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """See ``Tensors``."""
        parts = self._layout.parts[name]
        types = {_TYPES[self._theirs.kind(stored)[1]] for part in parts if (stored := self._stored(part))}
        return self._layout.wholes[name], torch.float64 if torch.float64 in types else torch.float32

    def read(self, name: str, places: Sequence[Rect] | None = None) -> torch.Tensor:
        """See ``Tensors``."""
        shape, dtype = self.whole(name)
        found = [self._read(name, place, dtype) for place in places or [whole_rect(shape)]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, name: str, place: Rect, dtype: torch.dtype) -> torch.Tensor:
        begin, end = place.offset[0], place.offset[0] + place.shape[0]
        rest = tuple(slice(o, o + n) for o, n in zip(place.offset[1:], place.shape[1:], strict=True))
        found = torch.zeros(place.shape, dtype=dtype)  # what lies in no part is padding
        for part in self._layout.parts[name]:
            first, last = max(begin, part.begin), min(end, part.end)
            stored = self._stored(part)
            if first < last and stored is not None:
                index = (slice(first - part.begin, last - part.begin), *rest)
                found[first - begin : last - begin] = self._read_part(part, stored, index)
        return found

    def _read_part(self, part: Part, stored: str, index: tuple[slice, ...]) -> torch.Tensor:
        return part.to_ours(self._theirs.read(stored, part.their_index(index)))

    def _stored(self, part: Part) -> str | None:
        """The name under which a part is there: its own, or one that is tied to it."""
        return next((name for name in self._layout.called(part) if name in self._theirs), None)

    # --- checks ----------------------------------------------------------------------------------------------------

    def _check(self, family: Family, optional: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of ours that are there, and tensors of theirs that are left over.

        optional: modules that a folder may lack. Errors: CheckpointError for all that is wrong.
        """
        names, missing, wrong, used = [], [], [], set()
        for ours, parts in self._layout.parts.items():
            stored = [self._stored(part) for part in parts]
            used |= {name for part in parts for name in self._layout.called(part)}
            if None not in stored or parts[0].theirs in family.zeros.values():
                names.append(ours)
            elif ours.partition(".")[0] not in optional:
                missing += [part.theirs for part, name in zip(parts, stored, strict=True) if name is None]
            for part, name in zip(parts, stored, strict=True):
                wrong += self._wrong(part, name) if name is not None else []
        left = self._theirs.others(used)
        worked_out = {name.removeprefix(family.prefix) for name in family.tables}
        extra = [name for plain, name in left if plain not in worked_out and not fullmatch(family.unread, plain)]
        found = [*_counted("missing", missing), *_counted("not of this model", extra), *wrong[:_SHOWN]]
        if found:
            raise CheckpointError(f"{self.folder} does not hold what its {CONFIG} says: {'; '.join(found)}")
        return tuple(names), tuple(name for plain, name in left if plain not in worked_out)

    def _wrong(self, part: Part, stored: str) -> list[str]:
        shape, kind = self._theirs.kind(stored)
        if kind not in _TYPES:
            return [f"{stored} has type {kind}, not one of {', '.join(_TYPES)}"]
        if shape != part.their_shape:
            is_vocab = len(shape) == 2 and part.their_shape == (self.vocab_size, shape[1])
            more = f" (vocab_size={self.vocab_size})" if is_vocab else ""
            return [f"{stored} has shape {list(shape)}, not {list(part.their_shape)}{more}"]
        return self._unequal(part)

    def _unequal(self, part: Part) -> list[str]:
        """Tensors that are tied, in a folder that holds them all the same."""
        index = tuple(slice(0, length) for length in part.shape)
        first, *others = [name for name in self._layout.called(part) if name in self._theirs]

        def is_unequal(name: str) -> bool:
            values = [self._read_part(part, one, index) for one in (first, name)]
            return not torch.equal(*values)

        return [
            f"{name} is not equal to {first}, and our model has one tensor for both"
            for name in others
            if is_unequal(name)
        ]


def _counted(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]


def _vocab_size(folder: Path, config: Config) -> int:
    found = config.get("vocab_size")
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{folder / CONFIG} says no vocab_size")
    return found


def _label_names(config: Config) -> tuple[str, ...]:
    """By number; transformers takes two where there are none."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    return tuple(f"LABEL_{number}" for number in range(config.get("num_labels") or 2))
