"""Bad input: the exit code that a batch script reads, one message that names the cure, no traceback, no hang.

The same table is run without a launcher, by mpirun (whose own exit code counts) and, for some rows, by horovodrun.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch import DATA_PREP, TRACE, Done, Prepared, launch, launch_rows, snapshot


@dataclass(frozen=True)
class Bad:
    """What to add to ``train RECIPE --run-dir {new}``, the exit code, and a pattern of the message and its cure.

    ``ranks``: how many are tried; what does not depend on them is tried without a launcher only.
    """

    words: str
    exit_code: int
    cure: str
    ranks: tuple[int, ...] = (1,)


BAD = {
    "missing data folder": Bad(
        "data.dir=/nowhere", 65, "no shards in /nowhere.*`python -m data_prep text --input", (1, 2)
    ),
    "three wrong settings": Bad(
        "optim.lrr=1 train.steps=ten model.layers=-1",
        2,
        'train.steps="ten": input should be a valid integer.*'
        "model.layers=-1: input should be greater than or equal to 1.*"
        "unknown key 'optim.lrr'; did you mean optim.lr.* valid here: optim.name, optim.lr, ",
        (1, 2),
    ),
    "heads": Bad("model.heads=3", 2, "heads=3 does not divide width=32", (1, 2)),
    "warm-up": Bad("schedule.warmup_steps=13", 2, "schedule.warmup_steps=13 is longer than train.steps=12"),
    "no value": Bad("optim.lr", 2, "unknown argument 'optim.lr'; settings are given as key=value"),
    "vocabulary": Bad(
        "data.dir={vocabulary}", 65, "vocabulary mismatch: .* 300 tokens, but .* has 301; prepare .* again", (1, 2)
    ),
    "tokenizer": Bad("data.dir={tokenizer}", 65, "not the tokenizer that made the shards.* put their tokenizer back"),
    "truncated": Bad("data.dir={truncated}", 65, "train-00000.h5 .*bytes.* truncated or was replaced"),
    "context": Bad("model.context=9999", 65, "fewer than one context.* --val-fraction, or lower model.context", (1, 2)),
    "global batch": Bad(
        "train.global_batch=5", 2, "cannot be shared evenly by 2 ranks; set train.global_batch=4 or 6", (2,)
    ),
    "a way of NCCL's": Bad(
        "sync.allreduce.topology=torus", 2, "Horovod has it over NCCL alone, and gradients travel over mpi here", (2,)
    ),
    "no whole replica": Bad(
        "mesh.pipeline=2", 2, "mesh.pipeline=2 takes 2 ranks a replica, and 1 is not a multiple of it; start 2 ranks"
    ),
    "heads over ranks": Bad("mesh.tensor=3", 2, "mesh.tensor=3 does not divide model.heads=2; set mesh.tensor=1 or 2,"),
    "stages": Bad(
        "mesh.pipeline=2 cut.schedule=interleaved cut.stages_per_rank=9",
        2,
        "makes 18 stages, but the model can be cut into 5 .*choose at most 5",
        (2,),
    ),
    "cuts that exclude one another": Bad(
        "mesh.pipeline=2 compile=model sync.name=zero sync.zero.stage=2",
        2,
        "stage=2 does not go with mesh.pipeline=2: .*compile=model does not go with mesh.pipeline=2: .*compile=blocks",
    ),
    "other recipe": Bad(
        "--run-dir {trained} model.width=64 seed=4",
        2,
        "model.width was 32 and is now 64; seed was 3 and is now 4.* give another --run-dir",
        (1, 2),
    ),
    "never": Bad("--run-dir {trained} --resume never", 2, "already holds a run; use --resume auto", (1, 2)),
    "nothing to resume": Bad("--resume {empty}", 65, "--resume .*empty: there is no checkpoint"),
    "resume of another recipe": Bad("--resume {trained} seed=4", 2, "seed was 3 and is now 4"),
}


@pytest.fixture(scope="module")
def places(prepared: Prepared, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that the table names."""
    folder = tmp_path_factory.mktemp("bad")
    made = {name: folder / name for name in ("vocabulary", "tokenizer", "truncated")}
    for path in made.values():
        shutil.copytree(prepared.shards, path)
    _edit_json(made["vocabulary"] / "tokenizer.json", lambda fields: fields["model"]["vocab"].update(zebra=300))
    _edit_json(made["tokenizer"] / "tokenizer.json", lambda fields: fields.update(truncation=None, version="1.1"))
    shard = made["truncated"] / "train-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1000])
    (folder / "empty").mkdir()
    return {**made, "trained": trained, "empty": folder / "empty", "new": folder / "new"}


