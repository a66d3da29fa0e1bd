"""How much arithmetic a training step is worth: model FLOPs, from a model's options and a batch's shapes.

Each model's ``training_flops`` calls what is here: forward and backward of one microbatch, from shapes on the host, so
that no device is waited for.

The convention is that of Megatron-LM (Narayanan et al. 2021, 2104.04473, appendix; its training.py has it as
num_floating_point_operations) and of PaLM (Chowdhery et al. 2022, 2204.02311, appendix B; its quotient is MFU):

- a product [m, k] @ [k, n] is 2 m k n FLOPs; matrix products alone are counted, forward once and backward twice (for
  each factor's gradient); no lookups, norms, activations, softmax, biases, loss or optimizer;
- what is computed a second time to save memory (activation checkpointing, flash attention's backward) does not count,
  so that the quotient is MFU and not HFU, the hardware's utilisation;
- what is not made does not count: a frozen weight's gradient, and below the lowest trained layer that of what goes in;
- padding counts: the products are made over it. So does the padding of the vocabulary (Megatron: padded_vocab_size).

In one point the sources differ: PaLM (and nanoGPT) count attention as if each query met every key, though a causal one
meets half of them. Here a query's products are those with the keys that it may see, which is exact for sliding windows
and packed documents too, and smaller than PaLM's: by 6 L D (T - 1) FLOPs a token for a decoder of L layers.

Shape letters:  B rows, T positions, S source positions, D model width, H heads, K width of a head
                (D / H, unless given), F feed-forward width, V vocabulary (padded)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hvdtrain.models.lora import is_adapter
from hvdtrain.models.options import TransformerOptions


class Trained:
    """Which parameters of a whole model are trained, and how large its adapters are. See ``frozen.freeze``."""

    def __init__(self, model: nn.Module):
        parameters = list(model.named_parameters(remove_duplicate=False))  # a tied one under both names
        self._trained = {name for name, parameter in parameters if parameter.requires_grad}
        self._layers = {name.rpartition(".")[0] for name in self._trained}
        sizes = {name: parameter.numel() for name, parameter in parameters}
        self._adapters: dict[str, list[tuple[bool, int, bool, int]]] = {}
        for a in sizes:
            if is_adapter(a) and a.endswith(".a"):
                b = f"{a.removesuffix('a')}b"
                both = a in self._trained, sizes[a], b in self._trained, sizes[b]
                self._adapters.setdefault(a.partition(".lora.")[0], []).append(both)

    def weight(self, layer: str) -> bool:
        return f"{layer}.weight" in self._trained

    def any(self, layer: str) -> bool:
        """Of its weight and its bias."""
        return layer in self._layers

    def adapters(self, layer: str) -> Sequence[tuple[bool, int, bool, int]]:
        """Of each ``a`` and ``b``: is it trained, and how many numbers it has."""
        return self._adapters.get(layer, ())


class _Flow:
    """A way through a model: what has been multiplied on it so far, and whether what flows needs a gradient.

    A product is made once forward, and backward once for each factor that needs a gradient:

        frozen          frozen         trained        frozen
        x needs none    none           none           some
        1               1              2              2          3, where x needs one and the weight is trained
    """

    def __init__(self, trained: Trained | None):
        self._trained = trained
        self.needs, self.flops = trained is None, 0

    def through(self, *layers: str) -> None:
        """Layers without a product: embeddings, norms."""
        if self._trained is not None:
            self.needs |= any(self._trained.any(layer) for layer in layers)

    def product(self, flops: int, layer: str, tokens: int) -> None:
        """A linear layer's, of ``flops`` forward over so many ``tokens``, and those of its adapters."""
        trained = self._trained
        if trained is None:
            self.flops += 3 * flops
            return
        needs = self.needs
        self.flops += flops * (1 + trained.weight(layer) + needs)
        self.needs |= trained.any(layer)
        for a_trained, a, b_trained, b in trained.adapters(layer):
            inside = needs or a_trained
            self.flops += 2 * tokens * (a * (1 + a_trained + needs) + b * (1 + b_trained + inside))
            self.needs |= inside or b_trained

    def attend(self, flops: int, keys: bool, bias: str = "") -> None:
        """Queries, which flow here, with keys, and what comes of them with values: ``flops`` each. keys: do keys and
        values need a gradient? bias: a layer that adds to the scores.
        """
        scores = self.needs or keys or (self._trained is not None and self._trained.any(bias))
        self.flops += flops * (1 + self.needs + keys) + flops * (1 + scores + keys)
        self.needs = scores


