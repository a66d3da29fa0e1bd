"""A folder of Hugging Face's layout: what is read of it and when, and what is wrong with it in one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import BERT, GPT2, LABELS, LLAMA, SMALL, SPECIAL, T5, VOCAB, make_model, write_folder
from safetensors.torch import load_file, save_file
from tiny import Held

from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.models.hf.families import FAMILIES, family_for
from hvdtrain.models.hf.family import Family, settled
from hvdtrain.models.hf.folder import TheirTensors
from hvdtrain.models.hf.layout import Layout
from hvdtrain.models.hf.pretrained import Pretrained
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.presets import PRESETS
from hvdtrain.slices import Rect

KINDS = {"gpt2": ("Decoder", GPT2), "llama": ("Decoder", LLAMA), "bert": ("Classifier", BERT), "t5": ("Seq2Seq", T5)}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "llama", make_model("Decoder", **LLAMA))


def change_config(folder: Path, **keys: Any) -> None:
    """``key=None`` takes it away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Pretrained(folder)
    return str(caught.value)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_piece_is_that_of_the_whole(tmp_path: Path, kind: str):
    model = make_model(KINDS[kind][0], **KINDS[kind][1])
    found = Pretrained(write_folder(tmp_path / "folder", model))
    held = Held(model)
    assert set(found.names) == {name for name, _ in model.named_parameters()}
    assert settled(found.options) == settled(model.options.model_dump())
    assert found.vocab_size == VOCAB
    assert found.special_tokens == (SPECIAL | {"pad": SPECIAL["eos"]} if kind == "t5" else SPECIAL)
    for name in found.names:
        shape, dtype = found.whole(name)
        assert (shape, dtype) == held.whole(name)
        assert torch.equal(found.read(name), held.read(name)), name
        rows = [Rect((n, *(0 for _ in shape[1:])), (1, *shape[1:])) for n in (shape[0] - 1, 0)]
        columns = [Rect((1, 1), (shape[0] - 1, 2))] if len(shape) > 1 else []
        for places in (rows, columns) if columns else (rows,):
            assert torch.equal(found.read(name, places), held.read(name, places)), name


