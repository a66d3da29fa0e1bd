"""Starcoder2 (Lozhkov et al. 2024): rotary positions with LayerNorm, biases and two feed-forward matrices."""

from hvdtrain.models.hf.family import Architecture, Dropout, Family, Fixed, Key, Names, Only, Word
from hvdtrain.models.hf.gpt2 import ACTIVATIONS
from hvdtrain.models.hf.llama import NAMES, Window, sizes
from hvdtrain.models.hf.rope import Rope

_FEED_FORWARD: Names = {
    "blocks.*.feed_forward.up": "model.layers.*.mlp.c_fc",
    "blocks.*.feed_forward.out": "model.layers.*.mlp.c_proj",
}

STARCODER2 = Family(
    model_type="starcoder2",
    architectures=[Architecture("Starcoder2ForCausalLM", "Decoder")],
    entries=[
        Fixed(norm="layernorm", norm_first=True, bias=True),
        Only("use_bias", True),
        *sizes(4096),
        Rope(),
        Window(default=0),
        Key("norm_eps", "norm_epsilon", default=1e-5),
        Word("activation", "hidden_act", ACTIVATIONS, default="gelu_pytorch_tanh"),
        Key("tied", "tie_word_embeddings", default=True),
        Dropout("residual_dropout", "embedding_dropout", "attention_dropout", default=0.0),
    ],
    names=lambda options, model: {**NAMES, **_FEED_FORWARD},
    prefix="model.",
    copies={"model.embed_tokens.weight": ("lm_head.weight",)},
)
