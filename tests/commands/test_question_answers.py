"""Questions from SQuAD's JSON to answers, in commands as a user types them: data_prep, train, evaluate, generate."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from by_heart import on

from data_prep.__main__ import main
from hvdtrain.comm.world import World
from hvdtrain.commands.evaluate import evaluate
from hvdtrain.commands.generate import Lines, generate, generate_file
from hvdtrain.data.shards import read_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, EXIT_USAGE, HvdtrainError
from hvdtrain.tasks.squad_scores import normalised
from hvdtrain.train import train

WORDS = "the river runs past old mills and ships wait here until spring when ice breaks 3 5 8".split()  # noqa: SIM905
COLOURS = ["red", "blue", "grün", "漢"]
pytestmark = pytest.mark.usefixtures("torch_switches")


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
