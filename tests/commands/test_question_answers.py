"""Questions from SQuAD's JSON to answers, in commands as a user types them: data_prep, train, evaluate, generate."""

import gzip
import json
import math
import random
import re
import string
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from by_heart import on

from data_prep.__main__ import main
from hvdtrain.comm.world import World
from hvdtrain.commands.evaluate import evaluate
from hvdtrain.commands.generate import Lines, generate, generate_file
from hvdtrain.commands.predictions import Split, predict_split
from hvdtrain.data.shards import read_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, EXIT_USAGE, HvdtrainError
from hvdtrain.tasks.squad_scores import normalised
from hvdtrain.train import train

WORDS = "the river runs past old mills and ships wait here until spring when ice breaks 3 5 8".split()  # noqa: SIM905
XQUAD = Path(__file__).parents[3] / "shared/data/xquad/xquad.en.json.gz"
COLOURS = ["red", "blue", "grün", "漢"]


def questions(seed: int, count: int) -> str:
    """Paragraphs of words with often a colour among them, and a question for it."""
    draw, paragraphs = random.Random(seed), []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(4, 20))
        answers = []
        if draw.random() < 0.7:
            at = draw.randint(0, len(words))
            words.insert(at, draw.choice(COLOURS))
            answers = [{"text": words[at], "answer_start": len(" ".join([*words[:at], ""]))}]
        asked = {"id": f"{number}", "question": "what colour ?", "answers": answers}
        paragraphs.append({"context": " ".join(words), "qas": [asked]})
    return json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three splits and a run that has learned from them, in about ten seconds."""
    folder = tmp_path_factory.mktemp("questions")
    for seed, (name, count) in enumerate({"train": 300, "val": 40, "test": 60}.items()):
        (folder / f"{name}.json").write_text(questions(seed, count), encoding="utf-8")
    (folder / "text.txt").write_text(" ".join([*WORDS, *COLOURS, "what colour ?\n"]), encoding="utf-8")
    words = ["tokenizer", "--input", folder / "text.txt", "--kind", "wordpiece", "--vocab-size", 200]
    assert main([*map(str, words), "--out", str(folder / "t.json")]) == EXIT_OK
    words = ["labels", "--input", folder / "train.json", "--max-tokens", 20, "--stride", 8, "--question-tokens", 4]
    words += ["--val-input", folder / "val.json", "--test-input", folder / "test.json"]
    words += ["--tokenizer", folder / "t.json"]
    assert main([*map(str, words), "--out", str(folder / "shards")]) == EXIT_OK
    recipe = {
        "data": {"dir": str(folder / "shards")},
        "task": {"name": "span_qa"},
        "model": {"layers": 2, "heads": 2, "width": 32, "context": 20, "ff_ratio": 2.0, "token_types": 2},
        "train": {"steps": 120, "global_tokens": 640},
        "eval": {"every": 80, "rows": 16},
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
        "schedule": {"warmup_steps": 10},
        "metrics": {"every": 80, "tensorboard": False},
        "checkpoint": {"every": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(str(folder / "recipe.yaml"), [], folder / "run", "auto", World())
    return folder


def of_split(folder: Path, split: str) -> list[tuple[str, str, list[str]]]:
    """(question, paragraph, answers)"""
    (article,) = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))["data"]
    return [
        (asked["question"], one["context"], [answer["text"] for answer in asked["answers"]])
        for one in article["paragraphs"]
        for asked in one["qas"]
    ]


def scores_of(folder: Path, split: str, world: World | None = None) -> dict[str, Any]:
    found = evaluate(folder / "run", [], split, world or World())
    return {key: value for key, value in found.items() if key not in ("wall_s", "val_loss")}


def answered(folder: Path, lines: Lines, world: World | None = None) -> list[str]:
    generate_file(folder / "run", lines, {}, world or World())
    return lines.output.read_text(encoding="utf-8")[:-1].split("\n")


def test_it_learns_and_answers_a_file_as_it_is_scored(folder: Path, tmp_path: Path):
    scores, split = scores_of(folder, "test"), of_split(folder, "test")
    assert scores["exact_match"] > 90
    assert scores["best_exact_match"] >= scores["exact_match"]
    assert scores["questions"] == 60
    assert scores["no_answer_exact_match"] > 50
    (tmp_path / "in.txt").write_text("".join(f"{q}\t{p}\n" for q, p, _ in split), encoding="utf-8")
    found = answered(folder, Lines(tmp_path / "in.txt", tmp_path / "out.txt"))
    right = [
        normalised(text, "en") in [normalised(one, "en") for one in answers or [""]]
        for text, (*_, answers) in zip(found, split, strict=True)
    ]
    assert 100 * sum(right) / len(right) == pytest.approx(scores["exact_match"])
    assert all(text in paragraph for text, (_, paragraph, _) in zip(found, split, strict=True))
    assert {*found} & {"grün", "漢"}  # characters come back as they were


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int):
    module = "hvdtrain.commands.evaluate"
    several = on(monkeypatch, module, ranks, lambda world: scores_of(folder, "test", world))
    assert several == [scores_of(folder, "test")] * ranks
    (tmp_path / "in.txt").write_text("".join(f"{q}\t{p}\n" for q, p, _ in of_split(folder, "val")), encoding="utf-8")
    one, other = Lines(tmp_path / "in.txt", tmp_path / "1"), Lines(tmp_path / "in.txt", tmp_path / "2")
    answered(folder, one)
    on(monkeypatch, "hvdtrain.commands.generate", ranks, lambda world: answered(folder, other, world))
    assert other.output.read_bytes() == one.output.read_bytes()


def test_the_best_answers_and_none_as_json(folder: Path, tmp_path: Path):
    plain = " ".join(WORDS * 6)
    lines = [f"what colour ?\t{plain} red {plain}", f"what colour ?\t{plain}", "what colour ?\t"]
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    found = answered(folder, Lines(tmp_path / "in.txt", tmp_path / "out", json=True))
    red, none, empty = (json.loads(line)["answers"] for line in found)
    assert red[0]["text"] == "red"  # in one of many windows
    assert none[0]["text"] == ""
    assert empty == []
    for answers in (red, none):
        texts = [one["text"] for one in answers]
        assert (len(texts), len(set(texts))) == (6, 6)  # five, and none
        scores = [one["score"] for one in answers if one["text"]]
        assert scores == sorted(scores, reverse=True)


def test_what_cannot_be_answered(folder: Path):
    with pytest.raises(HvdtrainError, match="question and its paragraph with a tab between them; 'red' has none") as e:
        generate(folder / "run", "red", {}, World())
    assert e.value.exit_code == EXIT_BAD_DATA
    with pytest.raises(HvdtrainError, match=r"--beam: task\.name=span_qa searches for no text") as e:
        generate(folder / "run", "what colour ?\tred", {"beam": 4}, World())
    assert e.value.exit_code == EXIT_USAGE
    assert read_manifest(folder / "shards").source["questions_without_answer"] > 40


def test_predictions_are_what_the_official_script_scores_alike(folder: Path, tmp_path: Path):
    """With probabilities it finds the best thresholds, too."""
    scores = scores_of(folder, "test")
    decided, texts, none = (tmp_path / name for name in ("decided.json", "texts.json", "none.json"))
    predict_split(folder / "run", Split("test", decided), World())
    predict_split(folder / "run", Split("test", texts, none), World())
    asked = json.loads((folder / "test.json").read_text(encoding="utf-8"))["data"][0]["paragraphs"]
    predictions = json.loads(decided.read_text(encoding="utf-8"))
    assert list(predictions) == [one["qas"][0]["id"] for one in asked]
    assert "" in predictions.values()
    found = official(asked, predictions, None)
    assert found["exact"] == pytest.approx(scores["exact_match"])
    assert found["f1"] == pytest.approx(scores["f1"])
    texts, none = (json.loads(path.read_text(encoding="utf-8")) for path in (texts, none))
    assert official(asked, texts, none) == pytest.approx(found)
    for name in ("exact_match", "f1"):  # any threshold of theirs gives what one of ours gives
        threshold = 1 / (1 + math.exp(-scores[f"best_{name}_threshold"]))
        best = official(asked, texts, none, threshold + 1e-12)
        assert best[name.removesuffix("_match")] == pytest.approx(scores[f"best_{name}"])


def official(asked: list[dict], said: dict[str, str], none: dict[str, float] | None, threshold: float = 0.5) -> dict:
    """Exact match and F1 as SQuAD 2.0's evaluate script computes them from its files."""
    exact, f1 = [], []
    for one in asked:
        (question,) = one["qas"]
        name, truths = question["id"], [answer["text"] for answer in question["answers"]]
        if none is not None and none[name] > threshold:
            exact.append(not truths)
            f1.append(not truths)
            continue
        truths = [words_of(text) for text in truths] or [[]]
        words = words_of(said[name])
        exact.append(words in truths)
        f1.append(max(f1_of(words, truth) for truth in truths))
    return {"exact": 100 * sum(exact) / len(asked), "f1": 100 * sum(f1) / len(asked)}


