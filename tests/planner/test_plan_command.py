"""What ``hvdtrain plan`` prints, and what it says where it cannot."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import labelled, pairs, random_tokens, write_corpus, write_data

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.planner.estimate import plan

SMALL = ["model.layers=2", "model.heads=2", "model.width=32", "model.context=16", "eval.rows=4", "device=cpu"]
SMALL += ["train.steps=30", "schedule.warmup_steps=3"]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    write_data(tmp_path / "text", train=[random_tokens(500), random_tokens(460)], val=[random_tokens(100)])
    return f"data.dir={tmp_path / 'text'}"


def table(text: str) -> dict[str, list[str]]:
    rows = [re.split(r" {2,}", line.strip(), maxsplit=2) for line in text.splitlines() if line.startswith("  ")]
    return {name: rest for name, *rest in rows}


def test_a_table(shards: str):
    text = plan("demo", [*SMALL, shards, "train.global_batch=16", "train.microbatch=2"], 4, 2)
    assert text.splitlines()[0] == "plan: demo, 4 ranks on 2 nodes, cpu, fp32"
    rows = table(text)
    assert rows["global batch"] == ["16 x 16", "tokens, 256 in all"]
    assert rows["a rank's share"] == ["4 x 16"]
    assert rows["microbatches"] == ["2", "of 2 x 16"]
    assert rows["learning rate"] == ["0.002", "cosine, at the end 0.0002"]
    assert (rows["warm-up"], rows["steps"]) == (["3", "steps"], ["30"])
    assert rows["tokens"] == ["7,680", "8.00 epochs"]
    parts = text.partition("memory of a rank")[2].partition("\n\n")[0].splitlines()[1:]
    sizes = {re.split(r" {2,}", line.strip())[0]: float(re.split(r" {2,}", line.strip())[1]) for line in parts}
    assert sizes["total"] == pytest.approx(sum(sizes.values()) - sizes["total"], abs=0.05 * len(sizes))
    assert f"{2 * sizes['total']:,.0f}"[:3] in rows["total"][1]
    assert "a layer" in rows["activations"][1]
    assert text.count("note: process:") == 1
    # One column of names, one of numbers that end at the same place.
    assert len({len(line) - len(line.lstrip()) for line in parts}) == 1
    assert len({re.match(r".*?\d[\d,]*\.\d", line).end() for line in parts}) == 1


def test_json_says_the_same(shards: str):
    words = [*SMALL, shards]
    tree = json.loads(plan("demo", words, 2, as_json=True))
    rows = table(plan("demo", words, 2))
    held = tree["memory_bytes"]
    assert tree["memory_peak_mib"] == pytest.approx(held["total"] / 2**20, abs=0.05)
    assert held["total"] == sum(size for name, size in held.items() if name not in ("total", "of a layer"))
    assert rows["total"][0].replace(",", "") == f"{tree['memory_peak_mib']:.1f}"
    assert tree["workload"]["parameters"] == int(rows["parameters"][0].replace(",", ""))
    assert tree["sent_bytes"]["replica"] == 4 * tree["workload"]["parameters"]
    assert (tree["recipe"], tree["device"], tree["precision"]) == ("demo", "cpu", "fp32")
    assert all(isinstance(note, str) for note in tree["notes"])


def test_without_the_data(tmp_path: Path):
    words = [*SMALL, f"data.dir={tmp_path / 'later'}"]
    with pytest.raises(ConfigError, match=r"no shards in .*later.*the vocabulary is not known; give --vocab-size N"):
        plan("demo", words, 2)
    text = plan("demo", words, 2, vocab_size=50)
    assert f"note: no shards in {tmp_path / 'later'}: planned for a vocabulary of 50, without its files" in text
    assert "epochs" not in text
    assert "mapped shards " not in text.partition("note:")[0]
    for name, labels in (("sst2", " and 2 labels"), ("multi30k-tiny", "")):
        text = plan(name, [*SMALL, words[-1]], 2, vocab_size=50)
        assert f"a vocabulary of 50{labels}, without" in text
        assert table(text)["global batch"][0] == {"sst2": "256 x 16", "multi30k-tiny": "256 x 16"}[name]


def test_with_the_data_and_another_vocabulary(shards: str):
    with pytest.raises(ConfigError, match=r"--vocab-size 60, but .*text has a vocabulary of 50; leave it out"):
        plan("demo", [*SMALL, shards], 2, vocab_size=60)
    assert plan("demo", [*SMALL, shards], 2, vocab_size=50) == plan("demo", [*SMALL, shards], 2)


@pytest.mark.parametrize(
    ("words", "ranks", "each", "error", "message"),
    [
        (["train.global_batch=6"], 4, 0, ConfigError, "train.global_batch=6 sequences cannot be shared evenly by 4"),
        (["train.microbatch=3"], 2, 0, ConfigError, "train.microbatch=3 does not divide the 8 sequences"),
        (["train.global_tokens=100"], 2, 0, ConfigError, "train.global_tokens=100 is not a multiple"),
        (["optim.lrr=1"], 2, 0, ConfigError, "unknown key 'optim.lrr'"),
        ([], 0, 0, ConfigError, "--ranks 0: a job has 1 rank or more"),
        ([], 2, -3, ConfigError, "--ranks-per-node -3"),
        (
            ["sync.name=gossip", "sync.gossip.topology=torus"],
            2,
            0,
            ConfigError,
            "torus does not fit 2 replicas",
        ),
        (["task.name=classify"], 2, 0, DataError, "task.name=classify reads shards of kind labels"),
        (["data.mixture={nowhere: 1.0}"], 2, 0, ConfigError, "no shards in nowhere"),
    ],
)
def test_what_cannot_be_is_one_message(words, ranks, each, error, message, shards: str):
    with pytest.raises(error, match=message) as caught:
        plan("demo", [*SMALL, shards, *words], ranks, each)
    assert "\n" not in str(caught.value)


def test_a_scaled_recipe_is_planned_as_it_will_run(shards: str):
    words = [*SMALL, shards, "train.global_batch=32", "scaling.rule=sqrt", "scaling.base_batch=8", "optim.lr=1e-3"]
    tree = json.loads(plan("demo", words, 2, as_json=True))
    load = tree["workload"]
    assert (load["global_batch"], load["lr"], load["steps"]) == (32, pytest.approx(2e-3), 8)  # 30 steps of 8
    assert any("sqrt" in note and "8 -> 32" in note for note in tree["notes"])
    words = [*SMALL, shards, "train.global_batch=8", "scaling.per_rank=true"]
    assert json.loads(plan("demo", words, 4, as_json=True))["workload"]["global_batch"] == 32
    words = [*SMALL, shards, "train.global_batch=8", "train.epochs=2"]
    assert json.loads(plan("demo", words, 1, as_json=True))["workload"]["steps"] == 15  # 59 rows an epoch


def test_damaged_shards_are_not_planned_with(shards: str):
    (Path(shards.partition("=")[2]) / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        plan("demo", [*SMALL, shards], 2, vocab_size=50)


def test_rows_are_as_long_as_the_data_have_them(tmp_path: Path):
    texts = [([1] * 5, [1] * 9), ([1] * 3, [1] * 40), ([2] * 7, [3] * 2)]  # 40: above the context, left out
    write_corpus(
        tmp_path / "pairs",
        {"train": [pairs(texts)], "val": [pairs(texts[:1])]},
        kind="pairs",
        special_tokens={"eos": 0},
    )
    rows = [([1] * 6, 0), ([1] * 4, 1)]
    labels = {"train": [labelled(rows)], "val": [labelled(rows)]}
    write_corpus(tmp_path / "labels", labels, kind="labels", label_names=("a", "b", "c"))
    for recipe, folder, longest in (("multi30k-tiny", "pairs", 9), ("sst2", "labels", 6)):
        words = [*SMALL, f"data.dir={tmp_path / folder}", "train.global_tokens=90"]
        text = plan(recipe, words, 2)
        assert table(text)["global batch"][0] == f"{90 // longest} x {longest}"
        assert f"note: rows: as long as the longest that is trained on, {longest} tokens" in text
        assert table(text)["tokens"][1] == "at most"


def test_a_gpu_that_is_not_here(shards: str):
    text = plan("demo", [*SMALL, shards, "device=cuda", "precision=bf16"], 2)
    assert text.splitlines()[0] == "plan: demo, 2 ranks, cuda, bf16"
    assert "cuBLAS" in text
    assert "process" not in table(text)
    assert "mapped shards" not in table(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_without_a_gpu_is_said(shards: str):
    text = plan("demo", [*SMALL, shards, "device=auto"], 2)
    assert "note: no GPU here, so the plan is a CPU's; device=cuda plans for a GPU" in text
