"""BART (Lewis et al. 2019) and those that differ from it in where they normalise and how they count positions:

    bart         norm after     norm of embeddings      learned positions, the first in row 2
    mbart        norm before    norm of embeddings      learned positions, the first in row 2
    marian       norm after                             sinusoidal positions
    pegasus      norm before                            sinusoidal positions
    blenderbot   norm before                            learned positions

(Blenderbot-small normalises its decoder's embeddings before it adds positions, which ours does not.)
"""

from typing import Any

from hvdtrain.models.hf.family import Architecture, Dropout, Family, Fixed, Key, Names, Only, Word
from hvdtrain.models.hf.gpt2 import ACTIVATIONS

_SIDES = {"encoder_": "model.encoder", "": "model.decoder"}  # ours -> theirs


def _names() -> Names:
    found: Names = {
        "embedding": "model.shared",
        "head": "lm_head",
        "head.bias": "final_logits_bias",
    }
    for ours, theirs in _SIDES.items():
        block, layer = f"{ours}blocks.*", f"{theirs}.layers.*"
        found |= {
            f"{ours}position": f"{theirs}.embed_positions",
            f"{ours}embedding_norm": f"{theirs}.layernorm_embedding",
            f"{block}.attention.qkv": tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv"),
            f"{block}.attention.out": f"{layer}.self_attn.out_proj",
            f"{block}.attention_norm": f"{layer}.self_attn_layer_norm",
            f"{block}.cross_attention.q": f"{layer}.encoder_attn.q_proj",
            f"{block}.cross_attention.kv": tuple(f"{layer}.encoder_attn.{part}_proj" for part in "kv"),
            f"{block}.cross_attention.out": f"{layer}.encoder_attn.out_proj",
            f"{block}.cross_attention_norm": f"{layer}.encoder_attn_layer_norm",
            f"{block}.feed_forward.up": f"{layer}.fc1",
            f"{block}.feed_forward.out": f"{layer}.fc2",
            f"{block}.feed_forward_norm": f"{layer}.final_layer_norm",
            f"{ours}norm": f"{theirs}.layer_norm",
        }
    return found


def _family(model_type: str, name: str, context: int, *entries: Any, tables: bool = False, **fixed: Any) -> Family:
    return Family(
        model_type=model_type,
        architectures=[
            Architecture(f"{name}ForConditionalGeneration" if name != "Marian" else "MarianMTModel", "Seq2Seq")
        ],
        entries=[
            Fixed(norm="layernorm", bias=True, head_bias=True, **fixed),
            Key("layers", "decoder_layers", default=12),
            Key("encoder_layers", "encoder_layers", default=12),
            Key("heads", "decoder_attention_heads", "encoder_attention_heads", default=16),
            Key("width", "d_model", default=1024),
            Key("ff_width", "decoder_ffn_dim", "encoder_ffn_dim", default=4096),
            Key("context", "max_position_embeddings", default=context),
            Word("activation", "activation_function", ACTIVATIONS, default="gelu"),
            Key("embedding_scale", "scale_embedding", default=False),
            Key("tied", "tie_word_embeddings", default=True),
            Dropout("dropout", "attention_dropout"),
            *entries,
        ],
        names=lambda options, model: _names(),
        prefix="model.",
        copies={
            "model.shared.weight": (
                "model.encoder.embed_tokens.weight",
                "model.decoder.embed_tokens.weight",
                "lm_head.weight",
            )
        },
        doubles={"model.decoder.embed_positions.weight": "model.encoder.embed_positions.weight"},
        zeros={"head.bias": "final_logits_bias"},
        tables=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight") if tables else (),
        unread=r"(en|de)coder\.version",
        written={"is_encoder_decoder": True},
    )


_LEARNED: dict[str, Any] = {"positions": "learned", "separate_positions": True}
_SINES: dict[str, Any] = {"positions": "sinusoidal_halves", "embedding_norm": False, "tables": True}

BARTS = (
    _family("bart", "Bart", 1024, norm_first=False, embedding_norm=True, position_offset=2, **_LEARNED),
    _family("marian", "Marian", 1024, Only("share_encoder_decoder_embeddings", True), norm_first=False, **_SINES),
    _family("mbart", "MBart", 1024, norm_first=True, embedding_norm=True, position_offset=2, **_LEARNED),
    _family("pegasus", "Pegasus", 1024, norm_first=True, **_SINES),
    _family("blenderbot", "Blenderbot", 128, norm_first=True, embedding_norm=False, **_LEARNED),
)
