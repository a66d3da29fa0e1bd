"""How deep a parameter lies, and what a user may call it: for freezing, and for rates that fall towards the input.

    distance from the head          L = 3 blocks          optim.freeze=1
    embedding, position             4  = L + 1            frozen
    blocks.0                        3                     frozen
    blocks.1                        2
    blocks.2                        1
    norm, pooler, head              0

Below the blocks is what a model registers before the first of them. An encoder-decoder has two stacks, and each is
counted from its own top.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from hvdtrain.errors import ConfigError, plural

_BLOCK = re.compile(r"(.*?blocks)\.([0-9]+)\.")
_MOST_GROUPS = 12  # of names, told at once


def distances_from_head(names: Sequence[str]) -> dict[str, int]:
    """0 for what lies above the blocks. names: of all parameters, in the model's order."""
    layers = _layers(names)
    found, is_below = {}, bool(layers)
    for name in names:
        if (match := _BLOCK.match(name)) is not None:
            is_below = False
            found[name] = layers[match[1]] - int(match[2])
        else:
            found[name] = max(layers.values()) + 1 if is_below else 0
    return found


def rate_shares(names: Sequence[str], decay: float) -> dict[str, float]:
    """What each parameter takes of the learning rate: ``decay`` to the power of its distance from the head.

    Source: Clark et al. 2020, "ELECTRA", whose code this numbering is from; Bao et al. 2021, "BEiT".
    """
    return {name: decay**distance for name, distance in distances_from_head(names).items()}


def chosen(names: Sequence[str], which: int | str, option: str) -> list[str]:
    """The parameters that ``which`` means, in order: a number N the embeddings and the N lowest blocks of each stack; a
    text with commas names, the beginnings of names (whole parts), or globs. option: whose value it is.

    Errors: ConfigError where a part of it matches nothing.
    """
    found: set[str] = set()
    for part in [which] if isinstance(which, int) else [part.strip() for part in which.split(",")]:
        is_number = isinstance(part, int) or (part.isascii() and part.isdigit())
        matching = _lowest(names, int(part), option) if is_number else _matching(names, str(part))
        if not matching:
            raise ConfigError(f"{option}: nothing is called {part!r}; there are: {grouped(names)}")
        found.update(matching)
    return [name for name in names if name in found]


def grouped(names: Iterable[str]) -> str:
    """``encoder.blocks.*.attention.qkv (24), head (2)``: where they lie, and how many there."""
    counts = Counter(re.sub(r"\.[0-9]+\.", ".*.", name).rpartition(".")[0] or name for name in names)
    parts = [f"{group} ({count})" for group, count in counts.items()]
    more = [f"and {plural(len(parts) - _MOST_GROUPS, 'more group')}"] if len(parts) > _MOST_GROUPS else []
    return ", ".join([*parts[:_MOST_GROUPS], *more])


def _layers(names: Iterable[str]) -> dict[str, int]:
    """Stack of blocks -> how many it has."""
    layers: dict[str, int] = {}
    for name in names:
        if (match := _BLOCK.match(name)) is not None:
            layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)
    return layers


def _lowest(names: Sequence[str], count: int, option: str) -> list[str]:
    most = max(_layers(names).values(), default=0)
    if not 0 <= count <= most:
        raise ConfigError(f"{option}={count}: the model has {plural(most, 'layer')}")
    distances, layers = distances_from_head(names), _layers(names)
    found = []
    for name in names:
        match = _BLOCK.match(name)
        is_low = distances[name] > layers[match[1]] - count if match else distances[name] > 0
        found += [name] if is_low else []
    return found


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    return [n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)]
