"""How positions are told apart.

learned            a vector each, added to the embeddings
sinusoidal         such vectors without parameters: a frequency's sine beside its cosine (Vaswani et al. 2017)
sinusoidal_halves  the same numbers, all sines first, then all cosines (Marian, Pegasus)
rotary             queries and keys turned by angles that grow with the position (Su et al. 2021, "RoFormer")
relative           a number for each head and distance, added to attention's scores (Raffel et al. 2020, "T5")
none               a causal model can count what it sees; an encoder sees a bag of words

Shape letters:  B rows, T positions of queries, S of keys, D model width, H heads, K width of a head
"""

import math

import torch
from torch import nn

from hvdtrain.models.attention import product_dtype
from hvdtrain.models.cache import Cache
from hvdtrain.models.options import RotaryOptions, TransformerOptions

# --- added to the embeddings --------------------------------------------------------------------------------------


class Sinusoids(nn.Module):
    """A table of positions without parameters; it is no part of a checkpoint. ``weight``: [positions, D] fp32."""

    weight: torch.Tensor

    def __init__(self, positions: int, width: int, halves: bool):
        super().__init__()
        self._sizes = positions, width, halves
        self.make_tables()

    def make_tables(self) -> None:
        """Put the table on torch's present device."""
        self.register_buffer("weight", sinusoids(*self._sizes), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self.weight[positions]


def make_table(options: TransformerOptions) -> nn.Embedding | Sinusoids | None:
    """Vectors of the positions: row ``position_offset`` of ``weight`` is the first one's. None: none are added."""
    positions = options.position_offset + options.context
    if options.positions == "learned":
        return nn.Embedding(positions, options.width)
    if options.positions in ("sinusoidal", "sinusoidal_halves"):
        return Sinusoids(positions, options.width, halves=options.positions == "sinusoidal_halves")
    return None


def sinusoids(positions: int, width: int, halves: bool) -> torch.Tensor:
    """Sine and cosine of t / 10000^(2i / D) for each i below D / 2: [positions, D] fp32. Vaswani et al. 2017, 3.5."""
    with torch.device("cpu"):  # where models have no numbers yet, working them out would load torch's compiler
        angles = _angles(positions, 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
        pair = angles.sin(), angles.cos()
        table = (torch.cat(pair, dim=1) if halves else torch.stack(pair, dim=2).flatten(1)).float()
    return table.to(torch.get_default_device())


def _angles(positions: int, frequencies: torch.Tensor) -> torch.Tensor:
    return torch.arange(positions, dtype=torch.float64)[:, None] * frequencies


# --- rotary -------------------------------------------------------------------------------------------------------


def rotary_table(positions: int, head_width: int, options: RotaryOptions) -> torch.Tensor:
    """cos and sin of every position's angles: [2, positions, K / 2] fp32. Source: RoFormer, eq. 34."""
    with torch.device("cpu"):  # see sinusoids
        angles = _angles(positions, _frequencies(head_width, options))
        table = (torch.stack([angles.cos(), angles.sin()]) * _yarn_factor(options)).float()
    return table.to(torch.get_default_device())


def rotate(x_BHTK: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[k], x[k + K/2]) by its position's angle.

    ``table``: [2, T, K / 2], or [2, B, 1, T, K / 2] where the rows' positions differ.
    """
    cos, sin = table.to(x_BHTK.dtype)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _frequencies(head_width: int, options: RotaryOptions) -> torch.Tensor:
    """Angle per position of each pair: [K / 2] fp64, from fast to slow.

    linear  all divided by factor (Chen et al. 2023, "Position Interpolation")
    llama3  divided where a turn takes longer than the old context / low_factor, kept where it takes less than the old
            context / high_factor, in between in proportion to the turns (Llama 3.1)
    yarn    divided below slow_turns within the old context, kept above fast_turns, in between in proportion to the
            number of the pair (Peng et al. 2023, "YaRN", 3.2; the ends are rounded to whole pairs, as in its code)
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    kept = options.base**-exponents
    slowed = kept / options.factor
    if options.scaling == "llama3":
        turns = options.original_context * kept / (2 * math.pi)
        share = (turns - options.low_factor) / (options.high_factor - options.low_factor)
    elif options.scaling == "yarn":
        first, last = (_pair_of(turns, head_width, options) for turns in (options.fast_turns, options.slow_turns))
        first, last = max(math.floor(first), 0), min(math.ceil(last), head_width - 1)
        share = 1 - (torch.arange(head_width // 2, dtype=torch.float64) - first) / max(last - first, 1e-3)
    else:
        return slowed
    share = share.clamp(0, 1)
    return share * kept + (1 - share) * slowed


def _pair_of(turns: float, head_width: int, options: RotaryOptions) -> float:
    """The number of the pair, whole or not, that turns so often within the old context."""
    return head_width * math.log(options.original_context / (turns * 2 * math.pi)) / (2 * math.log(options.base))


def _yarn_factor(options: RotaryOptions) -> float:
    """What queries and keys are multiplied by: YaRN, eq. 22, sharpens the softmax of a longer context."""
    if options.scaling != "yarn":
        return 1.0
    return options.attention_factor or 0.1 * math.log(options.factor) + 1


# --- relative -----------------------------------------------------------------------------------------------------


def make_relative_bias(options: TransformerOptions, causal: bool) -> "RelativeBias | None":
    return RelativeBias(options, causal) if options.positions == "relative" else None


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances, added to the scores of every layer of one side.

    T5 keeps the table in the first layer of a side; here the model has it: ``weight`` [buckets, H].

    causal: all buckets are for keys before the query, and later ones are hidden, as are those out of the window.
    Otherwise half of them are for keys behind it.
    """

    def __init__(self, options: TransformerOptions, causal: bool):
        super().__init__()
        self.causal, self.window, self.most = causal, options.window, options.relative_distance
        self.weight = nn.Parameter(torch.empty(options.relative_buckets, options.heads).normal_())

    def forward(self, positions: int, sees: torch.Tensor | None = None) -> torch.Tensor:
        """What is added to the scores of whole rows: [1 or B, H, positions, positions].

        sees: bool [B, 1, T, T], or what spreads to it: False hides a key, as causal attention hides others.
        """
        # positions 3, distances:          -2 -1  0  1  2
        # query 0, a cut of them                  0  1  2
        #       1                             -1  0  1         the last query's is the first
        #       2                          -2 -1  0
        distances = torch.arange(1 - positions, positions, device=self.weight.device)
        bias_HL = self._numbers(distances).T
        if self.causal:
            hidden = distances > 0
            if self.window:
                hidden = hidden | (distances <= -self.window)
            bias_HL = bias_HL.masked_fill(hidden, -torch.inf)
        bias = bias_HL.unfold(1, positions, 1).flip(1)[None]
        return bias if sees is None else bias.masked_fill(~sees, -torch.inf)

    def of_cache(self, cache: Cache, positions_BT: torch.Tensor | None, sees: torch.Tensor | None) -> torch.Tensor:
        """The same for the tokens that ``cache.place`` has placed and told of: [1 or B, H, T, S slots]."""
        if positions_BT is None:  # prompts
            return self(cache.length)
        keys_BS = cache.positions_BS[:, : cache.length]
        bias = self._numbers(keys_BS[:, None] - positions_BT[:, :, None]).permute(0, 3, 1, 2)
        return bias if sees is None else bias.masked_fill(~sees, -torch.inf)

    def _numbers(self, distances: torch.Tensor) -> torch.Tensor:
        """[..., H] in the type of attention's products."""
        buckets = relative_buckets(distances, self.causal, len(self.weight), self.most)
        return self.weight[buckets].to(product_dtype(self.weight))


def relative_buckets(distances: torch.Tensor, causal: bool, buckets: int, most: int) -> torch.Tensor:
    """Key's position minus query's -> bucket, int64: near ones have one each, farther ones share by their logarithm.

    most: from here on all are one. In fp32, so that a distance on a border falls where T5's falls.
    """
    # causal, 16 buckets, most 128:   0  1  2 .. 7  8-11  12-15  16-22  23-31  32-45  46-63  64-90  91-
    side = buckets if causal else buckets // 2
    away = (-distances).clamp(min=0) if causal else distances.abs()
    near = side // 2
    share = torch.log(away.clamp(min=1).float() / near) / math.log(most / near)
    far = (near + (share * (side - near)).long()).clamp(max=side - 1)
    bucket = torch.where(away < near, away, far)
    return bucket if causal else bucket + side * (distances > 0)
