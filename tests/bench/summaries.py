"""SciTLDR: one sentence about an abstract, from nothing, beside the abstract's own first sentence. From files to ROUGE.

    make bench BENCH=summaries     (SCITLDR=folder of train, dev and test.pairs.jsonl.gz; MODEL=folder to begin with)

RUN=folder keeps shards and run; SETTINGS='train.steps=4000 ...' over the recipe `summarise`.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import table
from running import PYTHON, RANKS, run

from hvdtrain.tasks.text_scores import TextScores

SOURCE = Path(os.environ.get("SCITLDR", Path(__file__).parents[3] / "shared/data/scitldr"))
MODEL = os.environ.get("MODEL", "")
NAMES = ("rouge1", "rouge2", "rougeL")


def main() -> None:
    if not (SOURCE / "train.pairs.jsonl.gz").exists():
        sys.exit(f"needs SciTLDR; set SCITLDR=folder (not at {SOURCE})")
    test = SOURCE / "test.pairs.jsonl.gz"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("RUN", temporary))
        summary = train(folder)
        files = ["--input", str(test), "--reference", str(test), "--reference-field", "references"]
        how = ["--scores", "rouge", "--too-long", "truncate", "--beam", "4", "--no-repeat-ngram", "3"]
        _, said = run([*RANKS, *PYTHON, "hvdtrain", "evaluate", f"{folder}/run", *files, *how, "--max-tokens", "60"])
    found = json.loads(said.splitlines()[-1])
    name = f"hvdtrain, {summary['step']} updates, {summary['wall_s'] / 60:.1f} minutes"
    rows = [[name, *scores(found)], ["the abstract's first sentence", *scores(lead(test))]]
    note = "Several references each: those of the one with the best ROUGE-1 count. Beam 4, no trigram twice."
    command = "make bench BENCH=summaries"
    head = ["618 test abstracts", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    print(table.write("summaries", "SciTLDR: a sentence about an abstract", command, head, rows, note))


def train(folder: Path) -> dict[str, float]:
    tokenizer = f"{MODEL}/tokenizer.json" if MODEL else f"{folder}/tokenizer.json"
    texts, shards = f"{SOURCE}/train.pairs.jsonl.gz", f"{folder}/pairs"
    if not Path(shards, "manifest.json").exists():
        if not MODEL:
            words = ["--field", "source", "--vocab-size", "8000", "--special", "bos", "pad", "--out", tokenizer]
            run([*PYTHON, "data_prep", "tokenizer", "--input", texts, *words])
        both = ["--input", texts, "--val-input", f"{SOURCE}/dev.pairs.jsonl.gz"]
        run([*PYTHON, "data_prep", "pairs", *both, "--tokenizer", tokenizer, "--out", shards])
    settings = [f"data.dir={shards}", *([f"model.from={MODEL}"] if MODEL else [])]
    settings += os.environ.get("SETTINGS", "").split()
    command = [*RANKS, *PYTHON, "hvdtrain", "train", "summarise", *settings, "--run-dir", f"{folder}/run"]
    subprocess.run(command, check=True)
    return json.loads(Path(folder, "run", "summary.json").read_text())


def lead(test: Path) -> dict[str, float]:
    """ROUGE of each abstract's text up to its first full stop."""
    lines = [json.loads(line) for line in gzip.decompress(test.read_bytes()).decode().splitlines()]
    first = [line["source"].partition(". ")[0] for line in lines]
    compare = TextScores(["rouge"])
    return compare.scores(compare.sums(first, [line["references"] for line in lines]))


def scores(found: dict[str, float]) -> list[str]:
    return [f"{found[name]:.2f}" for name in NAMES]


if __name__ == "__main__":
    main()
