"""What a task cannot be trained or evaluated on: the exit code, the reason and the way out."""

from collections.abc import Callable
from pathlib import Path

import pytest
from kinds import LABELS, TASK_OF, WRITE, Train
from tiny import asked, documents, labelled, pairs, write_corpus

from hvdtrain.comm.world import World
from hvdtrain.commands.evaluate import evaluate
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_USAGE, HvdtrainError


def fail(work: Callable[[], object], exit_code: int) -> str:
    """The message, which all ranks agreed on: what they do not agree on each of them tells, and ends the others."""
    with pytest.raises(HvdtrainError) as caught:
        work()
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (exit_code, True), caught.value
    return str(caught.value)


def damage(folder: Path) -> None:
    """Every bit of every shard: who reads one finds that out."""
    for path in folder.glob("*.h5"):
        path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))


# --- shards of another kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", TASK_OF)
@pytest.mark.parametrize("kind", TASK_OF)
def test_training_on_another_kind(go: Train, shards: dict[str, Path], tmp_path: Path, kind: str, given: str):
    damage(shards[given])  # the manifest is enough to tell
    message = fail(lambda: go("run", f"data.dir={shards[given]}", kind=kind), EXIT_BAD_DATA)
    if kind == given:
        assert "is damaged in block 0" in message
    else:
        assert message == (
            f"DataError: task.name={TASK_OF[kind]} reads shards of kind {kind}, but {shards[given]} has kind {given}; "
            f"make them with `python -m data_prep {'labels' if kind == 'qa' else kind}`, or choose another task.name"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "given"), [("text", "labels"), ("labels", "text"), ("pairs", "labels")])
def test_evaluation_on_another_kind(go: Train, shards: dict[str, Path], tmp_path: Path, kind: str, given: str):
    """Given text, a classifier was made for no label at all, and the checkpoint blamed for not fitting it."""
    go("run", "train.steps=2", kind=kind)
    message = fail(lambda: evaluate(tmp_path / "run", [shards[given]], "val", World()), EXIT_BAD_DATA)
    assert f"task.name={TASK_OF[kind]} reads shards of kind {kind}, but {shards[given]} has kind {given}" in message


# --- settings ----------------------------------------------------------------------------------------------------

SETTINGS = {
    "mixed pairs": (
        "pairs",
        ["data.mixture={{{pairs}: 1, {pairs2}: 1}}"],
        "task.name=seq2seq takes one folder (data.dir), not data.mixture",
    ),
    "mixed labels": (
        "labels",
        ["data.mixture={{{labels}: 1, {labels2}: 1}}"],
        "task.name=classify takes one folder (data.dir), not data.mixture",
    ),
    "mixed and packed": (
        "text",
        ["task.lm.rows=packed", "data.mixture={{{text}: 1, {text2}: 1}}"],
        "task.lm.rows=packed takes one folder (data.dir), not data.mixture",
    ),
    "half a window": ("text", ["train.global_tokens=44"], "is not a multiple of model.context=8; set it to 40"),
    "less than a window": ("text", ["train.global_tokens=4"], "is not a multiple of model.context=8; set it to 8"),
    "uneven microbatches": ("text", ["train.microbatch=3"], "train.microbatch=3 does not divide the 4 sequences"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_looked_at_before_the_shards(go: Train, shards: dict[str, Path], tmp_path: Path, name: str):
    """To read all of a large corpus takes minutes: too long to wait for such a message."""
    kind, words, message = SETTINGS[name]
    damage(shards[kind])
    assert message in fail(lambda: go("run", *(w.format_map(shards) for w in words), kind=kind), EXIT_USAGE)
    assert not (tmp_path / "run").exists()


def test_no_token_is_guessed_to_begin_a_target(go: Train, tmp_path: Path):
    """It was token 0, whatever that is."""
    write_corpus(tmp_path / "new", {split: [ONE_ROW["pairs"]] for split in ("train", "val")}, kind="pairs")
    damage(tmp_path / "new")
    told = fail(lambda: go("run", f"data.dir={tmp_path / 'new'}", kind="pairs"), EXIT_BAD_DATA)
    assert f"{tmp_path / 'new'}: nothing says which token begins or ends a text" in told


# --- too little --------------------------------------------------------------------------------------------------

ONE_ROW = {
    "text": documents([range(30)]),
    "pairs": pairs([([1, 2], [3])]),
    "labels": labelled([([1, 2], 0)]),
    "qa": asked([("one", ["one"])]),
}
NO_ROW = {"pairs": pairs([]), "labels": labelled([]), "qa": asked([])}
MORE = {"labels": {"label_names": LABELS}, "qa": {"version": 2}}


def corpus(folder: Path, kind: str, **splits: dict) -> str:
    more = MORE.get(kind, {"special_tokens": {"eos": 0}})
    write_corpus(folder, {split: [datasets] for split, datasets in splits.items()}, kind=kind, **more)
    return f"data.dir={folder}"


@pytest.mark.parametrize("kind", TASK_OF)
def test_no_shard_of_a_split(go: Train, tmp_path: Path, kind: str):
    words = corpus(tmp_path / "new", kind, train=ONE_ROW[kind])
    damage(tmp_path / "new")
    told = f"{tmp_path / 'new'} has no val shards; prepare it again with a larger --val-fraction, or with validation"
    assert told in fail(lambda: go("run", words, kind=kind), EXIT_BAD_DATA)
    words = corpus(tmp_path / "old", kind, val=ONE_ROW[kind])
    assert "old has no train shards; it has: val" in fail(lambda: go("run", words, kind=kind), EXIT_BAD_DATA)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", NO_ROW)
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_row_in_a_split(go: Train, tmp_path: Path, kind: str, split: str):
    """Training went well until its first evaluation, which ended in a traceback."""
    splits = {"train": ONE_ROW[kind], "val": ONE_ROW[kind], split: NO_ROW[kind]}
    words = corpus(tmp_path / "empty", kind, **splits)
    told = f"the {split} split of {tmp_path / 'empty'} is empty; nothing to predict"
    assert told in fail(lambda: go("run", words, kind=kind), EXIT_BAD_DATA)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_no_row_that_is_short_enough(go: Train, tmp_path: Path, kind: str):
    long = {"pairs": pairs([([1], range(9))]), "labels": labelled([(range(9), 0)])}[kind]
    words = corpus(tmp_path / "long", kind, train=long, val=long)
    assert "none of the 1 rows has at most 8 tokens" in fail(lambda: go("run", words, kind=kind), EXIT_BAD_DATA)


@pytest.mark.parametrize("kind", WRITE)
def test_evaluation_of_a_split_that_is_not_there(go: Train, shards: dict[str, Path], tmp_path: Path, kind: str):
    go("run", "train.steps=2", kind=kind)
    told = f"{shards[kind]} has no test shards; it has: train, val"
    assert told in fail(lambda: evaluate(tmp_path / "run", [], "test", World()), EXIT_BAD_DATA)
