"""GPT-2 (Radford et al. 2019)."""

from hvdtrain.models.hf.family import Architecture, Dropout, Family, Fixed, Key, Names, Only, Word, value_of

ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}  # of all families whose feed-forward part has two matrices

_NAMES: Names = {
    "embedding": "transformer.wte",
    "position": "transformer.wpe",
    "blocks.*.attention_norm": "transformer.h.*.ln_1",
    "blocks.*.attention.qkv": "transformer.h.*.attn.c_attn",
    "blocks.*.attention.out": "transformer.h.*.attn.c_proj",
    "blocks.*.feed_forward_norm": "transformer.h.*.ln_2",
    "blocks.*.feed_forward.up": "transformer.h.*.mlp.c_fc",
    "blocks.*.feed_forward.out": "transformer.h.*.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}

GPT2 = Family(
    model_type="gpt2",
    architectures=[Architecture("GPT2LMHeadModel", "Decoder")],
    entries=[
        Fixed(positions="learned", norm="layernorm", norm_first=True, bias=True),
        Key("layers", "n_layer", default=12),
        Key("heads", "n_head", default=12),
        Key("width", "n_embd", default=768),
        Key("ff_width", "n_inner", default=lambda config: 4 * value_of(config, "n_embd", 768)),
        Key("context", "n_positions", default=1024),
        Key("norm_eps", "layer_norm_epsilon", default=1e-5),
        Word("activation", "activation_function", ACTIVATIONS, default="gelu_new"),
        Key("attention_scale", "scale_attn_weights", default=True),
        Key("tied", "tie_word_embeddings", default=True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
        Dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ],
    names=lambda options, model: _NAMES,
    prefix="transformer.",
    transposed=frozenset({"c_attn", "c_proj", "c_fc"}),
    copies={"transformer.wte.weight": ("lm_head.weight",)},
    unread=r"h\.\d+\.attn\.(bias|masked_bias)",  # masks, in files of before 2023
)
