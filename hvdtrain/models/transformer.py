"""What decoder, encoder and encoder-decoder share: how a token becomes a vector.

Shape letters:  B rows, T positions, D model width, K width of a head
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.cache import Cache
from hvdtrain.models.draws import Draws
from hvdtrain.models.initial import fill, initial
from hvdtrain.models.layers import AnyAttention, make_embedding_norm
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Staged, is_here
from hvdtrain.models.positions import Sinusoids, make_table, rotary_table
from hvdtrain.models.recompute import AnyBlock


class Side(NamedTuple):
    """What an encoder and a decoder may each have of its own: a table of positions, a norm of what comes in, and a
    place among the random numbers.
    """

    position: nn.Embedding | Sinusoids | None
    norm: nn.Module
    place: int = 0


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


class Transformer(Staged):
    """Base of the models: the embedding and the positions. Which blocks follow, each model says itself.

    into_blocks, out_of_blocks: what a cut does to hidden states before the first block and behind the last norm.
    """

    rotary: torch.Tensor
    blocks: nn.ModuleList
    into_blocks: Callable[[torch.Tensor], torch.Tensor] = staticmethod(as_it_is)
    out_of_blocks: Callable[[torch.Tensor], torch.Tensor] = staticmethod(as_it_is)

    def __init__(self, options: TransformerOptions, vocab_size: int):
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        self.embedding = nn.Embedding(options.padded(vocab_size), options.width)
        self.position = make_table(options)
        self.draws = Draws()
        self.make_tables()
        self.token_type = nn.Embedding(options.token_types, options.width) if options.token_types else None
        self.embedding_norm = make_embedding_norm(options)
        self.dropout = nn.Dropout(options.dropout)

    def make_tables(self) -> None:
        """Put what is computed and not trained on torch's present device."""
        if self.options.positions == "rotary":
            table = rotary_table(self.options.context, self.options.width_of_head, self.options.rotary)
            self.register_buffer("rotary", table, persistent=False)

    def number_blocks(self) -> None:
        """Give each block its place among the random numbers, once all blocks are there."""
        blocks = [module for module in self.modules() if isinstance(module, AnyBlock)]
        for number, block in enumerate(blocks):
            block.draws, block.number = self.draws, number + 1  # 0 is the embedding's

    def enters(self, block: nn.Module, x_BTD: torch.Tensor) -> TypeGuard[AnyBlock]:
        """Is it here? Then the random numbers that follow are its own. x_BTD: what it will read."""
        if not isinstance(block, AnyBlock):
            return False
        self.draws.at(block.number)
        if x_BTD.dim() > 3:  # own positions, of which a cut says so with a dim in front: see cut/crossings.py
            self.draws.fork()
        return True

    def initial(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """See models/initial.py."""
        return initial(self, self.options, seed)

    def initialise(self, seed: int) -> None:
        """Fill the model with ``initial``'s."""
        fill(self, self.initial(seed))

    def embed(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        types_BT: torch.Tensor | None = None,
        side: Side | None = None,
    ) -> torch.Tensor:
        """What goes into the first block: [B, T, D].

        positions_BT: int64, 0 <= position < context, on padding too; None: 0 to T - 1.
        types_BT: int64, the kind of each token; None: all 0. A model that knows one kind, or none, does not look.
        """
        end = tokens_BT.shape[1]
        fits = positions_BT is not None or end <= self.options.context
        assert fits, f"{end} positions in a context of {self.options.context}"
        table, norm, place = side or Side(self.position, self.embedding_norm)
        x_BTD = self.embedding(tokens_BT)
        if self.options.embedding_scale:
            x_BTD = x_BTD * math.sqrt(self.options.width)
        if self.token_type is not None:
            knows_one = self.options.token_types == 1
            x_BTD = x_BTD + (self.token_type.weight[0] if types_BT is None or knows_one else self.token_type(types_BT))
        if table is not None:
            row = self.options.position_offset
            vectors = table.weight[row : row + end] if positions_BT is None else table(row + positions_BT)
            x_BTD = x_BTD + vectors
        self.draws.at(0, place)
        return self.into_blocks(self.dropout(norm(x_BTD)))

    def turns(self, end: int, positions_BT: torch.Tensor | None = None) -> torch.Tensor | None:
        """The rotary table of positions 0 to end - 1, [2, T, K / 2]; or of these, [2, B, 1, T, K / 2], a table for
        each row that its heads share. None: nothing is rotated.
        """
        if self.options.positions != "rotary":
            return None
        return self.rotary[:, :end] if positions_BT is None else self.rotary[:, positions_BT].unsqueeze(2)

    def new_cache(self, lengths_B: torch.Tensor | None = None) -> Cache:
        """An empty cache of keys and values of the blocks that are here. lengths_B: int64, how long the prompts are;
        None: all alike.
        """
        o = self.options
        heads = next((m.kv_heads for m in self.modules() if isinstance(m, AnyAttention)), 0)
        return Cache(self.any_weight, len(self.blocks_here()), heads, o.width_of_head, o.window, lengths_B)

    def blocks_here(self) -> list[nn.Module]:
        """Those of ``blocks`` of which this stage has a part; the n-th has layer n of a cache."""
        return [block for block in self.blocks if is_here(block)]

    @property
    def any_weight(self) -> torch.Tensor:
        """For the type and the device of what is computed: the embedding's, or where another stage has that, another
        one's.
        """
        return self.embedding.weight if is_here(self.embedding) else next(self.parameters())


def refuse(options: TransformerOptions, model: str, *names: str) -> None:
    """Errors: ConfigError where an option is set that ``model`` has no use for."""
    for name in names:
        value, default = getattr(options, name), TransformerOptions.model_fields[name].default
        if value != default:
            raise ConfigError(f"model.{name}={str(value).lower()} is not for {model}; set it to {str(default).lower()}")
