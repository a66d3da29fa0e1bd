"""What a Transformer is made of: the options that its layers read."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from hvdtrain.models.presets import PRESETS
from hvdtrain.options import Options, option

GATED = ("swiglu", "geglu_tanh")  # activations of three matrices


class RotaryOptions(Options):
    """Of ``positions=rotary``; see models/positions.py for what each scaling computes."""

    base: float = option(10_000.0, "angles turn by base^(-2k / head width) a position", gt=1)
    scaling: Literal["none", "linear", "llama3", "yarn"] = option(
        "none", "how positions beyond original_context are brought within what training saw"
    )
    factor: float = option(1.0, "of scaling: how many times longer the context has become", ge=1)
    original_context: int = option(0, "llama3, yarn: context before scaling (tokens); 0: not given", ge=0)
    low_factor: float = option(1.0, "llama3: waves longer than original_context / this are slowed by factor", gt=0)
    high_factor: float = option(4.0, "llama3: waves shorter than original_context / this stay as they are", gt=0)
    fast_turns: float = option(32.0, "yarn: what turns more often within original_context stays as it is", gt=0)
    slow_turns: float = option(1.0, "yarn: what turns less often within it is slowed by factor", gt=0)
    attention_factor: float = option(0.0, "yarn: multiplies queries and keys; 0: 0.1 ln(factor) + 1", ge=0)

    @model_validator(mode="after")
    def _scaling_fits(self) -> "RotaryOptions":
        reads: tuple[str, ...] = {
            "none": (),
            "linear": ("factor",),
            "llama3": ("factor", "original_context", "low_factor", "high_factor"),
            "yarn": ("factor", "original_context", "fast_turns", "slow_turns", "attention_factor"),
        }[self.scaling]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.default and name not in ("base", "scaling", *reads):
                raise ValueError(f"{name}={value} is not read with scaling={self.scaling}")
        if "original_context" in reads and not self.original_context:
            raise ValueError(f"scaling={self.scaling} needs original_context, the context before scaling (tokens)")
        if self.high_factor <= self.low_factor:
            raise ValueError(f"high_factor={self.high_factor} must be above low_factor={self.low_factor}")
        if self.fast_turns <= self.slow_turns:
            raise ValueError(f"fast_turns={self.fast_turns} must be above slow_turns={self.slow_turns}")
        return self


class TransformerOptions(Options):
    preset: Literal["none", *PRESETS] = option(  # type: ignore[valid-type]  # names of a table
        "none", "a family's option set, which stands under the keys that are given"
    )
    layers: int = option(4, "Transformer blocks", ge=1)
    encoder_layers: int = option(
        0, "Transformer blocks of the encoder in an encoder-decoder; 0: as many as layers", ge=0
    )
    heads: int = option(4, "attention heads; must divide width, unless head_width is given", ge=1)
    kv_heads: int = option(
        0, "heads of keys and values, shared by groups of heads; must divide heads; 0: as many", ge=0
    )
    head_width: int = option(0, "width of a head; 0: width / heads", ge=0)
    window: int = option(
        0, "positions that causal attention sees, its own and those before (tokens); 0: all; not for encoders", ge=0
    )
    width: int = option(128, "model width (residual stream)", ge=1)
    context: int = option(256, "positions a model sees at once (tokens)", ge=1)
    ff_ratio: float = option(4.0, "feed-forward width / model width", gt=0)
    ff_width: int = option(0, "feed-forward width, instead of ff_ratio; 0: from ff_ratio", ge=0)
    positions: Literal["learned", "rotary", "sinusoidal", "sinusoidal_halves", "relative", "none"] = option(
        "learned", "how positions are told apart; sinusoidal_halves: sines first, then cosines; relative: T5's bias"
    )
    position_offset: int = option(0, "learned, sinusoidal: row of the table of the first position (BART: 2)", ge=0)
    separate_positions: bool = option(False, "learned: encoder and decoder have a table each")
    rotary: RotaryOptions = RotaryOptions()
    relative_buckets: int = option(32, "relative: distances told apart, both directions together", ge=4)
    relative_distance: int = option(128, "relative: from here on (tokens) all distances are one", ge=1)
    token_types: int = option(0, "kinds of tokens with a vector each, of encoders (BERT: 2); 0: none", ge=0)
    embedding_scale: bool = option(False, "multiply embeddings by the root of width")
    embedding_norm: bool = option(False, "normalise what goes into the first block, on each side")
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu_tanh"] = option(
        "gelu", "of the feed-forward part; swiglu, geglu_tanh: gated"
    )
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalisation of each part")
    norm_first: bool = option(True, "normalise before each part; false: after it is added, and then not at the end")
    norm_eps: float = option(1e-5, "added to the variance in a normalisation", gt=0)
    attention_scale: bool = option(True, "divide attention's products by the root of head width (T5: false)")
    bias: bool = option(True, "biases in linear layers and LayerNorm")
    qkv_bias: Literal["as_bias", "yes", "no"] = option("as_bias", "biases of queries, keys and values (Qwen2: yes)")
    tied: bool = option(True, "output layer shares the embedding's matrix")
    head_bias: bool = option(False, "bias of the output layer")
    head_scale: bool = option(False, "tied: divide what the output layer reads by the root of width (T5)")
    init: Literal["normal", "xavier", "t5"] = option(
        "normal", "how weights start; normal: N(0, 0.02), as GPT-2 and BERT; xavier: as fairseq; t5: as T5"
    )
    dropout: float = option(0.0, "probability, on embeddings, attention and residual branches", ge=0, lt=1)
    vocab_multiple: int = option(1, "pad the vocabulary up to a multiple of this (64 suits GPUs)", ge=1)

    def padded(self, vocab_size: int) -> int:
        """The vocabulary with its padding: rows of the embedding, columns of the output layer."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def gated(self) -> bool:
        """Is the feed-forward part's activation multiplied by a product of its own?"""
        return self.activation in GATED

    @property
    def hidden_width(self) -> int:
        """Of the feed-forward part; from ff_ratio two thirds of it where it is gated, up to a multiple of 8."""
        hidden = int(self.width * self.ff_ratio)
        return self.ff_width or (-(-2 * hidden // 24) * 8 if self.gated else hidden)

    @property
    def width_of_head(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def biased_qkv(self) -> bool:
        return self.bias if self.qkv_bias == "as_bias" else self.qkv_bias == "yes"

    @model_validator(mode="before")
    @classmethod
    def _preset_stands_under(cls, given: Any) -> Any:
        """Keys that are given win. So a run's saved settings, which hold every key, are read as they are."""
        preset = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS[preset], **given} if isinstance(preset, str) and preset in PRESETS else given

    @field_validator("qkv_bias", mode="before")
    @classmethod
    def _yes_is_yaml(cls, value: Any) -> Any:
        """In YAML yes and no are true and false."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TransformerOptions":
        if not self.head_width and self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}; change one, or give head_width")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.positions == "rotary" and self.width_of_head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self._head_width_in_words}")
        if self.positions.startswith("sinusoidal") and self.width % 2:
            raise ValueError(f"positions={self.positions} need an even width, not {self.width}")
        return self

    @property
    def _head_width_in_words(self) -> str:
        return str(self.head_width or f"{self.width}/{self.heads}")

    @model_validator(mode="after")
    def _positions_fit(self) -> "TransformerOptions":
        """What the chosen positions would not read is refused."""
        tables = ("learned", "sinusoidal", "sinusoidal_halves")
        for name, needed in (
            ("position_offset", tables),
            ("separate_positions", ("learned",)),
            ("rotary", ("rotary",)),
            ("relative_buckets", ("relative",)),
            ("relative_distance", ("relative",)),
        ):
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and self.positions not in needed:
                raise ValueError(
                    f"{name} is for positions={' or '.join(needed)}, not {self.positions}; leave it at its default"
                )
        if self.relative_buckets % 4:
            raise ValueError(f"relative_buckets={self.relative_buckets} is not a multiple of 4")
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_distance={self.relative_distance} must be above half of relative_buckets="
                f"{self.relative_buckets}: that many distances have a bucket of their own"
            )
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> "TransformerOptions":
        if self.head_scale and not self.tied:
            raise ValueError("head_scale=true is for an output layer that shares the embedding's matrix: set tied=true")
        return self
