"""A run folder is used wherever it lies, and never with other data than its own without a word.

a/data/x   the run's shards; a/run was trained from a, with data.dir=data/x
b/data/x   other shards, of the same tokenizer
"""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch import Done, Prepared, launch_rows, snapshot
from tiny import rewrite, seal

from hvdtrain.__main__ import main
from hvdtrain.data.carried import carry, read_carried
from hvdtrain.data.corpora import DataOptions, open_corpora
from hvdtrain.data.shards import read_manifest

PROMPT = ("--prompt", "def main(", "--max-tokens", 8, "--temperature", 0)


@dataclass(frozen=True)
class Places:
    """Copies for one test. ``val_loss`` and ``text`` are the run's own; a_digest, b_digest: of the two data."""

    a: Path
    b: Path
    val_loss: float
    text: str

    @property
    def run(self) -> Path:
        return self.a / "run"

    @property
    def a_digest(self) -> str:
        return read_manifest(self.a / "data/x").data_digest

    @property
    def b_digest(self) -> str:
        return read_manifest(self.b / "data/x").data_digest


@pytest.fixture(scope="module")
def made(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("made")
    a, b = folder / "a", folder / "b"
    for place in (a, b):
        shutil.copytree(prepared.shards, place / "data/x")
    rewrite(next((b / "data/x").glob("val-*.h5")), lambda shard: shard.update(tokens=shard["tokens"][::-1]))
    seal(b / "data/x")
    settings = ("data.dir=data/x", "train.steps=4", "checkpoint.every=2", "metrics.tensorboard=false")
    train, text = launch_rows(
        [("train", prepared.recipe, *settings, "--run-dir", "run"), ("generate", "run", *PROMPT)], cwd=a
    )
    assert (train.exit_code, text.exit_code) == (0, 0), f"{train}{text}"
    return Places(a, b, json.loads((a / "run/summary.json").read_text())["val_loss"], text.stdout)


@pytest.fixture
def places(made: Places, tmp_path: Path) -> Places:
    """As if the run had been trained in this very folder."""
    for place in (made.a, made.b):
        shutil.copytree(place, tmp_path / place.name)
    carried = tmp_path / "a/run/data/corpora.json"
    assert f'"{made.a}/data/x"' in carried.read_text()
    found = Places(tmp_path / "a", tmp_path / "b", made.val_loss, made.text)
    move(found.run, found.a / "data/x")
    return found


def move(run_dir: Path, to: Path) -> None:
    """The run's shards were at ``to``, and nowhere else."""
    options = DataOptions(dir=str(to))
    carry(run_dir, options, open_corpora(options))


def rows_in(folder: Path, *rows: tuple) -> list[Done]:
    """Each row of words in turn, as if given to a process of its own that was started in ``folder``."""
    found = []
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for words in rows:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([str(word) for word in words])
            found.append(Done("none", code, out.getvalue(), err.getvalue()))
    return found


def scores_of(done: Done) -> dict[str, Any]:
    assert done.exit_code == 0, done
    return json.loads(done.stdout)


def refused(done: Done, *words: str, exit_code: int = 65) -> None:
    assert (done.exit_code, done.stdout, len(done.messages)) == (exit_code, "", 1), done
    assert all(word in done.messages[0] for word in words), done


def test_from_another_folder_with_other_data_of_that_name(places: Places):
    """Its scores were those of b/data/x, and nothing told so."""
    evaluate, other, text = rows_in(
        places.b,
        ("evaluate", "../a/run"),
        ("evaluate", "../a/run", "--data", "data/x"),
        ("generate", "../a/run", *PROMPT),
    )
    scores = scores_of(evaluate)
    assert scores["val_loss"] == places.val_loss
    assert scores["data"] == {"folders": [f"{places.a}/data/x"], "data_digest": places.a_digest, "own": True}
    scores = scores_of(other)
    assert scores["val_loss"] != places.val_loss
    assert scores["data"] == {"folders": [f"{places.b}/data/x"], "data_digest": places.b_digest, "own": False}
    assert text.stdout == places.text


def test_a_folder_that_was_copied_elsewhere_without_the_shards(places: Places, tmp_path: Path):
    """As on another machine: text needs no shards, scores need them, wherever they are now."""
    places.run.rename(tmp_path / "copy")
    (places.a / "data").rename(tmp_path / "moved")
    text, alone, given, average, of_average = rows_in(
        tmp_path,
        ("generate", "copy", *PROMPT),
        ("evaluate", "copy"),
        ("evaluate", "copy", "--data", "moved/x"),
        ("average", "copy", "--last", 2),
        ("generate", "copy/average-2", *PROMPT),
    )
    assert text.stdout == places.text
    refused(alone, f"no shards in {places.a}/data/x, where those of copy were when it was trained; give --data DIR")
    assert (scores_of(given)["val_loss"], scores_of(given)["data"]["own"]) == (places.val_loss, True)
    assert (average.exit_code, of_average.exit_code) == (0, 0), f"{average}{of_average}"
    assert snapshot(tmp_path / "copy/average-2/data") == snapshot(tmp_path / "copy/data")


def test_data_that_were_prepared_again_in_their_place(prepared: Prepared, places: Places):
    known = places.a_digest
    shutil.rmtree(places.a / "data/x")
    shutil.copytree(places.b / "data/x", places.a / "data/x")
    own, given, text, resume = rows_in(
        places.a,
        ("evaluate", "run"),
        ("evaluate", "run", "--data", "data/x"),
        ("generate", "run", *PROMPT),
        ("train", prepared.recipe, "data.dir=data/x", "train.steps=6", "--run-dir", "run"),
    )
    refused(own, f"{places.a}/data/x holds other data than run was trained on", places.b_digest, known, "--data DIR")
    assert scores_of(given)["data"]["own"] is False
    assert text.stdout == places.text
    refused(resume, f"data_digest was '{known}' and is now '{places.b_digest}'", exit_code=2)


def test_a_run_that_was_made_before_folders_carried_anything(prepared: Prepared, places: Places):
    """It is found as it was then, but compared by digest; and the next start gives it what it lacks."""
    shutil.rmtree(places.run / "data")
    rows = [("evaluate", "../a/run"), ("evaluate", "../a/run", "--data", "../a/data/x")]
    elsewhere, given = rows_in(places.b, *rows)
    refused(elsewhere, "data/x holds other data than ../a/run was trained on", places.b_digest, places.a_digest)
    assert (scores_of(given)["val_loss"], scores_of(given)["data"]["own"]) == (places.val_loss, True)
    shutil.rmtree(places.b / "data")
    nothing, text = rows_in(places.b, rows[0], ("generate", "../a/run", *PROMPT))
    for done in (nothing, text):
        refused(done, f"no shards in {places.b}/data/x", "its config.yaml says data/x, seen from where it was trained")
    own, text, resume = rows_in(
        places.a,
        ("evaluate", "run"),
        ("generate", "run", *PROMPT),
        ("train", prepared.recipe, "data.dir=data/x", "train.steps=5", "--run-dir", "run"),
    )
    assert (scores_of(own)["val_loss"], scores_of(own)["data"]["own"], text.stdout) == (
        (places.val_loss, True, places.text)
    )
    assert resume.exit_code == 0, resume
    assert read_carried(places.run).corpora.entries[0][0] == places.a / "data/x"


def test_a_mixture_is_known_again_in_any_order(prepared: Prepared, places: Places, tmp_path: Path):
    mixture = "data.mixture={data/x: 0.7, ../b/data/x: 0.3}"
    (train,) = rows_in(places.a, ("train", prepared.recipe, mixture, "train.steps=2", "--run-dir", "../mixed"))
    assert train.exit_code == 0, train
    val_loss = json.loads((tmp_path / "mixed/summary.json").read_text())["val_loss"]
    by_place, by_data, one = rows_in(
        tmp_path,
        ("evaluate", "mixed"),
        ("evaluate", "mixed", "--data", "b/data/x", "--data", "a/data/x"),
        ("evaluate", "mixed", "--data", "b/data/x"),
    )
    for done in (by_place, by_data):
        assert (scores_of(done)["val_loss"], scores_of(done)["data"]["own"]) == (val_loss, True)
    assert scores_of(by_data)["data"]["folders"] == [f"{tmp_path}/a/data/x", f"{tmp_path}/b/data/x"]
    assert scores_of(one)["data"] == {"folders": [f"{tmp_path}/b/data/x"], "data_digest": places.b_digest, "own": False}
    known = read_manifest(tmp_path / "b/data/x").data_digest
    rewrite(next((places.b / "data/x").glob("val-*.h5")), lambda shard: shard.update(tokens=shard["tokens"][::-1]))
    seal(places.b / "data/x")
    (changed,) = rows_in(tmp_path, ("evaluate", "mixed"))
    refused(changed, f"{places.a}/../b/data/x holds other data", f"data_digest {places.b_digest}, not {known})")


def test_staged_shards_are_recorded_where_they_came_from(prepared: Prepared, places: Places, tmp_path: Path):
    words = ("train", prepared.recipe, "data.dir=data/x", f"data.stage={tmp_path}/stage", "train.steps=2")
    (train,) = rows_in(places.a, (*words, "--run-dir", "staged"))
    assert train.exit_code == 0, train
    shutil.rmtree(tmp_path / "stage")
    (own,) = rows_in(tmp_path, ("evaluate", places.a / "staged"))
    assert scores_of(own)["data"]["folders"] == [f"{places.a}/data/x"]


def test_what_a_folder_carries_is_damaged_or_another_runs(places: Places):
    carried = places.run / "data/corpora.json"
    whole = carried.read_bytes()
    carried.write_bytes(whole.replace(b'"weights"', b'"waits"'))
    damaged, text = rows_in(places.a, ("evaluate", places.run), ("generate", places.run, *PROMPT))
    for done in (damaged, text):
        refused(done, f"{places.run}/data is damaged", "copy it from another copy of the run, or remove it")
    carried.write_bytes(whole)
    tokenizer = places.run / "data/tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b'"def"', b'"dfe"').replace(b"{", b"{ ", 1))
    (done,) = rows_in(places.a, ("generate", places.run, *PROMPT))
    refused(done, f"{places.run}/data is damaged", "is not the tokenizer that made the shards")
    move(places.run, places.b / "data/x")
    (done,) = rows_in(places.a, ("generate", places.run, *PROMPT))
    refused(done, f"{places.run}/data is of other data", places.b_digest, places.a_digest, "put together from two runs")
