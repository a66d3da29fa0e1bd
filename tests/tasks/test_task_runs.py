"""Whole runs in this process: mixtures, steps of so many tokens, shards that are checked or copied first."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch
from kinds import TASK_OF, Train
from launch import snapshot
from not_here import small_disk
from tiny import CPU, random_tokens, write_data

from hvdtrain.comm.world import World
from hvdtrain.commands.evaluate import evaluate
from hvdtrain.data.corpora import DataOptions, open_corpora
from hvdtrain.data.loader import Feed
from hvdtrain.data.shards import TOKENS_OF, read_manifest, write_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_IO, EXIT_USAGE, HvdtrainError
from hvdtrain.tasks.lm import LanguageModel

FULL, SIZES = "data.verify=full", "data.verify=sizes"


def fail(go: Train, *words: str, exit_code: int, kind: str = "text") -> str:
    with pytest.raises(HvdtrainError) as caught:
        go(*words, kind=kind)
    assert caught.value.exit_code == exit_code, caught.value
    return str(caught.value)


def flip_tokens(path: Path, kind: str = "text") -> None:
    """The lowest bit of a shard's every token: each is still one of the vocabulary."""
    with h5py.File(path) as file:
        places = [(file[name].id.get_offset(), file[name].id.get_storage_size()) for name in TOKENS_OF[kind]]
    content = bytearray(path.read_bytes())
    for first, size in places:
        for at in range(first, first + size, 2):
            content[at] ^= 1
    path.write_bytes(content)


# --- every kind --------------------------------------------------------------------------------------------------


