"""Recipes that are damaged or hostile load to what they say, or are refused by one short message; none runs code."""

import random
import time
from pathlib import Path

import pytest
from fuzzing import REFUSED, RIGHT, judge_config, judged, mutate_config
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.config import load_config
from hvdtrain.errors import ConfigError


@settings(max_examples=150)
@given(st.integers(0, 1 << 32))
def test_mutants(tmp_path: Path, seed: int):
    """`make bench BENCH=fuzz` makes a thousand."""
    overrides = mutate_config(random.Random(seed), tmp_path)
    assert judged(judge_config, tmp_path, overrides) in (RIGHT, REFUSED)


def test_the_judge_sees_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "recipe.yaml").write_text("train: {steps: 300}\noptim: {lr: 1e-4}\n")
    assert judged(judge_config, tmp_path, ["seed=5"]) == RIGHT
    monkeypatch.setattr("fuzzing.load_config", lambda recipe, overrides: load_config(recipe))
    assert judged(judge_config, tmp_path, ["seed=5"]) == "wrong: seed is 1 instead of 5"
    monkeypatch.setattr("fuzzing.load_config", lambda *_: {}["a"])
    assert "KeyError: 'a'" in judged(judge_config, tmp_path, [])
    monkeypatch.setattr("fuzzing.load_config", lambda *_: time.sleep(60))
    assert judged(judge_config, tmp_path, [], limit_s=0.1) == "wrong: no answer within 0.1 s"


def bomb(line: str, depth: int = 60) -> str:
    """Each level stands for two of the one before: 2**60 values in sixty lines."""
    return "\n".join(["a0: &a0 {x: 1}", *(line.format(i=i, j=i - 1) for i in range(1, depth))])


# Each of them once ended in a traceback, or did not end.
HOSTILE = {
    "laughs": (bomb("a{i}: &a{i} [*a{j}, *a{j}]"), "holds itself, or more than 65536 values"),
    "merged laughs": (bomb("a{i}: &a{i} {{<<: [*a{j}, *a{j}]}}"), "holds itself, or more than 65536 values"),
    "many keys": ("\n".join(f"k{i}: 1" for i in range(8000)), "'k0'; valid here: seed, precision"),
    "more problems": ("\n".join(f"k{i}: 1" for i in range(30)), "; and 10 more"),
    "itself": ("&a [*a]", "holds itself"),
    "inside itself": ("seed: &a {b: *a}", "holds itself"),
    "merged with itself": ("&a {<<: *a}", "holds itself"),
    "a number without end": ("seed: 0x" + "9" * 6000, "seed=(int): input should be"),
    "a long text": (f"seed: {'x' * 5000}", "xxx...: input should be"),
    "no bool": ("seed: !!bool x", "is not valid YAML: 'x'"),
    "no date": ("seed: !!timestamp x", "is not valid YAML"),
    "a zero byte": ('data: {dir: "a\\0b"}', "line 1: 'a\\x00b' has characters that are no text"),
    "half a character": ('\ndata: {dir: "\\ud800"}', "line 2: '\\ud800' has characters that are no text"),
    "code": ("seed: !!python/object/apply:os.system ['touch PWNED']", "could not determine a constructor for the tag"),
    "code of a class": ("!!python/object/new:os.system ['touch PWNED']", "could not determine a constructor"),
    "code of a module": ("seed: !!python/module:os", "could not determine a constructor"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    text, message = HOSTILE[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("./my.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert not (tmp_path / "PWNED").exists()


def test_hostile_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for text, message in HOSTILE.values():
        if "\n" not in text and text.startswith(("seed: ", "data: ")):
            key, _, value = text.partition(": ")
            with pytest.raises(ConfigError) as caught:
                load_config("demo", [f"{key}={value}"])
            assert message in str(caught.value)
    assert not (tmp_path / "PWNED").exists()


def test_anchors_and_merges_are_welcome(tmp_path: Path):
    text = "model: &m {layers: &n 4, heads: *n}\noptim: {lr: 1e-4}\nema: {<<: {decay: 0.5}}\n"
    (tmp_path / "my.yaml").write_text(text)
    config = load_config(str(tmp_path / "my.yaml"))
    assert (config.model.layers, config.model.heads, config.ema.decay) == (4, 4, 0.5)
