"""Runs that begin with another run's weights: stopped and gone on with, on one and on two ranks, and refused."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import assert_equal, tensors_in
from launch import Done, Prepared, launch_rows, succeed, summary
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from hvdtrain.checkpoint.origin import open_origin
from hvdtrain.jobs.elastic_rank import main as nodes_that_share

LAYERS = {"layers": 2, "heads": 2, "width": 32, "context": 16}  # of the run that is begun from
KINDS = {
    "lora": ["model.lora.rank=2", "model.lora.targets=all", "ema.decay=0.9"],
    "lora-bf16": ["model.lora.rank=2", "model.lora.targets=all", "precision=bf16-weights"],
    "frozen": ["optim.freeze=1", "optim.layer_decay=0.5", "model.dropout=0.1"],
}
WITH_LORA = [kind for kind in KINDS if "lora" in kind]
SAY = ["--prompt", "def ", "--max-tokens", 8, "--temperature", 0, "--json"]
EXPORTS = {"merged": [], "adapter": ["--adapter"]}


@pytest.fixture(scope="module")
def recipe(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of ``trained`` without a shape of its own."""
    path = tmp_path_factory.mktemp("finetune") / "finetune.yaml"
    settings = yaml.safe_load(prepared.recipe.read_text(encoding="utf-8"))
    del settings["model"]
    settings |= {"seed": 5, "eval": {"every": 0}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(recipe: Path, trained: Path) -> Path:
    """For each of KINDS: a whole run, and one that stops in the middle and goes on when its folder is gone. And what is
    refused.
    """
    folder = recipe.parent
    copy = folder / "base"
    shutil.copytree(trained, copy)
    rows: list[Sequence[object]] = []
    for kind, settings in KINDS.items():
        words = ["train", recipe, f"model.from={copy}", *settings]
        rows += [[*words, "--run-dir", folder / kind], [*words, "train.steps=6", "--run-dir", folder / f"{kind}-half"]]
    for done in launch_rows(rows):
        assert done.exit_code == 0, done
    copy.rename(folder / "moved")
    rows = [
        ["train", recipe, f"model.from={copy}", *settings, "--run-dir", folder / f"{kind}-half"]
        for kind, settings in KINDS.items()
    ]
    rows += [["evaluate", folder / kind] for kind in KINDS]
    rows += [
        ["export", folder / kind, "--out", folder / f"{kind}-{name}", *more]
        for kind in WITH_LORA
        for name, more in EXPORTS.items()
    ]
    rows += [["generate", folder / kind, *SAY] for kind in WITH_LORA]
    rows += [["export", folder / "moved", "--out", folder / "base-exported"]]
    scores, texts = {}, {}
    for words, done in zip(rows, launch_rows(rows), strict=True):
        assert done.exit_code == 0, done
        if words[0] == "evaluate":
            scores[words[1].name] = json.loads(done.stdout)
        if words[0] == "generate":
            texts[words[1].name] = json.loads(done.stdout)
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    return folder


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000012"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_is_the_unbroken_run_and_needs_its_folder_no_more(runs: Path, kind: str):
    assert_equal(tensors_in(newest(runs / kind)), tensors_in(newest(runs / f"{kind}-half")))
    whole, half = summary(runs / kind), summary(runs / f"{kind}-half")
    assert half["val_loss"] == whole["val_loss"]
    assert half["from"] == whole["from"]


def test_what_looks_at_a_run_before_it_goes_on_needs_its_folder_no_more(
    runs: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
):
    """Its config.yaml knows the shape. In a folder of its own nothing does, and the run would not begin."""
    asked = [recipe, f"model.from={runs / 'base'}", *KINDS["lora"]]
    shutil.copytree(runs / "lora", runs / "swept" / "steps-12")
    sweep = ["sweep", *asked, "--vary", "train.steps=12", "--out"]
    rows = [["plan", *asked, "--ranks", "1"], ["submit", *asked, "--nodes", "1", "--dry-run"]]
    words = [[*row, "--run-dir", runs / name] for name in ("lora-half", "none") for row in rows]
    found = launch_rows([*words, [*sweep, runs / "none"]])
    assert [done.exit_code for done in found] == [0, 0, 65, 65, 65], found
    assert all("base is not there" in done.messages[0] for done in found[2:]), found
    assert "is finished (12 steps)" in succeed(*sweep, runs / "swept").stdout
    words = [str(recipe), *map(str, asked[1:])]
    assert nodes_that_share(["1", "2", str(runs / "lora-half"), *words]) == 0
    assert nodes_that_share(["1", "2", str(runs / "none"), *words]) == 65
    assert "base is not there" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_stays_as_it_was_and_has_no_moments(runs: Path, trained: Path, kind: str):
    before, after = tensors_in(newest(trained), "model."), tensors_in(newest(runs / kind))
    moments = {name.removeprefix("optimizer.exp_avg.") for name in after if name.startswith("optimizer.exp_avg.")}
    moved = {name.removeprefix("model.") for name, t in before.items() if not torch.equal(t, after[name])}
    if kind in WITH_LORA:
        assert moved == set()
        assert len(moments) == 2 * 6 * 2  # a and b of q, k, v, out, up, down
        assert all(".lora." in name for name in moments)
        averaged = moments if kind == "lora" else set()
        assert {name.removeprefix("ema.") for name in after if name.startswith("ema.")} == averaged
        assert all(t.dtype == torch.float32 for t in after.values() if t.is_floating_point())
    else:
        assert moved == moments
        assert {name.split(".")[0] for name in moved} == {"blocks", "norm"}
        assert all(name.startswith(("blocks.1.", "norm.")) for name in moved)


def test_the_summary_says_where_a_run_began_and_what_is_trained(runs: Path, trained: Path):
    found = summary(runs / "lora")
    assert found["from"]["weights"] == "step 12, raw"
    assert found["from"]["taken"] == len(tensors_in(newest(trained), "model."))
    assert len(found["from"]["new"]) == 24
    assert found["trained_parameters"] == sum(t.numel() for n, t in tensors_in(newest(runs / "lora"), "ema.").items())
    config = yaml.safe_load((runs / "lora" / "config.yaml").read_text(encoding="utf-8"))["model"]
    assert {key: config[key] for key in LAYERS} == LAYERS
    assert len(config["from_digest"]) == 16


def test_evaluation_later_is_that_of_the_run(runs: Path):
    scores = json.loads((runs / "scores.json").read_text(encoding="utf-8"))
    assert {kind: scores[kind]["val_loss"] for kind in KINDS} == {
        kind: summary(runs / kind)["val_loss"] for kind in KINDS
    }


@pytest.mark.parametrize("kind", WITH_LORA)
def test_an_export_is_merged_unless_the_adapters_are_asked_for(runs: Path, kind: str):
    run, merged = open_origin(runs / kind).tensors, open_origin(runs / f"{kind}-merged").tensors
    assert sorted(run.names) == sorted(merged.names)
    assert all(torch.equal(run.read(name), merged.read(name)) for name in run.names)
    adapter = runs / f"{kind}-adapter"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["base_model_name_or_path"]) == (2, str(runs / "base"))
    assert config["rank_pattern"] == {f"transformer.h.{number}.attn.c_attn": 6 for number in range(2)}
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("kind", WITH_LORA)
def test_what_it_says_is_as_probable_by_its_export_and_not_by_what_it_began_from(runs: Path, kind: str):
    """The mean log p of a greedy text's tokens, by transformers."""
    (said,) = json.loads((runs / "texts.json").read_text(encoding="utf-8"))[kind]["answers"]
    tokenizer = Tokenizer.from_file(str(runs / f"{kind}-merged" / "tokenizer.json"))
    tokens, scores = torch.tensor([tokenizer.encode("def ").ids]), []
    begun = tokens.shape[1]
    for name in (f"{kind}-merged", "base-exported"):
        theirs = GPT2LMHeadModel.from_pretrained(runs / name, attn_implementation="eager")
        with torch.no_grad():
            while tokens.shape[1] < begun + 8:
                tokens = torch.cat([tokens, theirs(tokens).logits[:, -1:].argmax(-1)], dim=1)
            log_p = theirs(tokens).logits[0, begun - 1 : -1].log_softmax(-1)
        scores.append(float(log_p.gather(1, tokens[0, begun:, None]).mean()))
    assert said["text"] == "def " + tokenizer.decode(tokens[0, begun:].tolist())
    assert scores[0] == pytest.approx(said["score"], rel=1e-5)
    assert scores[1] != pytest.approx(said["score"], rel=1e-4)