def decoder_flops(
    options: TransformerOptions,
    vocab_size: int,
    rows: int,
    positions: int,
    pairs: int | None = None,
    trained: Trained | None = None,
) -> int:
    """Forward and backward, head included. ``pairs``: of query and key in the batch, where documents are packed.

    trained: here and below, None: all parameters.
    """
    flow = _Flow(trained)
    flow.through("embedding", "position", "embedding_norm")
    pairs = rows * visible_pairs(positions, options.window) if pairs is None else pairs
    for number in range(options.layers):
        _block(flow, options, f"blocks.{number}", rows * positions, pairs, "relative")
    flow.through("norm")
    flow.product(rows * positions * _head_of_token(options, vocab_size), "head", rows * positions)
    return flow.flops


def encoder_flops(options: TransformerOptions, rows: int, positions: int, trained: Trained | None = None) -> int:
    """Forward and backward of an encoder alone, as a part of what trains."""
    return _encoder(options, rows, positions, trained, "").flops


def classifier_flops(
    options: TransformerOptions, classes: int, rows: int, positions: int, trained: Trained | None = None
) -> int:
    """Forward and backward: the encoder over all positions, pooler and head over each row's first."""
    flow = _encoder(options, rows, positions, trained)
    flow.product(rows * 2 * options.width * options.width, "pooler", rows)
    flow.product(rows * 2 * options.width * classes, "head", rows)
    return flow.flops


def masked_flops(
    options: TransformerOptions, vocab_size: int, rows: int, positions: int, masked: int, trained: Trained | None = None
) -> int:
    """Forward and backward: the encoder over all positions, the head over the masked ones."""
    flow = _encoder(options, rows, positions, trained)
    flow.product(masked * 2 * options.width * options.width, "head.dense", masked)
    flow.through("head.norm")
    flow.product(masked * _head_of_token(options, vocab_size), "head", masked)
    return flow.flops


def span_flops(options: TransformerOptions, rows: int, positions: int, trained: Trained | None = None) -> int:
    """Forward and backward: the encoder, and two scores of each position."""
    flow = _encoder(options, rows, positions, trained)
    flow.product(rows * positions * 2 * options.width * 2, "head", rows * positions)
    return flow.flops


def seq2seq_flops(
    options: TransformerOptions,
    vocab_size: int,
    rows: int,
    source: int,
    positions: int,
    trained: Trained | None = None,
) -> int:
    """Forward and backward of encoder (over ``source`` positions), decoder and head."""
    memory, flow = _Flow(trained), _Flow(trained)
    memory.through("embedding", "encoder_position" if options.separate_positions else "position")
    memory.through("encoder_embedding_norm")
    for number in range(options.encoder_layers or options.layers):
        pairs = rows * source * source
        _block(memory, options, f"encoder_blocks.{number}", rows * source, pairs, "encoder_relative")
    memory.through("encoder_norm")
    flow.through("embedding", "position", "embedding_norm")
    pairs = rows * visible_pairs(positions, options.window)
    for number in range(options.layers):
        _block(flow, options, f"blocks.{number}", rows * positions, pairs, "relative", memory, rows, source)
    flow.through("norm")
    flow.product(rows * positions * _head_of_token(options, vocab_size), "head", rows * positions)
    return memory.flops + flow.flops


def piece_flops(options: TransformerOptions, kind: str, positions: int, causal: bool = False) -> int:
    """Forward and backward of a part of a block (see pieces.py) over one row, all trained; cross-attention looks at as
    many source positions. 0 for what is no part of a block.
    """
    if kind in ("attention", "cross_attention"):
        pairs = visible_pairs(positions, options.window) if causal else positions * positions
        products = positions * (2 * _square(options) + _keys_values(options))
    elif kind == "feed_forward":
        pairs, products = 0, positions * _feed_forward(options)
    else:
        return 0
    return 3 * (products + pairs * 2 * _pair(options))


