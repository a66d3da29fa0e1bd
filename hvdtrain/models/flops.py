"""How much arithmetic a training step is worth: model FLOPs, from a model's options and a batch's shapes.

Each model's ``training_flops`` calls what is here: forward and backward of one microbatch, from shapes on the host, so
that no device is waited for.

The convention is that of Megatron-LM (Narayanan et al. 2021, 2104.04473, appendix; its training.py has it as
num_floating_point_operations) and of PaLM (Chowdhery et al. 2022, 2204.02311, appendix B; its quotient is MFU):

- a product [m, k] @ [k, n] is 2 m k n FLOPs; matrix products alone are counted, forward once and backward twice (for
  each factor's gradient); no lookups, norms, activations, softmax, biases, loss or optimizer;
- what is computed a second time to save memory (activation checkpointing, flash attention's backward) does not count,
  so that the quotient is MFU and not HFU, the hardware's utilisation;
- frozen parameters count as if they were trained, though one or both of their backward products are not made: compare
  the MFU of a fine-tuned run with that of runs that freeze the same; adapters' own products do not count;
- padding does: the products are made over it. So does the padding of the vocabulary (Megatron: padded_vocab_size).

In one point the sources differ: PaLM (and nanoGPT) count attention as if each query met every key, though a causal one
meets half of them. Here a query's products are those with the keys that it may see, which is exact for sliding windows
and packed documents too, and smaller than PaLM's: by 6 L D (T - 1) FLOPs a token for a decoder of L layers.

Shape letters:  B rows, T positions, S source positions, D model width, H heads, K width of a head
                (D / H, unless given), F feed-forward width, V vocabulary (padded)
"""

import torch

from hvdtrain.models.options import TransformerOptions

PASSES = 3  # forward, and backward for both factors of a product


def decoder_flops(
    options: TransformerOptions, vocab_size: int, rows: int, positions: int, pairs: int | None = None
) -> int:
    """Forward and backward, head included. ``pairs``: of query and key in the batch, where documents are packed."""
    tokens = rows * positions
    pairs = rows * visible_pairs(positions, options.window) if pairs is None else pairs
    blocks = options.layers * (tokens * _block_of_token(options) + pairs * _pair(options))
    return PASSES * (blocks + tokens * _head_of_token(options, vocab_size))


def encoder_flops(options: TransformerOptions, rows: int, positions: int) -> int:
    """Forward and backward of an encoder alone, as a part of what trains."""
    return PASSES * options.layers * _encoder_block(options, rows, positions)


def classifier_flops(options: TransformerOptions, classes: int, rows: int, positions: int) -> int:
    """Forward and backward: the encoder over all positions, pooler and head over each row's first."""
    pooler, head = 2 * options.width * options.width, 2 * options.width * classes
    return encoder_flops(options, rows, positions) + PASSES * rows * (pooler + head)


def masked_flops(options: TransformerOptions, vocab_size: int, rows: int, positions: int, masked: int) -> int:
    """Forward and backward: the encoder over all positions, the head over the masked ones."""
    head = 2 * options.width * options.width + _head_of_token(options, vocab_size)
    return encoder_flops(options, rows, positions) + PASSES * masked * head


def span_flops(options: TransformerOptions, rows: int, positions: int) -> int:
    """Forward and backward: the encoder, and two scores of each position."""
    return encoder_flops(options, rows, positions) + PASSES * rows * positions * 2 * options.width * 2


def seq2seq_flops(options: TransformerOptions, vocab_size: int, rows: int, source: int, positions: int) -> int:
    """Forward and backward of encoder (over ``source`` positions), decoder and head."""
    encoder = (options.encoder_layers or options.layers) * _encoder_block(options, rows, source)
    tokens, memory = rows * positions, rows * source
    pairs = rows * visible_pairs(positions, options.window) + tokens * source  # with its own side, and with the memory
    cross = tokens * 2 * _square(options) + memory * _keys_values(options)
    block = tokens * _block_of_token(options) + cross + pairs * _pair(options)
    return PASSES * (encoder + options.layers * block + tokens * _head_of_token(options, vocab_size))


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


def _encoder_block(options: TransformerOptions, rows: int, positions: int) -> int:
    """Over whole rows; every position sees every other."""
    return rows * (positions * _block_of_token(options) + positions * positions * _pair(options))


def _block_of_token(options: TransformerOptions) -> int:
    """The linear layers of self-attention (queries, keys and values, output) and of the feed-forward part."""
    return 2 * _square(options) + _keys_values(options) + _feed_forward(options)


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
    """A query and a key, over all heads: the product of the two, and the value's share in the output."""
    return 2 * 2 * options.heads * options.width_of_head


def _head_of_token(options: TransformerOptions, vocab_size: int) -> int:
    return 2 * options.width * options.padded(vocab_size)
