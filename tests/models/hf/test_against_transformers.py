"""Logits of transformers' own models and of ours with the same weights, both ways, for every family.

Random models as they come make logits that hardly depend on their input: these have matrices N(0, 2 / sqrt(fan in)),
and biases and norms that are not 0 and 1, so that a tensor in the wrong place shows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import Held
from torch import nn

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier, MaskedLanguageModel, SpanModel
from hvdtrain.models.hf.pretrained import Pretrained
from hvdtrain.models.hf.writing import Exported, Writer
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

VOCAB, CONTEXT, ROWS, POSITIONS = 97, 48, 3, 40
SPECIAL = {"bos": 1, "eos": 2, "pad": 0}
TOKENS = {f"{role}_token_id": number for role, number in SPECIAL.items()}

LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 16}
BERT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "hidden_act": "gelu",
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": CONTEXT, "decoder_start_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "n_positions": CONTEXT,
}  # fmt: skip

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}),
    "gpt2-untied": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "n_inner": 24,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
        },
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**LLAMA, "head_dim": 12}),
    "llama-3": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**LLAMA, "head_dim": 8, "sliding_window": 7}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {**LLAMA, "rope_parameters": YARN}),
    "qwen2-window": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        {**LLAMA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "starcoder2": (hf.Starcoder2ForCausalLM, hf.Starcoder2Config, LLAMA),
    "bert": (hf.BertModel, hf.BertConfig, BERT),
    "bert-masked": (hf.BertForMaskedLM, hf.BertConfig, BERT),
    "bert-labels": (hf.BertForSequenceClassification, hf.BertConfig, {**BERT, "num_labels": 3, "hidden_act": "relu"}),
    "bert-answers": (hf.BertForQuestionAnswering, hf.BertConfig, BERT),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, BART),
    "bart-untied": (hf.BartForConditionalGeneration, hf.BartConfig, {**BART, "tie_word_embeddings": False}),
    "marian": (hf.MarianMTModel, hf.MarianConfig, {**BART, "scale_embedding": True, "activation_function": "silu"}),
    "mbart": (hf.MBartForConditionalGeneration, hf.MBartConfig, {**BART, "scale_embedding": True}),
    "pegasus": (hf.PegasusForConditionalGeneration, hf.PegasusConfig, {**BART, "activation_function": "relu"}),
    "blenderbot": (hf.BlenderbotForConditionalGeneration, hf.BlenderbotConfig, BART),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "t5-1.1": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {**T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    ),
    "t5-1.1-untied": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "Decoder": Decoder,
    "Seq2Seq": Seq2Seq,
    "MaskedLanguageModel": MaskedLanguageModel,
    "SpanModel": SpanModel,
    "Classifier": Classifier,
}


@torch.no_grad()
def theirs(case: str, seed: int = 0) -> Any:
    """A model of transformers that is not degenerate."""
    kind, config, sizes = CASES[case]
    model = kind._from_config(config(vocab_size=VOCAB, **TOKENS, **sizes), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not (tensor.is_floating_point() and tensor.requires_grad) and name != "final_logits_bias":
            continue
        random = torch.randn(tensor.shape, generator=generator)
        wide = tensor.dim() > 1 and name != "final_logits_bias"
        tensor.copy_(random * (2 / tensor.shape[-1] ** 0.5 if wide else 0.3) + (tensor if tensor.dim() == 1 else 0))
        if name.endswith(("Attention.q.weight",)):  # T5 does not scale, and has small queries for that
            tensor.mul_(tensor.shape[0] ** -0.5)
    for name in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens") if "untied" in case else ():
        if name == "lm_head":
            model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator))
        elif hasattr(getattr(model, "model", None), "encoder"):  # apart in transformers; ours has one for both
            model.get_submodule(name).weight.copy_(model.model.shared.weight)
    return model


def ours(folder: Path) -> tuple[nn.Module, Pretrained]:
    """The same of ours, read from its folder."""
    found = Pretrained(folder)
    sizes = [len(found.label_names)] if found.model == "Classifier" else []
    model = MODELS[found.model](TransformerOptions(**found.options), found.vocab_size, *sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found.names:
                parameter.data = found.read(name)
    if model.options.tied and hasattr(model.head, "features"):
        embedding = getattr(model, "encoder", model).embedding
        model.head.weight = embedding.weight
    return model.eval(), found


def export(model: nn.Module, found: Pretrained, folder: Path) -> Path:
    facts = {"label_names": found.label_names, "target_begin": SPECIAL["bos"], "bare": is_bare(found)}
    folder.mkdir()
    Writer(Exported(found.model, model.options, VOCAB, SPECIAL, **facts)).write(
        folder, Held(model), torch.float32, None
    )
    return folder


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, source = (torch.randint(3, VOCAB, (ROWS, POSITIONS), generator=generator) for _ in range(2))
    types = torch.randint(0, 2, (ROWS, POSITIONS), generator=generator)
    return tokens, source, types, torch.tensor([POSITIONS, 11, 1])


def is_bare(found: Pretrained) -> bool:
    """An encoder and its pooler."""
    return found.model == "Classifier" and "head.weight" not in found.names


@torch.no_grad()
def logits_of(model: Any, found: Pretrained) -> torch.Tensor:
    """Of ours or of theirs, on the same inputs; on padding 0."""
    tokens, source, types, lengths = inputs()
    mask = torch.arange(POSITIONS) < lengths[:, None]
    is_ours = type(model).__module__.startswith("hvdtrain")
    if found.model == "Decoder":
        return model.logits(model(tokens)) if is_ours else model(tokens).logits
    if found.model == "Seq2Seq":
        if is_ours:
            return model.logits(model(source, lengths, tokens))
        return model(input_ids=source, attention_mask=mask.long(), decoder_input_ids=tokens).logits
    if is_ours and is_bare(found):
        hidden = model.encoder(tokens, lengths, types)
        return torch.cat([hidden * mask[..., None], torch.tanh(model.pooler(hidden[:, :1]))], dim=1)
    if is_ours:
        out = model(tokens, lengths, types)
        out = model.logits(out) if found.model == "MaskedLanguageModel" else out
    else:
        told = model(tokens, attention_mask=mask.long(), token_type_ids=types)
        if "pooler_output" in told:
            return torch.cat([told.last_hidden_state * mask[..., None], told.pooler_output[:, None]], dim=1)
        out = told.logits if "logits" in told else torch.stack([told.start_logits, told.end_logits], dim=-1)
    return out * mask[..., None] if out.dim() == 3 else out


def assert_equal(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    largest = max(1.0, a.abs().max().item())
    assert (a - b).abs().max().item() <= tolerance * largest


def in_fp64(model: nn.Module, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in fp64, and theirs without its steps in fp32: norms, softmax; rotary tables, which are ours then."""
    model.double(), given.double()
    softmax, to_float = nn.functional.softmax, torch.Tensor.float
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))
    for module in given.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, of=module: nn.functional.rms_norm(
                x, x.shape[-1:], of.weight, of.variance_epsilon
            )
        if hasattr(module, "inv_freq"):
            cos, sin = (torch.cat([half, half], dim=-1)[None, :POSITIONS] for half in model.rotary)
            module.forward = lambda x, position_ids, cos=cos, sin=sin: (cos, sin)


@pytest.mark.parametrize("case", CASES)
def test_in_fp64_what_differs_is_rounding(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = theirs(case, seed=1)
    given.save_pretrained(tmp_path)
    model, found = ours(tmp_path)
    in_fp64(model, given, monkeypatch)
    assert_equal(logits_of(given, found), logits_of(model, found), 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_equal_both_ways_and_weights_to_the_bit(case: str, tmp_path: Path):
    given = theirs(case)
    given.save_pretrained(tmp_path / "theirs")
    model, found = ours(tmp_path / "theirs")
    wanted = logits_of(given, found)
    assert wanted.std() > 0.1  # else nothing is compared
    assert_equal(wanted, logits_of(model, found), 1e-5)

    kind = type(given)
    export(model, found, tmp_path / "ours")
    back, told = kind.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert {key: told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
    }
    assert_equal(wanted, logits_of(back.eval(), found), 1e-5)
    for name, tensor in given.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
