"""Llama (Touvron et al. 2023), Mistral's sliding window, Qwen2's biases of queries, keys and values alone."""

from collections.abc import Mapping
from typing import Any

from hvdtrain.models.hf.family import Architecture, Config, Dropout, Family, Fixed, Key, Misfit, Names, Only, value_of
from hvdtrain.models.hf.rope import Rope

NAMES: Names = {
    "embedding": "model.embed_tokens",
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.attention.qkv": tuple(f"model.layers.*.self_attn.{part}_proj" for part in "qkv"),
    "blocks.*.attention.out": "model.layers.*.self_attn.o_proj",
    "blocks.*.feed_forward_norm": "model.layers.*.post_attention_layernorm",
    "norm": "model.norm",
    "head": "lm_head",
}
_GATED: Names = {
    "blocks.*.feed_forward.up": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    "blocks.*.feed_forward.out": "model.layers.*.mlp.down_proj",
}


def sizes(context: int) -> list[Key]:
    """Of the decoders with rotary positions. Where config.json is silent: as many heads of keys as of queries."""
    return [
        Key("layers", "num_hidden_layers", default=32),
        Key("heads", "num_attention_heads", default=32),
        Key("kv_heads", "num_key_value_heads", default=lambda config: value_of(config, "num_attention_heads", 32)),
        Key("head_width", "head_dim", default=_head_width),
        Key("width", "hidden_size", default=4096),
        Key("ff_width", "intermediate_size", default=11008),
        Key("context", "max_position_embeddings", default=context),
    ]


def _head_width(config: Config) -> int:
    width: int = value_of(config, "hidden_size", 4096)
    return width // value_of(config, "num_attention_heads", 32)


class Window:
    """Mistral's: null sees all."""

    def __init__(self, default: int):
        self._default = default

    def read(self, config: Config) -> dict[str, Any]:
        return {"window": (config["sliding_window"] or 0) if "sliding_window" in config else self._default}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"sliding_window": options["window"] or None}


class LayersWindow:
    """Qwen2's, which may begin at some layer: ours is that of all layers, or of none."""

    def read(self, config: Config) -> dict[str, Any]:
        layers = config.get("num_hidden_layers", 32)
        is_used = value_of(config, "use_sliding_window", False) and value_of(config, "sliding_window", 4096)
        first = value_of(config, "max_window_layers", 28) if is_used else layers
        types = ["sliding_attention" if n >= first else "full_attention" for n in range(layers)]
        types = value_of(config, "layer_types", types)
        if len(set(types)) > 1:
            raise Misfit("a sliding window of some layers only (layer_types, max_window_layers)")
        return {"window": config["sliding_window"] if types[0] == "sliding_attention" else 0}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        window, layers = options["window"], options["layers"]
        return {
            "use_sliding_window": window > 0,
            "sliding_window": window or None,
            "max_window_layers": 0 if window else layers,
            "layer_types": ["sliding_attention" if window else "full_attention"] * layers,
        }


def _family(model_type: str, name: str, context: int, *entries: Any) -> Family:
    return Family(
        model_type=model_type,
        architectures=[Architecture(f"{name}ForCausalLM", "Decoder")],
        entries=[
            Fixed(norm="rmsnorm", norm_first=True, activation="swiglu"),
            Only("hidden_act", "silu"),
            *sizes(context),
            Rope(),
            Key("norm_eps", "rms_norm_eps", default=1e-6),
            Key("tied", "tie_word_embeddings", default=False),
            Dropout("attention_dropout", default=0.0),
            *entries,
        ],
        names=lambda options, model: {**NAMES, **_GATED},
        prefix="model.",
        copies={"model.embed_tokens.weight": ("lm_head.weight",)},
        unread=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )


LLAMA = _family("llama", "Llama", 2048, Key("bias", "attention_bias", "mlp_bias", default=False))
MISTRAL = _family("mistral", "Mistral", 131_072, Fixed(bias=False), Window(default=4096))
QWEN2 = _family("qwen2", "Qwen2", 32_768, Fixed(bias=False, qkv_bias="yes"), LayersWindow())
