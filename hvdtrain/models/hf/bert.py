"""BERT (Devlin et al. 2018): the bare encoder, and with a head for masked tokens, for labels, for answers in a text."""

from hvdtrain.models.hf.family import Architecture, Dropout, Family, Fixed, Key, Names, Only, Word
from hvdtrain.models.hf.gpt2 import ACTIVATIONS

_LAYER = "bert.encoder.layer.*"
_NAMES: Names = {
    "encoder.embedding": "bert.embeddings.word_embeddings",
    "encoder.position": "bert.embeddings.position_embeddings",
    "encoder.token_type": "bert.embeddings.token_type_embeddings",
    "encoder.embedding_norm": "bert.embeddings.LayerNorm",
    "encoder.blocks.*.attention.qkv": tuple(f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
    "encoder.blocks.*.attention.out": f"{_LAYER}.attention.output.dense",
    "encoder.blocks.*.attention_norm": f"{_LAYER}.attention.output.LayerNorm",
    "encoder.blocks.*.feed_forward.up": f"{_LAYER}.intermediate.dense",
    "encoder.blocks.*.feed_forward.out": f"{_LAYER}.output.dense",
    "encoder.blocks.*.feed_forward_norm": f"{_LAYER}.output.LayerNorm",
    "pooler": "bert.pooler.dense",
}
_HEADS: dict[str, Names] = {
    "MaskedLanguageModel": {
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.weight": "cls.predictions.decoder.weight",
        "head.bias": "cls.predictions.bias",
    },
    "Classifier": {"head": "classifier"},
    "SpanModel": {"head": "qa_outputs"},
}

BERT = Family(
    model_type="bert",
    architectures=[
        Architecture("BertForMaskedLM", "MaskedLanguageModel"),
        Architecture("BertForSequenceClassification", "Classifier"),
        Architecture("BertForQuestionAnswering", "SpanModel"),
        Architecture("BertModel", "Classifier", without=("head",)),
        Architecture("BertForPreTraining", "MaskedLanguageModel"),
    ],
    entries=[
        Fixed(positions="learned", norm="layernorm", norm_first=False, embedding_norm=True, bias=True, head_bias=True),
        Key("layers", "num_hidden_layers", default=12),
        Key("heads", "num_attention_heads", default=12),
        Key("width", "hidden_size", default=768),
        Key("ff_width", "intermediate_size", default=3072),
        Key("context", "max_position_embeddings", default=512),
        Key("token_types", "type_vocab_size", default=2, least=1),
        Key("norm_eps", "layer_norm_eps", default=1e-12),
        Word("activation", "hidden_act", ACTIVATIONS, default="gelu"),
        Key("tied", "tie_word_embeddings", default=True),
        Only("position_embedding_type", "absolute"),
        Only("is_decoder", False),
        Only("add_cross_attention", False),
        Dropout("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ],
    names=lambda options, model: _NAMES | _HEADS[model],
    prefix="bert.",
    copies={
        "bert.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",),
        "cls.predictions.bias": ("cls.predictions.decoder.bias",),
    },
    unread=r"embeddings\.position_ids|pooler\..*|cls\..*",
)
