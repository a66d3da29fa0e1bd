"""The matrices that a Transformer's blocks multiply by, as an optimizer sees them that goes by whole matrices.

    attention.qkv.weight       q | k | v        three matrices, one behind another along the rows
    cross_attention.kv.weight  k | v
    feed_forward.up.weight     gate | up, where it is gated
    all other linear layers                     one

Adapters, biases of distances, and what lies before and behind the blocks (embeddings, poolers, heads) are none.
"""

from collections.abc import Iterable, Mapping, Sequence

from hvdtrain.models.lora import parts_of
from hvdtrain.models.options import TransformerOptions


def block_matrices(names: Iterable[str], shape: TransformerOptions) -> Mapping[str, Sequence[int]]:
    """Name of a weight -> rows of each matrix in it. names: of a model's parameters; shape: what it was made of."""
    found = {}
    for name in names:
        layer, _, own = name.rpartition(".")
        if own == "weight" and (parts := parts_of(layer, shape)):
            found[name] = list(parts.values())
    return found
