"""Folders of Hugging Face's layout, written from models of ours without transformers."""

from pathlib import Path

import torch
from tiny import Held
from torch import nn

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.hf.writing import Exported, Writer
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

VOCAB = 11
LABELS = ("bad", "fair", "good")
SPECIAL = {"bos": 1, "eos": 2}
SMALL = {"layers": 2, "heads": 4, "width": 16, "context": 8, "ff_width": 12}
GPT2 = {**SMALL, "activation": "gelu_tanh"}
LLAMA = {**SMALL, "kv_heads": 2, "positions": "rotary", "activation": "swiglu", "norm": "rmsnorm", "bias": False}
BERT = {**SMALL, "norm_first": False, "embedding_norm": True, "token_types": 2, "head_bias": True, "norm_eps": 1e-12}
T5 = {
    **SMALL, "positions": "relative", "norm": "rmsnorm", "bias": False, "attention_scale": False, "tied": False,
    "activation": "geglu_tanh", "relative_buckets": 8, "relative_distance": 20,
}  # fmt: skip


def make_model(kind: str, **options) -> nn.Module:
    """``Decoder``, ``Classifier`` or ``Seq2Seq``, with random numbers in every tensor."""
    settings = TransformerOptions(**options)
    if kind == "Classifier":
        model: nn.Module = Classifier(settings, VOCAB, len(LABELS))
    else:
        model = {"Decoder": Decoder, "Seq2Seq": Seq2Seq}[kind](settings, VOCAB)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def write_folder(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32, **how) -> Path:
    """The model as a folder; ``file_bytes``: of a file at most."""
    kind = type(model).__name__
    labels = LABELS if kind == "Classifier" else ()
    folder.mkdir()
    facts = {"label_names": labels, "several_labels": True, "target_begin": SPECIAL["bos"]}
    Writer(Exported(kind, model.options, VOCAB, SPECIAL, **facts)).write(folder, Held(model), dtype, None, **how)
    return folder
