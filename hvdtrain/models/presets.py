"""Families of Transformers as option sets: what ``model.preset`` puts under a recipe's own keys.

Only what a family fixes. Sizes are the recipe's, and so is what differs within a family: Mistral is ``llama`` with a
window, Llama 3 is ``llama`` with ``rotary.base=500000``.
"""

from typing import Any

_LLAMA = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied": False}
_VASWANI = {
    "positions": "sinusoidal",
    "embedding_scale": True,
    "norm_first": False,
    "activation": "relu",
    "init": "xavier",
}
_BART = {"position_offset": 2, "separate_positions": True, "embedding_norm": True}
_T5 = {
    "positions": "relative",
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "attention_scale": False,
    "bias": False,
    "init": "t5",
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"activation": "gelu_tanh"},
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "qkv_bias": "yes", "norm_eps": 1e-6},
    "starcoder2": {"positions": "rotary", "activation": "gelu_tanh"},
    "bert": {"token_types": 2, "embedding_norm": True, "norm_first": False, "norm_eps": 1e-12, "head_bias": True},
    "vaswani": _VASWANI,
    "marian": {**_VASWANI, "positions": "sinusoidal_halves", "activation": "silu", "head_bias": True},
    "bart": {**_BART, "norm_first": False},
    "mbart": {**_BART, "embedding_scale": True},
    "pegasus": {"positions": "sinusoidal_halves", "embedding_scale": True, "activation": "relu"},
    "blenderbot": {"separate_positions": True, "embedding_scale": True},
    "t5": {**_T5, "activation": "relu", "head_scale": True},
    "t5_v1_1": {**_T5, "activation": "geglu_tanh", "tied": False},
}