RUNS = {
    **{task: (kind, ()) for kind, task in TASK_OF.items()},
    "mlm": ("text", ("task.name=mlm",)),
    "mlm, packed": ("text", ("task.name=mlm", "task.mlm.rows=packed", "task.mlm.whole_words=true")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_cut_in_two_or_into_microbatches_is_the_run_that_was_not(go: Train, tmp_path: Path, name: str):
    kind, words = RUNS[name]
    unbroken = go("unbroken", *words, kind=kind)
    go("cut", *words, "train.steps=3", kind=kind)
    resumed, parts = go("cut", *words, kind=kind), go("parts", *words, "train.microbatch=1", kind=kind)
    for key in ("sample_digest", "tokens", "val_loss", "best_val_loss"):
        assert resumed[key] == unbroken[key], key
    assert (parts["sample_digest"], parts["tokens"]) == (unbroken["sample_digest"], unbroken["tokens"])
    assert parts["val_loss"] == pytest.approx(unbroken["val_loss"], rel=1e-5)  # summed in another order
    scores = evaluate(tmp_path / "cut", [], "val", World())
    assert {**scores, "run": None, "split": None, "data": None, "wall_s": resumed["wall_s"]} == {
        key: resumed.get(key) for key in scores
    }


def test_packed_rows_are_a_run_of_their_own(go: Train):
    packed, windows = go("packed", "task.lm.rows=packed"), go("windows")
    assert packed["sample_digest"] != windows["sample_digest"]
    assert "task.lm.rows was 'windows' and is now 'packed'" in fail(
        go, "windows", "task.lm.rows=packed", exit_code=EXIT_USAGE
    )


# --- tokens of a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASK_OF)
def test_global_tokens_are_another_way_to_say_global_batch(go: Train, kind: str):
    """4 rows of 8 tokens are 32 tokens, padding counted."""
    rows, tokens = go("rows", kind=kind), go("tokens", "train.global_tokens=32", "train.global_batch=99", kind=kind)
    for key in ("sample_digest", "tokens", "val_loss"):
        assert tokens[key] == rows[key], key
    more = go("more", "train.global_tokens=64", kind=kind)
    assert more["tokens"] > rows["tokens"]
    assert kind != "text" or more["tokens"] == 6 * 64


def test_what_a_step_is_is_told(go: Train, capsys: pytest.CaptureFixture[str]):
    for kind, about in (
        ("text", "600 training tokens; a step is 8 x 8 tokens"),
        ("pairs", "60 pairs; a step is up to 64 tokens"),
        ("labels", "60 texts; a step is up to 64 tokens"),
    ):
        go(kind, "train.global_tokens=64", kind=kind)
        assert f"parameters; {about}" in capsys.readouterr().out


# --- mixtures ----------------------------------------------------------------------------------------------------


def mixture(shards: dict[str, Path], first: float, second: float) -> str:
    return f"data.mixture={{{shards['text']}: {first}, {shards['text2']}: {second}}}"


def test_a_mixture_is_data_of_its_own(go: Train, shards: dict[str, Path], tmp_path: Path, capsys):
    words = mixture(shards, 3, 1)
    mixed = go("mixed", words)
    assert f"1,200 training tokens; a step is 4 x 8 tokens, of {shards['text']} 75.0%, {shards['text2']} 25.0%" in (
        capsys.readouterr().out
    )
    alone = [go("first"), go("second", f"data.dir={shards['text2']}")]
    for key in ("data_digest", "sample_digest"):
        assert len({run[key] for run in (mixed, *alone)}) == 3, key
    assert mixed["target_tokens"] == 199  # both splits in one line
    assert evaluate(tmp_path / "mixed", [], "val", World())["val_loss"] == mixed["val_loss"]
    assert evaluate(tmp_path / "mixed", [shards["text2"]], "val", World())["target_tokens"] == 99


def test_a_mixture_goes_on_with_its_own_weights_only(go: Train, shards: dict[str, Path]):
    unbroken = go("unbroken", mixture(shards, 3, 1))
    go("cut", mixture(shards, 3, 1), "train.steps=3")
    for other in (mixture(shards, 1, 3), f"data.dir={shards['text']}"):
        assert "data_digest was" in fail(go, "cut", other, exit_code=EXIT_USAGE)
    assert go("cut", mixture(shards, 3, 1))["sample_digest"] == unbroken["sample_digest"]


def test_corpora_of_one_size_have_orders_of_their_own(tmp_path: Path):
    """Or the k-th row of each would always be from the same place. Here b says what a says, 25 higher."""
    tokens = random_tokens(400, vocab_size=25)
    for number, name in enumerate("ab"):
        write_data(tmp_path / name, train=[tokens + 25 * number])
    mixed = open_corpora(DataOptions(mixture={str(tmp_path / name): 1.0 for name in "ab"}))
    source = LanguageModel().open_training(mixed, Feed(8, 1, 40)).source
    (step,) = source.block(0, 1, 0)
    (batch,) = source.batches(step.content, CPU)
    drawn = [batch.tokens[batch.tokens[:, 0] // 25 == number] - 25 * number for number in (0, 1)]
    both = min(map(len, drawn))
    assert both > 9
    assert not torch.equal(drawn[0][:both], drawn[1][:both])


# --- shards that are checked first -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASK_OF)
def test_a_flipped_bit_is_found_before_the_first_step(go: Train, shards: dict[str, Path], tmp_path: Path, kind: str):
    """By ``full`` alone: ``sizes`` trains on it, and only the digest of what was seen tells."""
    whole = go("run", "train.steps=3", kind=kind)
    before = snapshot(tmp_path / "run")
    shard = shards[kind] / "train-00000.h5"
    flip_tokens(shard, kind)
    last = shard.stat().st_size - 1
    message = fail(go, "run", exit_code=EXIT_BAD_DATA, kind=kind)
    assert message.startswith(f"DataError: shard {shard} is damaged in block 0, bytes 0 to {last}: ")
    assert snapshot(tmp_path / "run") == before
    assert go("unseen", SIZES, "train.steps=3", kind=kind)["sample_digest"] != whole["sample_digest"]


def lost(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def strange(path: Path) -> None:
    shutil.copyfile(path, path.with_name("train-00007.h5"))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("verify", [FULL, SIZES])
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lost, "train-00000.h5 is listed in the manifest but is missing"),
        (truncated, "it is truncated or was replaced"),
        (strange, "train-00007.h5 is not listed in the manifest"),
    ],
)
def test_files_are_looked_at_always(
    go: Train, shards: dict[str, Path], tmp_path: Path, harm: Callable, told: str, verify: str, staged: bool
):
    harm(shards["text"] / "train-00000.h5")
    words = [verify, f"data.stage={tmp_path / 'stage'}"] if staged else [verify]
    assert told in fail(go, "run", *words, exit_code=EXIT_BAD_DATA)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "stage").exists()


# --- shards that are copied first --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASK_OF)
def test_a_copy_is_trained_from(go: Train, shards: dict[str, Path], tmp_path: Path, kind: str):
    """The copy is what is read: change it unnoticed, and the digest of what was seen is another."""
    stage = f"data.stage={tmp_path / 'node' / 'disk'}"
    plain, staged = go("plain", kind=kind), go("staged", stage, kind=kind)
    for key in ("sample_digest", "data_digest", "val_loss"):
        assert staged[key] == plain[key], key
    copy = tmp_path / "node" / "disk" / plain["data_digest"]
    for path in shards[kind].glob("*.h5"):
        assert (copy / path.name).read_bytes() == path.read_bytes()
    assert not list(copy.glob(".*"))
    flip_tokens(copy / "train-00000.h5", kind)
    assert go("other", stage, SIZES, kind=kind)["sample_digest"] != plain["sample_digest"]


def test_a_copy_is_made_once_and_checked_each_time(go: Train, shards: dict[str, Path], tmp_path: Path):
    """What lies on a node's disk from an earlier job was once believed, whatever data.verify said."""
    stage = f"data.stage={tmp_path / 'stage'}"
    copy = tmp_path / "stage" / go("first", stage)["data_digest"]
    made = {path: path.stat().st_ino for path in copy.glob("*.h5")}
    assert len(made) == 3
    go("second", stage)
    assert {path: path.stat().st_ino for path in copy.glob("*.h5")} == made
    os.truncate(copy / "train-00000.h5", 100)  # as a copy that was cut off: it is made again, alone
    go("third", stage)
    assert {path.name for path in made if path.stat().st_ino == made[path]} == {"train-00001.h5", "val-00000.h5"}
    flip_tokens(copy / "train-00001.h5")
    told = fail(go, "fourth", stage, exit_code=EXIT_BAD_DATA)
    assert f"shard {copy / 'train-00001.h5'} is damaged in block 0" in told


@pytest.mark.parametrize("verify", [FULL, SIZES])
def test_a_flipped_bit_is_not_copied(go: Train, shards: dict[str, Path], tmp_path: Path, verify: str):
    shard = shards["text"] / "train-00001.h5"
    flip_tokens(shard)
    message = fail(go, "run", f"data.stage={tmp_path / 'stage'}", verify, exit_code=EXIT_BAD_DATA)
    assert message.startswith(f"DataError: shard {shard} is damaged in block 0, bytes 0 to ")
    copy = tmp_path / "stage" / read_manifest(shards["text"]).data_digest
    assert {path.name for path in copy.iterdir()} == {"tokenizer.json", "train-00000.h5"}
    assert not (tmp_path / "run").exists()


def test_a_mixture_is_copied_whole(go: Train, shards: dict[str, Path], tmp_path: Path):
    words = mixture(shards, 3, 1)
    staged = go("staged", words, f"data.stage={tmp_path / 'stage'}")
    assert staged["sample_digest"] == go("plain", words)["sample_digest"]
    digests = {read_manifest(shards[name]).data_digest for name in ("text", "text2")}
    assert {path.name for path in (tmp_path / "stage").iterdir()} == digests


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_disk_without_room(go: Train, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Found before the first byte; and where the room goes to somebody else meanwhile, nothing half is left."""
    tokens = random_tokens(900_000)  # 2 bytes each
    write_data(tmp_path / "large", train=[tokens[:300_000], tokens[300_000:600_000]], val=[tokens[600_000:]])
    words = (f"data.dir={tmp_path / 'large'}", f"data.stage={disk}")
    message = fail(go, "run", *words, exit_code=EXIT_IO)
    assert f"OutputError: cannot stage to {disk} on " in message
    assert "choose another data.stage, or leave it empty" in message
    assert list(disk.iterdir()) == []
    monkeypatch.setattr("hvdtrain.data.corpora._check_room", lambda *all_is_well: None)
    message = fail(go, "run", *words, exit_code=EXIT_IO)
    copy = disk / read_manifest(tmp_path / "large").data_digest
    assert f"OutputError: cannot write {copy / 'train-00001.h5'}: No space left on device" in message
    assert {path.name for path in copy.iterdir()} == {"tokenizer.json", "train-00000.h5"}
    assert not (tmp_path / "run").exists()


def test_a_place_that_is_no_folder(go: Train, tmp_path: Path):
    (tmp_path / "file").touch()
    message = fail(go, "run", f"data.stage={tmp_path / 'file'}", exit_code=EXIT_IO)
    assert f"cannot stage to {tmp_path / 'file'} on " in message
    assert not (tmp_path / "run").exists()


def test_labels_of_other_names_are_refused(go: Train, shards: dict[str, Path], tmp_path: Path):
    """As many as those of the run, so that nothing else would tell: the scores would be those of chance."""
    go("run", kind="labels")
    other = shutil.copytree(shards["labels"], tmp_path / "other")
    manifest = read_manifest(other)
    names = tuple("awful" if name == "bad" else name for name in manifest.label_names)
    write_manifest(other, replace(manifest, label_names=names))
    assert evaluate(tmp_path / "run", [shards["labels"]], "val", World())["rows"] == 11
    with pytest.raises(HvdtrainError, match=r"another list of labels than .*awful"):
        evaluate(tmp_path / "run", [other], "val", World())
