"""Copy, reverse and sort: an encoder-decoder on two ranks, whole answers counted. By the commands, from files on.

make bench BENCH=puzzles        (STEPS=1500)
"""

import json
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import table
from running import PYTHON, RANKS, run

STEPS, LETTERS, LONGEST = int(os.environ.get("STEPS", "1500")), "abcdefgh", 8
PUZZLES = {"copy": lambda text: text, "reverse": lambda text: text[::-1], "sort": lambda text: "".join(sorted(text))}
SPLITS = {"train": 20_000, "val": 500, "test": 1_000}
RECIPE = "summarise"
MODEL = ("model.layers=2", "model.width=64", "model.heads=4", "model.context=16", "model.dropout=0.0")
TRAIN = (
    "train.global_tokens=2048",
    "scaling.base_tokens=2048",
    "optim.lr=3e-3",
    "schedule.name=cosine",
    "schedule.warmup_steps=100",
    "eval.every=0",
    "checkpoint.every=0",
)


def write(folder: Path) -> list[tuple[str, str]]:
    """Files of questions and answers, no question in two splits; those of the test: (puzzle, answer)."""
    chance, seen, tests = random.Random(1), set(), []
    for split, count in SPLITS.items():
        rows = []
        while len(rows) < count:
            puzzle = chance.choice(list(PUZZLES))
            text = "".join(chance.choices(LETTERS, k=chance.randint(4, LONGEST)))
            if (puzzle, text) not in seen:
                seen.add((puzzle, text))
                rows.append((puzzle, puzzle[0].upper() + text, PUZZLES[puzzle](text)))
        (folder / f"{split}.in").write_text("".join(f"{question}\n" for _, question, _ in rows))
        (folder / f"{split}.out").write_text("".join(f"{answer}\n" for *_, answer in rows))
        tests = [(puzzle, answer) for puzzle, _, answer in rows]
    return tests


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = write(folder)

        def at(*names: str) -> list[str]:
            return [str(folder / name) for name in names]

        words = ["--kind", "char", "--special", "bos", "pad", "--out", *at("t.json")]
        run([*PYTHON, "data_prep", "tokenizer", "--input", *at("train.in", "train.out"), *words])
        sides = {"--source": "train.in", "--target": "train.out", "--val-source": "val.in", "--val-target": "val.out"}
        files = [word for flag, file in sides.items() for word in (flag, *at(file))]
        run([*PYTHON, "data_prep", "pairs", *files, "--tokenizer", *at("t.json"), "--out", *at("data")])
        hvdtrain = [*RANKS, *PYTHON, "hvdtrain"]
        recipe = [RECIPE, f"data.dir={folder}/data", f"train.steps={STEPS}", *MODEL, *TRAIN]
        train_s, _ = run([*hvdtrain, "train", *recipe, "--run-dir", *at("run")])
        asked = ["--input", *at("test.in"), "--output", *at("answers"), "--temperature", "0"]
        answer_s, _ = run([*hvdtrain, "generate", *at("run"), *asked])
        found = (folder / "answers").read_text().splitlines()
        loss = json.loads((folder / "run" / "summary.json").read_text())["val_loss"]
    asked, right = Counter(puzzle for puzzle, _ in tests), Counter()
    for (puzzle, answer), line in zip(tests, found, strict=True):
        right[puzzle] += answer == line.strip()
    rows = [[puzzle, str(asked[puzzle]), f"{right[puzzle] / asked[puzzle]:.2%}"] for puzzle in PUZZLES]
    rows.append(["all", str(len(tests)), f"{right.total() / len(tests):.2%}"])
    note = (
        f"{STEPS} steps of 2,048 tokens on two ranks in {train_s:.0f} s, imports included; validation loss {loss:.4f}; "
        f"{len(tests)} answers, greedy, on two ranks in {answer_s:.0f} s."
    )
    print(
        table.write(
            "puzzles", "Copy, reverse, sort", "make bench BENCH=puzzles", ["puzzle", "tests", "exact"], rows, note
        )
    )


if __name__ == "__main__":
    main()
