"""Masked text from files to scores: what is learned from Python's library on one rank and two, and what is refused."""

import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kinds import Train
from launch import succeed, summary
from threads import on_ranks
from tiny import CPU, documents, random_tokens, seal, write_corpus

from data_prep.__main__ import main
from hvdtrain.comm.group import Group
from hvdtrain.comm.world import World
from hvdtrain.commands.evaluate import evaluate
from hvdtrain.config import load_config
from hvdtrain.data.corpora import DataOptions, open_corpora
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.shards import read_manifest, write_manifest
from hvdtrain.data.stream import TokenStream
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, EXIT_USAGE, ConfigError, HvdtrainError
from hvdtrain.files import file_sha256
from hvdtrain.tasks.mlm import MaskedText, MaskedTextOptions

# --- a library ----------------------------------------------------------------------------------------------------

SIZES = ("model.layers=2", "model.width=64", "train.steps=100", "schedule.warmup_steps=20", "optim.lr=5e-3")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a part of Python's standard library, in 512 tokens."""
    folder, packages = tmp_path_factory.mktemp("library"), ("asyncio", "concurrent", "email", "json", "unittest")
    text = ["--input", *(f"{sysconfig.get_path('stdlib')}/{name}" for name in packages), "--glob", "*.py"]
    sizes = ["--vocab-size", "512", "--special", "cls", "sep", "mask", "pad"]
    assert main(["tokenizer", *text, *sizes, "--out", str(folder / "t.json")]) == EXIT_OK
    how = ["--tokenizer", str(folder / "t.json"), "--val-fraction", "0.05", "--out", str(folder / "data")]
    assert main(["text", *text, *how]) == EXIT_OK
    return folder / "data"


def entropy(folder: Path) -> float:
    """Of the tokens of training, in nats: the loss of who knows how often each occurs, and nothing of their order."""
    stream = TokenStream([(folder, read_manifest(folder))], "train")
    share = np.bincount(stream.slice(0, len(stream))) / len(stream)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def test_a_tiny_bert_learns_what_follows_from_the_rest(library: Path, tmp_path: Path):
    """On two ranks, scored by one. Seen: 5.03 after 100 steps, 9.5 % right; the entropy is 5.27.

    Where the head's matrix begins at random: 5.13, 4.7 %.
    """
    words = (f"data.dir={library}", *SIZES, "eval.every=0", "metrics.tensorboard=false")
    succeed("train", "bert-tiny", *words, "--run-dir", tmp_path / "two", how="horovodrun", ranks=2, timeout_s=120)
    two = summary(tmp_path / "two")
    assert two["val_loss"] < entropy(library) - 0.1
    assert two["masked_accuracy"] > 0.07  # the commonest token is 3 % of them
    scores = evaluate(tmp_path / "two", [], "val", World())
    assert {name: scores[name] for name in ("val_loss", "masked_accuracy")} == pytest.approx(
        {name: two[name] for name in ("val_loss", "masked_accuracy")}, rel=1e-5
    )


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rows": "packed", "whole_words": True}])
def test_masks_are_equal_on_1_2_and_4_ranks_and_after_resume(shards: dict[str, Path], options: dict):
    """By the sum of the rows' digests, which hold every mask. Five steps cross into another epoch."""
    corpora = open_corpora(DataOptions(dir=str(shards["text"])))
    task = MaskedText(MaskedTextOptions(**options))

    def digests(group: Group, first: int = 0, microbatch: int = 0, steps: int = 5) -> list[int]:
        feed = Feed(8, 1, 40, microbatch, group.rank, group.size)
        loader = TrainLoader(task.open_training(corpora, feed).source, CPU)
        loader.rows_consumed = 40 * first
        found = []
        for _ in range(steps):
            loader.next_step()
            found.append(sum(group.all_gather_object(loader.fingerprint)) % (1 << 64))
        loader.close()
        return found

    (alone,) = on_ranks(1, digests)
    assert len({*alone}) == 5
    for size in (2, 4):
        assert on_ranks(size, digests) == [alone] * size
        assert on_ranks(size, lambda group: digests(group, microbatch=5)) == [alone] * size
    (resumed,) = on_ranks(1, lambda group: digests(group, first=2, steps=3))
    assert [(alone[1] + part) % (1 << 64) for part in resumed] == alone[2:]


