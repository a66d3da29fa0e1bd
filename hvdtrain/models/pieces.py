"""A model as a row of pieces, of which a stage of a pipeline has some that follow one another.

    decoder             embed | attention 0 | feed-forward 0 | attention 1 | ... | end
    encoder-decoder     embed | encoder's attention 0 | ... | bridge | attention 0 | cross-attention 0 | ... | end

    stage 0   stage(())          -> (x,)          runs what it has, and returns what the next one needs
    stage 1   stage((x,))        -> (x,)          of an encoder-decoder from the bridge on: (memory, x)
    stage 2   stage((x,))        -> (output,)     what ``forward`` returns

What a stage has not is ``Elsewhere``. Names of modules and parameters stay those of the whole model.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

import torch
from torch import nn

from hvdtrain.models.draws import Draws
from hvdtrain.models.flops import Trained

Module = TypeVar("Module", bound=nn.Module)
Flow = tuple[torch.Tensor, ...]
Kind = Literal["embed", "attention", "cross_attention", "feed_forward", "bridge", "end"]


class Piece(NamedTuple):
    """``needs``: names of the modules that it runs; several pieces may need one. ``of_encoder``: of the first side of
    an encoder-decoder.
    """

    kind: Kind
    needs: tuple[str, ...]
    of_encoder: bool = False


class Elsewhere(nn.Module):
    """Stands for a module that another rank has: hands on what it is given."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


class Staged(nn.Module):
    """Base of what can be cut into stages.

    kinds: of the pieces that are here, see ``Piece``; None: all. trained: which parameters of the whole model are, for
    counting what is multiplied; None: all.
    """

    kinds: frozenset[tuple[Kind, bool]] | None = None
    trained: Trained | None = None

    draws: Draws

    def initial(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors by name: the weights of step 0, see models/initial.py."""
        raise NotImplementedError

    def pieces(self) -> list[Piece]:
        """Of the whole model, in order."""
        raise NotImplementedError

    def stage(self, flow: Flow, *inputs: Any) -> Flow:
        """Run what is here. flow: what the stage before has returned; empty: there is none. inputs: ``forward``'s."""
        raise NotImplementedError

    def has(self, kind: Kind, of_encoder: bool = False) -> bool:
        return self.kinds is None or (kind, of_encoder) in self.kinds


def is_here(module: Module | None) -> TypeGuard[Module]:
    """Is there such a module, on this rank?"""
    return module is not None and not isinstance(module, Elsewhere)


def block_pieces(
    stack: str, count: int, parts: Sequence[Kind], of_encoder: bool = False, also: str = ""
) -> list[Piece]:
    """Of the blocks in ``stack``. also: a module that each part needs which attends to its own side."""
    found = []
    for number in range(count):
        for part in parts:
            needs = [f"{stack}.{number}.{part}_norm", f"{stack}.{number}.{part}"]
            found.append(Piece(part, (*needs, *([also] if also and part == "attention" else [])), of_encoder))
    return found


def keep(model: Staged, pieces: Sequence[Piece], kept: Iterable[Piece]) -> None:
    """Leave ``kept`` of all ``pieces`` in ``model``. Parameters that are tied to one that goes stay, by the name that
    is left.
    """
    kept = list(kept)
    needed = {name for piece in kept for name in piece.needs}
    for name in {name for piece in pieces for name in piece.needs} - needed:
        parent, _, own = name.rpartition(".")
        if model.get_submodule(parent)._modules.get(own) is not None:
            setattr(model.get_submodule(parent), own, Elsewhere())
    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for number, block in enumerate(stack):
            if all(isinstance(part, Elsewhere | nn.Dropout) for part in block.children()):
                stack[number] = Elsewhere()
    for module in model.modules():
        if isinstance(module, Staged):
            module.kinds = frozenset((piece.kind, piece.of_encoder) for piece in kept)
