"""What a Transformer is made of: the options that its layers read."""

from typing import Literal

from pydantic import model_validator

from hvdtrain.options import Options, option


class TransformerOptions(Options):
    layers: int = option(4, "Transformer blocks", ge=1)
    encoder_layers: int = option(
        0, "Transformer blocks of the encoder in an encoder-decoder; 0: as many as layers", ge=0
    )
    heads: int = option(4, "attention heads; must divide width", ge=1)
    kv_heads: int = option(
        0, "heads of keys and values, shared by groups of heads; must divide heads; 0: as many", ge=0
    )
    window: int = option(
        0, "positions that causal attention sees, its own and those before (tokens); 0: all; not for encoders", ge=0
    )
    width: int = option(128, "model width (residual stream)", ge=1)
    context: int = option(256, "positions a model sees at once (tokens)", ge=1)
    ff_ratio: float = option(4.0, "feed-forward width / model width", gt=0)
    positions: Literal["learned", "rotary"] = option("learned", "how positions are told apart")
    activation: Literal["gelu", "swiglu"] = option("gelu", "of the feed-forward part")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalisation before each part")
    bias: bool = option(True, "biases in linear layers and LayerNorm")
    tied: bool = option(True, "output layer shares the embedding's matrix")
    dropout: float = option(0.0, "probability, on embeddings, attention and residual branches", ge=0, lt=1)
    vocab_multiple: int = option(1, "pad the vocabulary up to a multiple of this (64 suits GPUs)", ge=1)

    def padded(self, vocab_size: int) -> int:
        """The vocabulary with its padding: rows of the embedding, columns of the output layer."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def hidden_width(self) -> int:
        """Of the feed-forward part; SwiGLU's two thirds of it, up to a multiple of 8."""
        hidden = int(self.width * self.ff_ratio)
        return -(-2 * hidden // 24) * 8 if self.activation == "swiglu" else hidden

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TransformerOptions":
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.width}/{self.heads}")
        return self