def test_a_mixture_of_texts_is_masked_too(go: Train, shards: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    mixture = f"data.mixture={{{shards['text']}: 3, {shards['text2']}: 1}}"
    mixed = go("mixed", "task.name=mlm", mixture)
    assert f"a step is 4 x 8 tokens, of {shards['text']} 75.0%, {shards['text2']} 25.0%" in capsys.readouterr().out
    assert mixed["target_tokens"] == 34  # both splits in one line: 200 tokens, 6 in a row, of which one is told


# --- what is refused ----------------------------------------------------------------------------------------------


def fail(go: Train, *words: str, exit_code: int) -> str:
    with pytest.raises(HvdtrainError) as caught:
        go("run", "task.name=mlm", *words)
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (exit_code, True), caught.value
    return str(caught.value)


def test_a_tokenizer_without_a_mask(go: Train, shards: dict[str, Path], tmp_path: Path):
    manifest = read_manifest(shards["text"])
    write_manifest(shards["text"], replace(manifest, special_tokens={"eos": 0}))
    assert fail(go, exit_code=EXIT_BAD_DATA) == (
        f"DataError: task.name=mlm hides tokens behind [MASK], which the tokenizer of {shards['text']} lacks; make one "
        "with `python -m data_prep tokenizer --special cls sep mask pad`, and the shards with it"
    )
    assert not (tmp_path / "run").exists()


def test_words_that_cannot_be_told(go: Train, shards: dict[str, Path]):
    path = shards["text"] / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["end_of_word_suffix"] = "</w>"
    path.write_text(json.dumps(fields))
    manifest = json.loads((shards["text"] / "manifest.json").read_text())
    manifest.pop("manifest_sha256")
    manifest["tokenizer_sha256"] = file_sha256(path)
    (shards["text"] / "manifest.json").write_text(json.dumps(manifest))
    seal(shards["text"])
    told = fail(go, "task.mlm.whole_words=true", exit_code=EXIT_BAD_DATA)
    assert "marks where words end, not where they begin" in told
    assert go("tokens", "task.name=mlm")["step"] == 6


def test_rows_without_room(go: Train, shards: dict[str, Path], tmp_path: Path):
    told = fail(go, "model.context=2", exit_code=EXIT_USAGE)
    assert told == "ConfigError: model.context=2 leaves no room for text: [CLS] and [SEP] are of each row"
    short = {"train": [documents([random_tokens(6)])], "val": [documents([random_tokens(6)])]}
    write_corpus(tmp_path / "short", short, special_tokens={"eos": 0, "mask": 1})
    told = fail(go, f"data.dir={tmp_path / 'short'}", exit_code=EXIT_BAD_DATA)
    assert f"the train split of {tmp_path / 'short'} has 6 tokens: model.context=8 needs 7; prepare more text" in told
    packed = go("packed", "task.name=mlm", "task.mlm.rows=packed", f"data.dir={tmp_path / 'short'}", "train.steps=2")
    assert packed["target_tokens"] == 1


def test_packed_mixtures_and_other_kinds(go: Train, shards: dict[str, Path]):
    mixture = f"data.mixture={{{shards['text']}: 3, {shards['text2']}: 1}}"
    told = fail(go, mixture, "task.mlm.rows=packed", exit_code=EXIT_USAGE)
    assert "task.mlm.rows=packed takes one folder (data.dir), not data.mixture" in told
    told = fail(go, f"data.dir={shards['labels']}", exit_code=EXIT_BAD_DATA)
    assert f"task.name=mlm reads shards of kind text, but {shards['labels']} has kind labels" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("masked=0.9", "random=0.2"),
            "task.mlm: masked=0.9 and random=0.2 add up to 1.1; they are shares of the same",
        ),
        (("share=0",), "task.mlm.share=0: input should be greater than 0"),
        (("share=1.5",), "task.mlm.share=1.5: input should be less than or equal to 1"),
    ],
)
def test_shares_that_cannot_be(words: tuple[str, ...], told: str):
    with pytest.raises(ConfigError) as caught:
        load_config("bert-tiny", [f"task.mlm.{word}" for word in words])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
