"""How weights start. Biases 0, norms 1; of matrices, as ``init`` says:

normal   N(0, 0.02) (GPT-2, BERT). Pre-norm: residual projections N(0, 0.02 / sqrt(n)), so that the sum of the n that a
         stream has does not grow with its depth (Radford et al. 2019, 2.3)
xavier   uniform in +-sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010), where queries, keys and values count as one
         matrix; embeddings, positions and heads N(0, D^-0.5) (fairseq)
t5       N(0, inputs^-0.5); embeddings N(0, 1), biases of distances N(0, D^-0.5) (Raffel et al. 2020)

Where attention does not divide by the root of K, the matrix of its queries starts that much smaller (T5).
Sinusoids and rotary tables are no weights.

Shape letters:  D model width, K width of a head
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from hvdtrain.models.options import TransformerOptions

_VECTORS = ("embedding.weight", "position.weight", "token_type.weight")  # which are looked up and added
_QKV = ("attention.qkv.weight", "attention.q.weight", "attention.kv.weight")
_PROJECTIONS = ("attention.out.weight", "feed_forward.out.weight")  # which add to the residual stream


def initial(model: nn.Module, options: TransformerOptions, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a whole ``model``, of which names and shapes are read: name and tensor, one after another, a tied
    one once, without adapters. Drawn on the CPU from ``seed`` alone: the same on every rank and device.
    """
    generator = torch.Generator().manual_seed(seed)
    added = Counter(stream for name, _ in model.named_parameters() if (stream := _stream(name)))
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            continue
        if parameter.dim() < 2:
            yield name, torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")
            continue
        drawn = torch.empty(parameter.shape, device="cpu")
        if options.init == "xavier" and not name.endswith((*_VECTORS, "relative.weight", "head.weight")):
            inputs, outputs = drawn.shape[1], 3 * drawn.shape[1] if name.endswith(_QKV) else drawn.shape[0]
            bound = math.sqrt(6 / (inputs + outputs))
            drawn.uniform_(-bound, bound, generator=generator)
        else:
            drawn.normal_(0.0, _deviation(name, drawn, options, added[_stream(name)]), generator=generator)
        if not options.attention_scale and name.endswith(_QKV[:2]):
            drawn[: options.heads * options.width_of_head] /= math.sqrt(options.width_of_head)
        yield name, drawn


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy ``tensors`` into the parameters of a whole model."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


def _deviation(name: str, drawn: torch.Tensor, options: TransformerOptions, added: int) -> float:
    """Of a normal distribution. ``added``: how many projections add to the stream that this one adds to, if it does."""
    if options.init == "normal":
        return 0.02 / math.sqrt(added) if options.norm_first and added else 0.02
    if options.init == "xavier" or name.endswith("relative.weight"):
        return 1 / math.sqrt(options.width)
    return 1.0 if name.endswith(_VECTORS) else 1 / math.sqrt(drawn.shape[1])


def _stream(name: str) -> str:
    """``encoder.blocks.3.attention.out.weight`` adds to the stream of ``encoder.blocks``; "": it is no projection.

    An encoder's stream and a decoder's are counted apart. A block adds 2, with cross-attention 3.
    """
    return name.rsplit(".", 4)[0] if name.endswith(_PROJECTIONS) else ""