def test_a_rank_reads_no_more_than_its_piece(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Its rows of q, k and v; nothing where opening the folder, and no other tensor."""
    asked: list[tuple[str, tuple[slice, ...]]] = []
    read = TheirTensors.read
    monkeypatch.setattr(TheirTensors, "read", lambda self, *what: asked.append(what) or read(self, *what))
    found = Pretrained(llama)
    assert asked == []
    width = 16
    found.read("blocks.1.attention.qkv.weight", [Rect((8, 0), (8, width)), Rect((20, 0), (4, width))])
    every = slice(0, width)
    names = {part: f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}
    assert asked == [(names["q"], (slice(8, 16), every)), (names["k"], (slice(4, 8), every))]


def test_a_padded_vocabulary_ends_with_zeros_and_is_cut_on_its_way_out(llama: Path, tmp_path: Path):
    found = Pretrained(llama, vocab_multiple=8)
    assert found.options["vocab_multiple"] == 8
    assert found.whole("embedding.weight")[0] == (16, 16)
    plain, padded = Pretrained(llama).read("embedding.weight"), found.read("embedding.weight")
    assert torch.equal(padded[:VOCAB], plain)
    assert padded[VOCAB:].eq(0).all()
    assert torch.equal(found.read("embedding.weight", [Rect((9, 1), (5, 3))]), padded[9:14, 1:4])
    model = make_model("Decoder", **LLAMA, vocab_multiple=8)
    again = write_folder(tmp_path / "cut", model)
    assert load_file(again / "model.safetensors")["model.embed_tokens.weight"].shape == (VOCAB, 16)


def test_half_precision_becomes_fp32_and_fp64_stays(tmp_path: Path):
    model = make_model("Decoder", **LLAMA)
    half = Pretrained(write_folder(tmp_path / "half", model, torch.bfloat16))
    assert half.whole("norm.weight")[1] == half.read("norm.weight").dtype == torch.float32
    assert torch.equal(half.read("norm.weight"), model.norm.weight.detach().bfloat16().float())
    double = Pretrained(write_folder(tmp_path / "double", model, torch.float64))
    assert double.whole("norm.weight")[1] == double.read("norm.weight").dtype == torch.float64


def test_what_fp16_does_not_hold_is_not_written(tmp_path: Path):
    model = make_model("Decoder", **LLAMA)
    with torch.no_grad():
        model.norm.weight[3] = 70_000.0
    with pytest.raises(ConfigError, match=r"norm\.weight has numbers up to 70000, which fp16 does not hold; take bf16"):
        write_folder(tmp_path / "half", model, torch.float16)


def test_several_files_are_found_by_their_index(llama: Path, tmp_path: Path):
    folder = write_folder(tmp_path / "files", make_model("Decoder", **LLAMA), file_bytes=4000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 8000 for path in folder.glob("*.safetensors"))
    one, several = Pretrained(llama), Pretrained(folder)
    assert all(torch.equal(one.read(name), several.read(name)) for name in one.names)
    index = folder / "model.safetensors.index.json"
    total = json.loads(index.read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values())

    (folder / files[1]).rename(tmp_path / "elsewhere")
    assert f"{folder / files[1]} is missing, which model.safetensors.index.json names" in refused(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../llama/model.safetensors"}}))
    assert "names a file outside its folder: '../llama/model.safetensors'" in refused(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_positions_that_both_sides_share_are_written_for_each(tmp_path: Path, tied: bool):
    folder = write_folder(tmp_path / "folder", make_model("Seq2Seq", **SMALL, tied=tied))
    tensors = load_file(folder / "model.safetensors")
    sides = [tensors[f"model.{side}.embed_positions.weight"] for side in ("encoder", "decoder")]
    assert torch.equal(*sides)
    assert ("model.encoder.embed_tokens.weight" in tensors) == (not tied)  # which transformers unties then
    assert Pretrained(folder).options["separate_positions"]


def test_a_prefix_may_be_missing_and_a_norm_have_its_first_names(tmp_path: Path):
    model = make_model("Classifier", **BERT)
    folder = write_folder(tmp_path / "bert", model)

    def as_before(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            short = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[short.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors["embeddings.position_ids"] = torch.arange(8)[None]

    change_tensors(folder, as_before)
    found = Pretrained(folder)
    assert all(torch.equal(found.read(name), Held(model).read(name)) for name in found.names)
    assert (found.left_over, found.label_names) == (("embeddings.position_ids",), LABELS)
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["label2id"] == {"bad": 0, "fair": 1, "good": 2}

    change_tensors(folder, lambda tensors: tensors.update({"bert.pooler.dense.bias": torch.zeros(16)}))
    assert "holds pooler.dense.bias twice: as bert.pooler.dense.bias and pooler.dense.bias" in refused(folder)


def test_a_bare_encoder_may_lack_its_pooler(tmp_path: Path):
    folder = write_folder(tmp_path / "bert", make_model("Classifier", **BERT))
    change_config(folder, architectures=["BertModel"])
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "classifier" in name])
    assert "pooler.weight" in Pretrained(folder).names
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name])
    found = Pretrained(folder)
    assert (found.model, len(found.names)) == ("Classifier", 5 + 2 * 12)
    assert all(name.startswith("encoder.") for name in found.names)


def test_rotary_positions_in_the_words_before_transformers_5(llama: Path):
    numbers = {"factor": 4.0, "original_max_position_embeddings": 4, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
    wanted = {"base": 5e5, "scaling": "llama3", "factor": 4.0, "original_context": 4, "low_factor": 1.0}
    change_config(llama, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers}, rope_theta=None)
    assert Pretrained(llama).options["rotary"] == wanted | {"high_factor": 2.0}
    change_config(llama, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "llama3", **numbers})
    assert Pretrained(llama).options["rotary"] == wanted | {"high_factor": 2.0}
    change_config(llama, rope_scaling=None)
    assert Pretrained(llama).options["rotary"] == {"base": 5e5, "scaling": "none"}


# --- what is refused -----------------------------------------------------------------------------------------------


def test_no_config(tmp_path: Path):
    assert "is no folder of a Hugging Face model: it has no config.json" in refused(tmp_path)


def test_another_architecture(llama: Path):
    change_config(llama, model_type="mamba")
    told = refused(llama)
    assert "model_type='mamba' is not among gpt2, llama, mistral, qwen2, starcoder2, bert, bart, marian, mbart" in told
    change_config(llama, model_type="llama", architectures=["LlamaForTokenClassification"])
    assert "architectures=['LlamaForTokenClassification'] is not among LlamaForCausalLM" in refused(llama)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"hidden_act": "gelu", "attention_bias": True},
            "hidden_act='gelu' (known: 'silu'); attention_bias=True differs",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' (known: default, linear, llama3, yarn)"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mystery": 1}}, "mystery=1 of rope_type linear"),
        ({"num_key_value_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"hidden_size": "wide"}, "width=wide: input should be a valid integer"),
    ],
)
def test_what_our_models_do_not_do(llama: Path, keys: dict[str, Any], told: str):
    change_config(llama, **keys)
    assert told in refused(llama)


@pytest.mark.parametrize(
    ("kind", "keys", "told"),
    [
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True, "activation_function": "mish"},
            "activation_function='mish'",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True (known: False)"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder=True (known: False)"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj='gated-mish' (known: relu, gated-gelu"),
    ],
)
def test_what_our_models_do_not_do_in_other_families(tmp_path: Path, kind: str, keys: dict[str, Any], told: str):
    folder = write_folder(tmp_path / kind, make_model(KINDS[kind][0], **KINDS[kind][1]))
    change_config(folder, **keys)
    assert told in refused(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "missing: model.layers.1.self_attn.k_proj.weight"),
        (lambda t: t.update({"model.layers.2.mlp.x": torch.ones(1)}), "not of this model: model.layers.2.mlp.x"),
        (lambda t: t.update({"model.norm.weight": torch.ones(8)}), "model.norm.weight has shape [8], not [16]"),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(12, 16)}),
            "model.embed_tokens.weight has shape [12, 16], not [11, 16] (vocab_size=11)",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(16).int()}), "model.norm.weight has type I32, not one of"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(11, 16)}),
            "lm_head.weight is not equal to model.embed_tokens.weight",
        ),
    ],
)
def test_other_tensors_than_config_says(llama: Path, change: Callable[[dict[str, torch.Tensor]], Any], told: str):
    change_tensors(llama, change)
    message = refused(llama)
    assert message.startswith(f"{llama} does not hold what its config.json says: ")
    assert told in message


def test_all_that_is_wrong_is_told_at_once_and_counted(llama: Path):
    change_config(llama, num_hidden_layers=1)
    change_tensors(llama, lambda tensors: tensors.pop("model.norm.weight"))
    told = refused(llama)
    assert "missing: model.norm.weight; not of this model: model.layers.1" in told
    assert told.endswith("and 4 more")


def test_a_pickle_is_not_read(llama: Path):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    told = refused(llama)
    assert "has pytorch_model.bin and no model.safetensors: a pickle can run any code as it is read, and is not" in told
    assert "save_pretrained(sys.argv[2])" in told
    (llama / "pytorch_model.bin").unlink()
    assert refused(llama) == f"{llama} has neither model.safetensors nor model.safetensors.index.json"


def test_a_truncated_file(llama: Path):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    told = refused(llama)
    assert f"cannot read {path}: " in told
    assert told.endswith("copy it once more")


# --- which options fit -----------------------------------------------------------------------------------------------


def test_options_that_no_family_has_are_named_family_by_family():
    options = TransformerOptions(layers=1, heads=2, width=8, context=8, activation="swiglu", window=3)
    with pytest.raises(ConfigError) as caught:
        family_for(options, "Decoder")
    lines = str(caught.value).splitlines()
    assert lines[0] == "no model of transformers has these options of model.*; what does not fit:"
    told = dict(line.strip().split(": ", 1) for line in lines[1:])
    assert list(told) == ["gpt2", "llama", "mistral", "qwen2", "starcoder2"]
    assert told["gpt2"] == "activation=swiglu (only gelu, gelu_tanh, relu, silu), window=3 (only 0)"
    assert "positions=learned (only rotary), activation" not in told["llama"]
    for option in ("window=3 (only 0)", "positions=learned (only rotary)", "norm=layernorm (only rmsnorm)"):
        assert option in told["llama"]


def test_an_encoder_that_normalises_first_has_no_class_of_theirs():
    options = TransformerOptions(**{**BERT, "norm_first": True, "token_types": 0})
    with pytest.raises(ConfigError, match=r"bert: token_types=0 \(at least 1\), norm_first=true \(only false\)$"):
        family_for(options, "MaskedLanguageModel")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_no_two_tensors_of_ours_have_one_name_there(family: Family):
    """And its defaults, which an old config.json may leave out, are a model."""
    options = TransformerOptions(**family.options({}))
    for architecture in family.architectures:
        layout = Layout(family, architecture, options, vocab_size=100, classes=3)
        names = [part.theirs for parts in layout.parts.values() for part in parts]
        assert len(set(names)) == len(names) > 20
        assert all(parts[-1].end == layout.wholes[name][0] for name, parts in layout.parts.items())
        assert family.misfits(options, architecture.model) == []


_OF_PRESET = {"bert": ("bert", "MaskedLanguageModel"), "vaswani": None, "t5_v1_1": ("t5", "Seq2Seq")}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_model_of_its_family(preset: str):
    """But Vaswani's interleaved sinusoids, which no class of theirs has."""
    is_decoder = preset in ("gpt2", "llama", "qwen2", "starcoder2")
    wanted = _OF_PRESET.get(preset, (preset, "Decoder" if is_decoder else "Seq2Seq"))
    options = TransformerOptions(preset=preset, dropout=0.1, vocab_multiple=64, init="xavier")
    if wanted is None:
        with pytest.raises(ConfigError, match=r"marian: positions=sinusoidal \(only sinusoidal_halves\)\n"):
            family_for(options, "Seq2Seq")
    else:
        assert family_for(options, wanted[1])[0].model_type == wanted[0]
