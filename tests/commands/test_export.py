"""A run that becomes a folder for transformers: the same logits, tokens and weights; what is refused, what is left."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from launch import Prepared, succeed
from tiny import pairs, write_corpus
from tokenizers import Tokenizer

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.comm.world import World
from hvdtrain.commands.export import export
from hvdtrain.errors import EXIT_IO, EXIT_USAGE, HvdtrainError
from hvdtrain.models.hf import writing
from hvdtrain.models.hf.pretrained import Pretrained
from hvdtrain.train import train
from hvdtrain.trained import find_run, open_model

ALONE = World()


def fail(*words, exit_code: int) -> str:
    with pytest.raises(HvdtrainError) as caught:
        export(*words, ALONE)
    assert caught.value.exit_code == exit_code
    return str(caught.value)


def our_model(run_dir: Path, which: str = "newest", weights: str | None = None) -> torch.nn.Module:
    group = LocalGroup()
    run = find_run(run_dir, group, which)
    corpora = run.learned_from().corpora
    return open_model(run, corpora, ALONE, whole_replicas(group), weights).replica.answering


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the recipe, by the command."""
    out = tmp_path_factory.mktemp("exported") / "deep" / "gpt2"
    done = succeed("export", trained, "--out", out)
    assert done.stdout == f"exported step 12 (raw, fp32) as GPT2LMHeadModel into {out}\n"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["gpt2"]
    return out


@torch.no_grad()
def test_transformers_finds_the_same_logits_and_goes_on_as_we_do(trained: Path, exported: Path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    ours = our_model(trained)
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    wanted = ours.logits(ours(tokens))
    assert theirs.dtype == torch.float32
    assert (theirs(tokens).logits - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())
    greedy = theirs.generate(tokens[:1, :4], do_sample=False, eos_token_id=None)  # to the end of the context
    assert greedy.shape == (1, 16)


def test_our_weights_come_back_to_the_bit(trained: Path, exported: Path):
    kept, found = dict(our_model(trained).named_parameters()), Pretrained(exported)
    assert set(found.names) == kept.keys()
    assert all(torch.equal(found.read(name), parameter) for name, parameter in kept.items())
    assert found.left_over == ()
    assert found.special_tokens == find_run(trained, LocalGroup()).learned_from().corpora.manifest.special_tokens


def test_its_tokenizer_encodes_as_ours(prepared: Prepared, exported: Path):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = Tokenizer.from_file(str(prepared.tokenizer))
    texts = [path.read_text(encoding="utf-8") for path in sorted(prepared.corpus.iterdir())][:3]
    for text in [*texts, "Ünïcödé  — żółw,\n\n 日本語 🙂", " two  spaces ", "<|endoftext|>"]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids
        assert theirs.decode(ours.encode(text).ids) == ours.decode(ours.encode(text).ids, skip_special_tokens=False)
    manifest = json.loads((prepared.shards / "manifest.json").read_text())["special_tokens"]
    assert theirs.eos_token_id == manifest["eos"]
    assert set(theirs(texts[0][:20])) == {"input_ids", "attention_mask"}  # GPT-2 takes no token types
    assert theirs.model_max_length == 16


def test_another_step_in_another_type(trained: Path, tmp_path: Path):
    out = tmp_path / "half"
    out.mkdir()  # empty: it may be there
    assert export(trained, out, ALONE, "raw", "6", "bf16").startswith("exported step 6 (raw, bf16) as GPT2LMHeadModel")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    wanted = our_model(trained, "6").norm.weight.detach().bfloat16()
    assert torch.equal(theirs.transformer.ln_f.weight, wanted)


@pytest.fixture
def quick(prepared: Prepared, tmp_path: Path) -> Iterator[Path]:
    """A recipe of two steps, of pairs: today's encoder-decoder is a Blenderbot."""
    settings = yaml.safe_load(prepared.recipe.read_text())
    settings |= {"train": {"steps": 2, "global_batch": 4}, "task": {"name": "seq2seq"}, "ema": {"decay": 0.5}}
    settings["model"]["vocab_multiple"] = 64
    rows = [([number % 40 + 3, 5], [number % 30 + 3, 7, 2]) for number in range(30)]
    write_corpus(
        tmp_path / "pairs", {"train": [pairs(rows)], "val": [pairs(rows[:5])]}, kind="pairs", special_tokens={"eos": 2}
    )
    settings["data"]["dir"] = str(tmp_path / "pairs")
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(settings))
    train(str(tmp_path / "pairs.yaml"), [], tmp_path / "run", "never", ALONE)
    return tmp_path / "run"


@torch.no_grad()
def test_an_encoder_decoder_with_averaged_weights_and_a_padded_vocabulary(quick: Path, tmp_path: Path):
    told = export(quick, tmp_path / "out", ALONE)
    assert told == f"exported step 2 (ema, fp32) as BlenderbotForConditionalGeneration into {tmp_path / 'out'}"
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    source, tokens = (torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    ours = our_model(quick)
    wanted = ours.logits(ours(source, torch.tensor([9, 9]), tokens))[..., :50]
    assert (theirs(input_ids=source, decoder_input_ids=tokens).logits - wanted).abs().max() <= 1e-5
    assert not torch.equal(our_model(quick, weights="raw").norm.weight, ours.norm.weight)
    generation = theirs.generation_config
    assert (generation.decoder_start_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 2, 2)
    assert (generation.forced_bos_token_id, generation.forced_eos_token_id) == (None, None)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_one_process_only(trained: Path, tmp_path: Path):
    with pytest.raises(HvdtrainError, match="export works on one process; mpirun started 2"):
        export(trained, tmp_path / "out", World(0, 2, 0, 2, "mpirun"))


@pytest.mark.parametrize("kind", ["file", "dangling link", "full folder"])
def test_nothing_is_overwritten(trained: Path, tmp_path: Path, kind: str):
    out = tmp_path / "out"
    if kind == "full folder":
        out.mkdir()
        (out / "mine").touch()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to("nowhere")
    assert f"{out} is there already, and not an empty folder" in fail(trained, out, exit_code=EXIT_USAGE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_transformers_has_not(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"] |= {"norm": "rmsnorm", "bias": False}
    path.write_text(yaml.safe_dump(settings))
    told = fail(tmp_path / "run", tmp_path / "out", exit_code=EXIT_USAGE)
    assert "gpt2: norm=rmsnorm (only layernorm), bias=false (only true)" in told
    assert "llama: positions=learned (only rotary), activation=gelu (only swiglu)" in told
    assert not (tmp_path / "out").exists()


def test_averaged_weights_that_are_not_there(trained: Path, tmp_path: Path):
    with pytest.raises(HvdtrainError, match=r"has no averaged weights \(ema\.decay was 0\); take --weights raw"):
        export(trained, tmp_path / "out", ALONE, "ema")


def test_a_full_disk_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    assert "No space left on device" in fail(trained, tmp_path / "out", exit_code=EXIT_IO)
    assert list(tmp_path.iterdir()) == []
