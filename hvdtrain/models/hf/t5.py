"""T5 (Raffel et al. 2019): version 1.0 (ReLU, tied) and 1.1 (gated, an output layer of its own)."""

from collections.abc import Mapping
from typing import Any

from hvdtrain.models.hf.family import (
    HAS_OUTPUT,
    Architecture,
    Config,
    Dropout,
    Family,
    Fixed,
    Key,
    Names,
    Word,
    value_of,
)
from hvdtrain.models.options import TransformerOptions

_ACTIVATIONS = {
    "relu": ("relu",),
    "geglu_tanh": ("gated-gelu",),
    "swiglu": ("gated-silu",),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new",),
    "silu": ("silu",),
}


def _names(options: TransformerOptions, model: str) -> Names:
    found: Names = {"embedding": "shared", "head": "lm_head"}
    for ours, side, last in (("encoder_", "encoder", 1), ("", "decoder", 2)):
        block, layer = f"{ours}blocks.*", f"{side}.block.*.layer"
        up = "DenseReluDense.wi"
        found |= {
            f"{ours}relative": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{block}.attention.qkv": tuple(f"{layer}.0.SelfAttention.{part}" for part in "qkv"),
            f"{block}.attention.out": f"{layer}.0.SelfAttention.o",
            f"{block}.attention_norm": f"{layer}.0.layer_norm",
            f"{block}.cross_attention.q": f"{layer}.1.EncDecAttention.q",
            f"{block}.cross_attention.kv": tuple(f"{layer}.1.EncDecAttention.{part}" for part in "kv"),
            f"{block}.cross_attention.out": f"{layer}.1.EncDecAttention.o",
            f"{block}.cross_attention_norm": f"{layer}.1.layer_norm",
            f"{block}.feed_forward.up": tuple(f"{layer}.{last}.{up}_{n}" for n in (0, 1))
            if options.gated
            else f"{layer}.{last}.{up}",
            f"{block}.feed_forward.out": f"{layer}.{last}.DenseReluDense.wo",
            f"{block}.feed_forward_norm": f"{layer}.{last}.layer_norm",
            f"{ours}norm": f"{side}.final_layer_norm",
        }
    return found


class _Output:
    """Is it tied, is it scaled? ``tie_word_embeddings`` said both. Since transformers 5 ``scale_decoder_outputs`` says
    the second, and tied is what has no matrix of its own in the folder.
    """

    def read(self, config: Config) -> dict[str, Any]:
        both = value_of(config, "tie_word_embeddings", True)
        scaled = value_of(config, "scale_decoder_outputs", both)
        return {"tied": scaled or not value_of(config, HAS_OUTPUT, not both), "head_scale": scaled}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"tie_word_embeddings": options["tied"], "scale_decoder_outputs": options["head_scale"]}


T5 = Family(
    model_type="t5",
    architectures=[Architecture("T5ForConditionalGeneration", "Seq2Seq")],
    entries=[
        Fixed(positions="relative", norm="rmsnorm", norm_first=True, bias=False, attention_scale=False),
        Key("layers", "num_decoder_layers", default=lambda config: value_of(config, "num_layers", 6)),
        Key("encoder_layers", "num_layers", default=6),
        Key("heads", "num_heads", default=8),
        Key("head_width", "d_kv", default=64),
        Key("width", "d_model", default=512),
        Key("ff_width", "d_ff", default=2048),
        Key("context", "n_positions", default=512),  # what it was trained on: its bias has no end
        Key("relative_buckets", "relative_attention_num_buckets", default=32),
        Key("relative_distance", "relative_attention_max_distance", default=128),
        Key("norm_eps", "layer_norm_epsilon", default=1e-6),
        Word("activation", "feed_forward_proj", _ACTIVATIONS, default="relu"),
        _Output(),
        Dropout("dropout_rate"),
    ],
    names=_names,
    copies={
        "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    },
    # of the decoder's attention to the encoder, in the first files of 1.0
    unread=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    written={"is_encoder_decoder": True},
)
