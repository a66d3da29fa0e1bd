"""Shards, manifests and tokenizers that are damaged or forged are read as they are, or refused; nothing crashes."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import REFUSED, RIGHT, judge_shards, judged, mutate_shards, write_sound_corpora
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.data.corpora import DataOptions, open_corpora
from hvdtrain.errors import DataError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_sound_corpora(folder)
    return folder


def test_sound_ones_are_right(sound: Path, tmp_path: Path):
    for kind in sound.iterdir():
        (tmp_path / kind.name).mkdir()
        shutil.copytree(kind, tmp_path / kind.name / "corpus")
        assert judged(judge_shards, kind, tmp_path / kind.name, False) == RIGHT


@settings(max_examples=60)
@given(st.integers(0, 1 << 32))
def test_mutants(sound: Path, tmp_path: Path, seed: int):
    """`make bench BENCH=fuzz` makes a thousand."""
    folder = tmp_path / "mutant"
    folder.mkdir()
    kind, is_sealed = mutate_shards(random.Random(seed), sound, folder)
    assert judged(judge_shards, sound / kind, folder, is_sealed) in (RIGHT, REFUSED)
    shutil.rmtree(folder)


def test_the_judge_sees_other_numbers(sound: Path, tmp_path: Path):
    shutil.copytree(sound / "pairs", tmp_path / "corpus")
    assert judged(judge_shards, sound / "qa", tmp_path, False).startswith("wrong: another manifest")


CHANGES: dict[str, Callable[[dict], object]] = {
    "a special token": lambda fields: fields["special_tokens"].update(eos=3),
    "a label": lambda fields: fields["label_names"].reverse(),
    "the source": lambda fields: fields["source"].update(input="another"),
    "the digest": lambda fields: fields.update(manifest_sha256="0" * 64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_changed(sound: Path, tmp_path: Path, change: str):
    """Nothing but its own digest can tell: a model once learned another end of text without a word."""
    folder = shutil.copytree(sound / "labels", tmp_path / "corpus")
    fields = json.loads((folder / "manifest.json").read_text())
    CHANGES[change](fields)
    (folder / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"manifest\.json is damaged \(it does not match its own digest\)"):
        open_corpora(DataOptions(dir=str(folder)))


def test_manifests_of_before_they_had_a_digest(sound: Path, tmp_path: Path):
    folder = shutil.copytree(sound / "labels", tmp_path / "corpus")
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["manifest_sha256"]
    (folder / "manifest.json").write_text(json.dumps(fields, indent=7))
    found, expected = (open_corpora(DataOptions(dir=str(path))).manifest for path in (folder, sound / "labels"))
    assert found == expected
