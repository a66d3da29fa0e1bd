"""The same random model twice, ours and, through an exported folder, that of transformers; far from degenerate."""

import math
from pathlib import Path
from typing import Any

import torch
from tiny import Held
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.hf.writing import Exported, Writer
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

PAD, BEGIN, END = 0, 1, 2


def twins(folder: Path, options: dict, vocab_size: int, seed: int, deviation: float, end: float) -> tuple[Any, Any]:
    """Both models. ``options`` with ``encoder_layers``: an encoder-decoder. deviation, end: see ``shaken``."""
    kind = Seq2Seq if "encoder_layers" in options else Decoder
    ours = shaken(kind(TransformerOptions(**options), vocab_size), seed, deviation, end)
    special = {"pad": PAD, "bos": BEGIN, "eos": END}
    folder.mkdir(parents=True)
    exported = Exported(kind.__name__, ours.options, vocab_size, special, target_begin=BEGIN)
    Writer(exported).write(folder, Held(ours), torch.float32, None)
    auto = AutoModelForCausalLM if kind is Decoder else AutoModelForSeq2SeqLM
    theirs = auto.from_pretrained(folder, dtype=torch.float32).eval()
    begin = {} if kind is Decoder else {"decoder_start_token_id": BEGIN}
    theirs.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END, **begin)
    return ours, theirs


@torch.no_grad()
def shaken(model: nn.Module, seed: int, deviation: float, end: float) -> nn.Module:
    """Matrices N(0, deviation / sqrt(fan in)): with a head that is not tied, texts differ. ``end``: the end's logit is
    so much higher than the others, about: by the head's bias, or else along a direction that all hidden states have.

    What comes from a source is small, or it, always the same, would repeat one token for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.copy_(noise * deviation / math.sqrt(parameter.shape[1]))
            if "cross_attention.out" in name:
                parameter.mul_(0.2)
        else:
            parameter.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
    if model.head.bias is not None:
        model.head.bias[END] += end
    elif getattr(model.norm, "bias", None) is not None:
        model.head.weight[END] += end * model.norm.bias / model.norm.bias.square().sum()
    return model.eval()
