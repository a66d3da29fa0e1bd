"""Multi30k English to French, from two text files to BLEU: `multi30k-tiny` on two ranks, a schedule for 20 minutes.

    make bench BENCH=multi30k      (25 minutes on two cores that do nothing else)

MULTI30K=folder of train, val and test_2016_flickr, .en.gz and .fr.gz; MINUTES=20 that training may take at most, its
evaluations included; RUN=folder keeps shards and run; SETTINGS='optim.lr=4e-3 ...' over recipe and schedule.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import table
from running import PYTHON, RANKS, run

SOURCE = Path(os.environ.get("MULTI30K", Path(__file__).parents[3] / "shared/data/multi30k-en-fr"))
MINUTES = float(os.environ.get("MINUTES", "20"))
MEAN_OF = 5  # checkpoints, the newest
VOCABULARY = 4000
# The recipe's schedule is for 8,000 updates of twice the size; within 20 minutes this one learns more.
SCHEDULE = (
    *("precision=bf16", "train.steps=7000", "train.global_tokens=2048", "model.dropout=0.2", "optim.clip_norm=1.0"),
    *("scaling.base_tokens=2048", "optim.lr=3e-3", "schedule.name=cosine", "schedule.warmup_steps=1000"),
    *("eval.every=500", "checkpoint.every=250"),
)


def main() -> None:
    if not (SOURCE / "train.en.gz").exists():
        sys.exit(f"needs Multi30k; set MULTI30K=folder (not at {SOURCE})")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("RUN", temporary))
        curve, epochs = train(folder)
        subprocess.run([*PYTHON, "hvdtrain", "average", f"{folder}/run", "--last", str(MEAN_OF)], check=True)
        mean = f"{folder}/run/average-{MEAN_OF}"
        rows = [
            ["last step, greedy", *test(f"{folder}/run", 1)],
            [f"mean of {MEAN_OF}, greedy", *test(mean, 1)],
            [f"mean of {MEAN_OF}, beam 5", *test(mean, 5)],
        ]
    draw(curve)
    head = ["test_2016_flickr, 1,000 sentences", "BLEU", "chrF", "seconds on two ranks"]
    points = [f"{line['wall_s'] / 60:.1f} min {line['bleu']:.1f}" for line in curve]
    note = (
        f"{curve[-1]['step']} updates, {epochs} epochs in {curve[-1]['wall_s'] / 60:.1f} minutes, evaluations counted "
        f"in: {', '.join(SCHEDULE)}.\n\nBLEU of the validation split, greedy, during training: {'; '.join(points)}.\n\n"
        "![BLEU against minutes](multi30k.png)"
    )
    print(table.write("multi30k", "Multi30k, English to French", "make bench BENCH=multi30k", head, rows, note))


def train(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Evaluations of the run, and its whole epochs."""
    tokenizer, shards, texts = f"{folder}/tokenizer.json", f"{folder}/pairs", f"{SOURCE}/"
    if not Path(shards, "manifest.json").exists():
        both = [f"{texts}train.en.gz", f"{texts}train.fr.gz"]
        words = ["--vocab-size", str(VOCABULARY), "--special", "bos", "pad", "--out", tokenizer]
        run([*PYTHON, "data_prep", "tokenizer", "--input", *both, *words])
        sides = ["--source", both[0], "--target", both[1]]
        sides += ["--val-source", f"{texts}val.en.gz", "--val-target", f"{texts}val.fr.gz"]
        run([*PYTHON, "data_prep", "pairs", *sides, "--tokenizer", tokenizer, "--out", shards])
    settings = [f"data.dir={shards}", "stop.margin_s=5", *SCHEDULE, *os.environ.get("SETTINGS", "").split()]
    command = [*RANKS, *PYTHON, "hvdtrain", "train", "multi30k-tiny", *settings, "--run-dir", f"{folder}/run"]
    env = {**os.environ, "HVDTRAIN_END_TIME": str(time.time() + 60 * MINUTES)}
    done = subprocess.run(command, env=env)
    if done.returncode not in (0, 75):  # to its end, or until its time was over
        sys.exit(f"training ended with {done.returncode}")
    lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"], max(line.get("epoch", 0) for line in lines)


def test(run_dir: str, beam: int) -> list[str]:
    """BLEU, chrF and seconds."""
    files = ["--input", f"{SOURCE}/test_2016_flickr.en.gz", "--reference", f"{SOURCE}/test_2016_flickr.fr.gz"]
    scores = ["--scores", "bleu chrf", "--beam", str(beam)]
    _, said = run([*RANKS, *PYTHON, "hvdtrain", "evaluate", run_dir, *files, *scores])
    found = json.loads(said.splitlines()[-1])
    return [*(f"{found[name]:.2f}" for name in ("bleu", "chrf")), f"{found['wall_s']:.1f}"]


def draw(curve: list[dict[str, Any]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([line["wall_s"] / 60 for line in curve], [line["bleu"] for line in curve], marker=".")
    axes.set(xlabel="minutes of training", ylabel="BLEU (validation, greedy)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(table.RESULTS / "multi30k.png", dpi=100)


if __name__ == "__main__":
    main()