def _edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    edit(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def _words(name: str, prepared: Prepared, places: dict[str, Path]) -> list[str]:
    words = ["train", str(prepared.recipe), "--run-dir", str(places["new"])]
    return [*words, *BAD[name].words.format_map(places).split()]  # of two --run-dir the last counts


def _assert_told(done: Done, exit_code: int, cure: str) -> None:
    assert done.rank_exit_code == exit_code, done
    assert len(done.messages) == 1, done
    assert re.search(cure, done.messages[0]), done
    assert TRACE not in done.text, done
    assert "Error" not in done.text.replace(done.messages[0], ""), done  # not told a second time in other words


@pytest.fixture(scope="module")
def alone(prepared: Prepared, trained: Path, places: dict[str, Path]) -> dict[str, Done]:
    names = [name for name, bad in BAD.items() if 1 in bad.ranks]
    before = snapshot(trained)
    rows = launch_rows([_words(name, prepared, places) for name in names])
    assert snapshot(trained) == before
    return dict(zip(names, rows, strict=True))


@pytest.mark.parametrize("name", [name for name, bad in BAD.items() if 1 in bad.ranks])
def test_one_process(name: str, alone: dict[str, Done], places: dict[str, Path]):
    _assert_told(alone[name], BAD[name].exit_code, BAD[name].cure)
    assert alone[name].stdout == ""
    assert not places["new"].exists()


@pytest.mark.parametrize("name", [name for name, bad in BAD.items() if 2 in bad.ranks])
def test_two_ranks(name: str, prepared: Prepared, trained: Path, places: dict[str, Path]):
    before = snapshot(trained)
    done = launch(*_words(name, prepared, places), how="mpirun", ranks=2, timeout_s=50)
    assert done.exit_code == BAD[name].exit_code  # mpirun's own
    _assert_told(done, BAD[name].exit_code, BAD[name].cure)
    assert snapshot(trained) == before
    assert not places["new"].exists()


@pytest.mark.parametrize("name", ["missing data folder", "heads"])
def test_two_ranks_without_mpi(name: str, prepared: Prepared, places: dict[str, Path]):
    """`horovodrun --gloo` always ends with 1 and a traceback of its own; in it, it names the ranks' exit code."""
    done = launch(*_words(name, prepared, places), how="gloo", ranks=2, timeout_s=50)
    assert done.exit_code == 1
    _assert_told(done, BAD[name].exit_code, BAD[name].cure)


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("train", "the following arguments are required: RECIPE"),
        ("train nonsense", "no recipe 'nonsense'; there are: .*demo, .*; or give a path to a .yaml file"),
        ("train nowhere.yaml", "cannot read recipe file nowhere.yaml: No such file or directory"),
        ("evaluate", "the following arguments are required: RUN_DIR"),
        ("frobnicate", r"invalid choice: '?frobnicate'? \(choose from '?train"),
        ("train demo --nonsense", "unknown argument '--nonsense'"),
    ],
)
def test_wrong_words(words: str, cure: str):
    _assert_told(launch(*words.split()), 2, cure)


def test_wrong_words_on_four_ranks():
    """They end before they have joined one another: rank 0 must have spoken before mpirun ends it for rank 3's sake."""
    _assert_told(launch("train", "demo", "--nonsense", how="mpirun", ranks=4), 2, "unknown argument '--nonsense'")


BAD_PREPARATION = {
    "": (2, "the following arguments are required: COMMAND"),
    "text --input {empty} --tokenizer {tokenizer}": (2, "the following arguments are required: --out"),
    "text --input {empty} {to}": (65, r"empty has no file that is read: none ends in \.txt, "),
    "text --input {binary} {to}": (65, "binary.txt is a binary file: zero byte at byte 3; .*--exclude"),
    "tokenizer --input {binary} --out {json}": (65, "binary.txt is a binary file: zero byte at byte 3; .*--exclude"),
    "text --input {latin} {to}": (65, "latin.txt is not UTF-8 text: byte 3 is 0xe9; .*iconv"),
    "text --input {zero} {to}": (65, "the input is empty: 1 files, 0 bytes"),
    "text --input {nowhere} {to}": (65, "nowhere does not exist"),
    "text --input {corpus} {to} --tokenizer {latin}": (65, "latin.txt is not a tokenizer file: "),
    "text --input {corpus} {to} --out {shards}": (2, "already holds shards made otherwise .*choose another --out"),
    "text --input {corpus} {to} --val-fraction 1": (2, "--val-fraction: invalid fraction"),
    "tokenizer --input {corpus} --out {json} --vocab-size 200": (2, "--vocab-size 200: bpe needs 257 or more"),
    "tokenizer --input {corpus} --out {tokenizer} --vocab-size 301": (2, "remove it or choose another --out"),
}


@pytest.fixture(scope="module")
def prepared_badly(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """What was said to each command, all of them in one process, which has written nothing."""
    folder = tmp_path_factory.mktemp("bad_preparation")
    (folder / "binary.txt").write_bytes(b"ELF\0\1\2")
    (folder / "latin.txt").write_bytes("café".encode("latin-1") + b" ")
    (folder / "zero.txt").touch()
    (folder / "empty").mkdir()
    names = {name: folder / f"{name}.txt" for name in ("binary", "latin", "zero")}
    names |= {name: folder / name for name in ("empty", "out", "nowhere", "json")} | vars(prepared)
    names["to"] = f"--tokenizer {prepared.tokenizer} --out {folder / 'out'}"
    before = snapshot(prepared.folder)
    done = launch_rows([words.format_map(names).split() for words in BAD_PREPARATION], module="data_prep")
    assert snapshot(prepared.folder) == before
    assert not list(folder.glob("out/*.h5")) and not (folder / "json").exists()
    assert not (folder / "out" / "manifest.json").exists()
    return dict(zip(BAD_PREPARATION, done, strict=True))


@pytest.mark.parametrize("words", BAD_PREPARATION)
def test_data_preparation(prepared_badly: dict[str, Done], words: str):
    _assert_told(prepared_badly[words], *BAD_PREPARATION[words])


def test_data_preparation_as_a_command():
    _assert_told(launch(program=DATA_PREP), *BAD_PREPARATION[""])