def test_two_ranks_begin_alike_and_send_little(runs: Path, recipe: Path):
    words = ["train", recipe, f"model.from={runs / 'moved'}", *KINDS["lora"], "--run-dir", runs / "two"]
    done = succeed(*words, how="mpirun", ranks=2)
    assert "2,304 of them trained (a rank sends 0.00879 MiB a step, not 0.145)" in done.stdout
    one, two = summary(runs / "lora"), summary(runs / "two")
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6)  # sums in another order
    first, second = (tensors_in(newest(runs / name)) for name in ("lora", "two"))
    assert all(torch.equal(first[n], second[n]) for n in first if n.startswith("model.") and ".lora." not in n)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def refused(runs: Path, recipe: Path) -> dict[str, Done]:
    base = f"model.from={runs / 'moved'}"
    rows = {
        "shape": [base, "model.width=64"],
        "rank": [base, "model.lora.rank=0"],
        "target": [base, "model.lora.targets=q,gate"],
        "alone": ["model.lora.rank=4"],
        "pin": [base, "model.from_digest=0123456789abcdef"],
        "frozen": [base, "optim.freeze=embeddings"],
        "nowhere": [f"model.from={runs / 'base'}"],
    }
    words = [["train", recipe, *words, "--run-dir", runs / "refused"] for words in rows.values()]
    found = launch_rows([*words, ["export", runs / "frozen", "--out", runs / "none", "--adapter"]])
    return dict(zip([*rows, "no adapters"], found, strict=True))


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("shape", 2, "model.width=64 (there 32): model.from="),
        ("rank", 2, "model.lora.rank=0: input should be greater than or equal to 1"),
        ("target", 2, "model.lora.targets: the model has no 'gate'; it has: q, k, v, out, up, down, all"),
        ("alone", 2, "lora adapts weights that are there: give from"),
        ("pin", 65, "not model.from_digest=0123456789abcdef"),
        ("frozen", 2, "optim.freeze: nothing is called 'embeddings'; there are: embedding (1), position (1), blocks.*"),
        ("nowhere", 65, "base is not there"),
        ("no adapters", 2, "frozen has no adapters (model.lora)"),
    ],
)
def test_what_cannot_be_is_one_clear_message(refused: dict[str, Done], name: str, code: int, message: str):
    done = refused[name]
    assert (done.exit_code, len(done.messages)) == (code, 1), done
    assert message in done.messages[0]