def visible_pairs(positions: int, window: int = 0) -> int:
    """(query, key) pairs of causal attention in one row. ``window``: keys a query sees, its own among them; 0: all."""
    # window 3      query 0   x
    #                     1   x x
    #                     2   x x x
    #                     3     x x x
    #                     4       x x x
    reach = min(window or positions, positions)
    return reach * (reach + 1) // 2 + (positions - reach) * reach


def packed_pairs(segments_BT: torch.Tensor, window: int = 0) -> int:
    """(query, key) pairs of causal attention within documents: neighbours of one number in a row, padding too."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins = begins_BT.flatten().nonzero().flatten()
    lengths = torch.diff(begins, append=begins.new_tensor([segments_BT.numel()]))
    reach = lengths.clamp(max=window) if window else lengths
    return int((reach * (reach + 1) // 2 + (lengths - reach) * reach).sum())


# --- forward FLOPs ------------------------------------------------------------------------------------------------


def _encoder(
    options: TransformerOptions, rows: int, positions: int, trained: Trained | None, prefix: str = "encoder."
) -> _Flow:
    """Over whole rows; every position sees every other."""
    flow = _Flow(trained)
    flow.through(*(f"{prefix}{layer}" for layer in ("embedding", "position", "token_type", "embedding_norm")))
    for number in range(options.layers):
        pairs, bias = rows * positions * positions, f"{prefix}relative"
        _block(flow, options, f"{prefix}blocks.{number}", rows * positions, pairs, bias)
    flow.through(f"{prefix}norm")
    return flow


def _block(
    flow: _Flow,
    options: TransformerOptions,
    name: str,
    tokens: int,
    pairs: int,
    bias: str,
    memory: _Flow | None = None,
    rows: int = 0,
    source: int = 0,
) -> None:
    """Self-attention, cross-attention where there is a ``memory``, and the feed-forward part."""
    with _part(flow, options, f"{name}.attention_norm"):
        flow.product(tokens * (_square(options) + _keys_values(options)), f"{name}.attention.qkv", tokens)
        flow.attend(pairs * _pair(options), flow.needs, bias)
        flow.product(tokens * _square(options), f"{name}.attention.out", tokens)
    if memory is not None:
        with _part(flow, options, f"{name}.cross_attention_norm"):
            before = memory.needs
            memory.product(rows * source * _keys_values(options), f"{name}.cross_attention.kv", rows * source)
            keys, memory.needs = memory.needs, before  # the next block begins with the memory again
            flow.product(tokens * _square(options), f"{name}.cross_attention.q", tokens)
            flow.attend(tokens * source * _pair(options), keys)
            flow.product(tokens * _square(options), f"{name}.cross_attention.out", tokens)
    with _part(flow, options, f"{name}.feed_forward_norm"):
        out = 2 * options.width * options.hidden_width
        flow.product(tokens * (_feed_forward(options) - out), f"{name}.feed_forward.up", tokens)
        flow.product(tokens * out, f"{name}.feed_forward.out", tokens)


@contextmanager
def _part(flow: _Flow, options: TransformerOptions, norm: str) -> Iterator[None]:
    """A part of a block, with its norm before it or behind."""
    if options.norm_first:
        flow.through(norm)
    yield
    if not options.norm_first:
        flow.through(norm)


def _square(options: TransformerOptions) -> int:
    """A token through [D, H K]: its query, or through [H K, D]: the output layer of attention."""
    return 2 * options.width * options.heads * options.width_of_head


def _keys_values(options: TransformerOptions) -> int:
    """A token's key and value, of fewer heads under grouped-query attention (``kv_heads``, 0: as many)."""
    kv_heads = options.kv_heads or options.heads
    return 2 * options.width * 2 * kv_heads * options.width_of_head


def _feed_forward(options: TransformerOptions) -> int:
    """Two matrices, or a gated one's three."""
    matrices = 3 if options.gated else 2
    return matrices * 2 * options.width * options.hidden_width


def _pair(options: TransformerOptions) -> int:
    """A query and a key, over all heads: the product of the two. The value's share in the output is as much again."""
    return 2 * options.heads * options.width_of_head


def _head_of_token(options: TransformerOptions, vocab_size: int) -> int:
    return 2 * options.width * options.padded(vocab_size)