def words_of(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def f1_of(said: list[str], truth: list[str]) -> float:
    if not said or not truth:
        return float(said == truth)
    shared = sum((Counter(said) & Counter(truth)).values())
    return 2 * shared / (len(said) + len(truth))


def test_predictions_are_the_same_on_any_ranks_and_bad_ones_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one, other, probabilities = (Split("test", tmp_path / name, tmp_path / f"{name}.none") for name in "123")
    predict_split(folder / "run", one, World())
    on(monkeypatch, "hvdtrain.commands.predictions", 3, lambda world: predict_split(folder / "run", other, world))
    assert other.output.read_bytes() == one.output.read_bytes()
    assert other.na_probs.read_bytes() == one.na_probs.read_bytes()
    for split, message in (
        (one, "is there already; remove it"),
        (Split("test", tmp_path / "4", tmp_path / "4"), "is --output too"),
        (replace(probabilities, na_probs=other.na_probs), "is there already; remove it"),
    ):
        with pytest.raises(HvdtrainError, match=message):
            predict_split(folder / "run", split, World())


def test_an_id_that_stands_twice_is_refused(folder: Path, tmp_path: Path):
    """A file of predictions has room for one of them."""
    tree = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    (tmp_path / "twice.json").write_text(json.dumps({**tree, "data": tree["data"] * 2}), encoding="utf-8")
    words = ["labels", "--input", folder / "train.json", "--max-tokens", 20, "--stride", 8, "--question-tokens", 4]
    words += ["--val-input", folder / "val.json", "--test-input", tmp_path / "twice.json"]
    assert main([*map(str, words), "--tokenizer", str(folder / "t.json"), "--out", str(tmp_path / "s")]) == EXIT_OK
    with pytest.raises(HvdtrainError, match=r"several questions of the id '0' \(and 59 more\)"):
        predict_split(folder / "run", Split("test", tmp_path / "out", data=[tmp_path / "s"]), World())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not XQUAD.exists(), reason="no XQuAD beside the repository")
def test_real_questions_are_all_predicted(folder: Path, tmp_path: Path):
    """By their own ids, told or not."""
    tree = json.loads(gzip.decompress(XQUAD.read_bytes()))
    tree["data"] = tree["data"][:3]
    (tmp_path / "real.json").write_text(json.dumps(tree), encoding="utf-8")
    words = ["labels", "--input", folder / "train.json", "--max-tokens", 20, "--stride", 8, "--question-tokens", 4]
    words += ["--val-input", folder / "val.json", "--test-input", tmp_path / "real.json"]
    words += ["--skip-bad", "--tokenizer", folder / "t.json", "--out", tmp_path / "s"]
    assert main([*map(str, words)]) == EXIT_OK
    predict_split(folder / "run", Split("test", tmp_path / "out", tmp_path / "none", [tmp_path / "s"]), World())
    found = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    paragraphs = [paragraph for article in tree["data"] for paragraph in article["paragraphs"]]
    contexts = {asked["id"]: paragraph["context"] for paragraph in paragraphs for asked in paragraph["qas"]}
    assert found.keys() == contexts.keys()
    assert all(text in contexts[name] for name, text in found.items())
