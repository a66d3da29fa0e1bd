"""A model before it has weights: built whole on the meta device, cut there, and only then made real.

    Blueprint(make)       names, shapes and ties of the whole model; no memory
    blueprint.copy()      to be cut: layers made smaller, modules of other stages taken out
    make_real(model)      memory for what is left, on the device; no weights yet
    blueprint.slices()    what this rank holds, by the whole model's names
    fill_slices()         weights: from a stream of whole tensors, of which each rank takes what it holds

So no rank ever holds a model that does not fit it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hvdtrain.comm.mesh import Mesh
from hvdtrain.models.lora import initial_adapters
from hvdtrain.models.pieces import Staged
from hvdtrain.models.positions import Sinusoids
from hvdtrain.models.transformer import Transformer
from hvdtrain.models.weightless import weightless
from hvdtrain.slices import Rect, Slice, whole_rect


@dataclass(frozen=True)
class Placed:
    """Where a parameter of a cut model lies in the whole tensor, see ``Slice``.

    copies: parts of the tensor axis that hold the same numbers. is_partial: each part has a share of its gradient.
    """

    places: tuple[Rect, ...]
    copies: int = 1
    is_partial: bool = False


class Blueprint:
    """``model``: the whole one, on the meta device. make: makes it there, with what is frozen marked."""

    def __init__(self, make: Callable[[], Staged]):
        with weightless():
            self.model = make()
        first: dict[int, str] = {}
        # Each way to a parameter -> its name. A tied one has several ways, and the name of the first.
        self.names = {
            path: first.setdefault(id(parameter), path)
            for path, parameter in self.model.named_parameters(remove_duplicate=False)
        }
        self.wholes = {name: parameter.shape for name, parameter in self.model.named_parameters()}

    def copy(self) -> Staged:
        return copy.deepcopy(self.model)

    def initial(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights of step 0, whole, one after another: by ``seed`` alone, however the model is cut."""
        yield from self.model.initial(seed)
        yield from initial_adapters(self.model, seed)

    def slices(
        self,
        model: nn.Module,
        mesh: Mesh,
        placed: Mapping[str, Placed] | None = None,
        stages: Mapping[str, frozenset[int]] | None = None,
    ) -> list[Slice]:
        """Of a copy that was cut and made real, in the order of the whole model (collective where holders are new).

        placed: by the parameter's way in ``model``; one that is not there is whole, on every part of the tensor axis.
        stages: which stages of the pipeline have a tensor of this name; None: all is here.
        """
        held: dict[str, tuple[torch.Tensor, Placed]] = {}
        for path, parameter in model.named_parameters(remove_duplicate=False):
            name = self.names[path]
            whole = Placed((whole_rect(self.wholes[name]),), mesh.tensor.size)
            held.setdefault(name, (parameter, (placed or {}).get(path, whole)))
        found = []
        for name, shape in self.wholes.items():
            having = frozenset({mesh.pipe.rank}) if stages is None else stages[name]
            is_partial = name in held and held[name][1].is_partial
            if stages is not None:
                is_partial = any(mesh.own.all_gather_object(is_partial))
            holders = mesh.holders(having, is_partial)  # ranks that do not hold it take part in making the group
            if name in held:
                tensor, place = held[name]
                copies = place.copies * len(having)
                found.append(Slice(name, tensor, shape, place.places, holders, copies))
        return found


def make_real(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device memory on ``device``: ties stay, tables are computed, weights are not set."""
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in real:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                real[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = real[id(parameter)]
        if isinstance(module, Transformer | Sinusoids):
            with device:
                module.make_tables()


@torch.no_grad()
def fill_slices(slices: Iterable[Slice], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy into ``slices`` what they hold of whole ``tensors``, which come one after another (local)."""
    by_name = {piece.name: piece.rectangles() for piece in slices}
    for name, tensor in tensors:
        for part in by_name.get(name, ()):
            (place,) = part.places
            part.tensor.copy_(tensor[place.index_in(whole_rect(tensor.shape))])
