"""Whole-process time of `shakespeare-char` against plain PyTorch in nanoGPT's manner, in turn, on the same cores.

make bench BENCH=shakespeare        (SHAKESPEARE=path of tinyshakespeare.txt, ROUNDS=2)
"""

import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

import table
from running import PYTHON, RANKS, run

STEPS = 2000
SOURCE = Path(os.environ.get("SHAKESPEARE", Path(__file__).parents[3] / "shared/data/tinyshakespeare.txt"))


def main() -> None:
    if not SOURCE.exists():
        sys.exit(f"needs tinyshakespeare.txt; set SHAKESPEARE=path (not at {SOURCE})")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, data = f"{folder}/tokenizer.json", f"{folder}/data"
        source = ["--input", str(SOURCE)]
        run([*PYTHON, "data_prep", "tokenizer", *source, "--kind", "char", "--out", tokenizer])
        split = ["--val-split", "tail", "--val-fraction", "0.1"]
        run([*PYTHON, "data_prep", "text", *source, "--tokenizer", tokenizer, *split, "--out", data])
        train = [*PYTHON, "hvdtrain", "train", "shakespeare-char", f"data.dir={data}", f"train.steps={STEPS}"]
        plain = [sys.executable, str(Path(__file__).parent / "ways/plain_gpt.py"), str(SOURCE), str(STEPS)]
        seconds: dict[str, list[float]] = {}
        losses: dict[str, float] = {}
        for number in range(int(os.environ.get("ROUNDS", "2"))):
            for name, launcher in {"1 rank x 2 threads": [], "2 ranks x 1 thread": RANKS}.items():
                wall_s, output = run(plain, threads=2)
                seconds.setdefault("plain PyTorch, 2 threads", []).append(wall_s)
                losses["plain PyTorch, 2 threads"] = float(re.findall(r"val_loss (\S+)", output)[-1])
                run_dir = f"{folder}/{number}-{len(launcher)}"
                wall_s, _ = run([*launcher, *train, "--run-dir", run_dir])
                seconds.setdefault(f"hvdtrain, {name}", []).append(wall_s)
                losses[f"hvdtrain, {name}"] = json.loads(Path(run_dir, "summary.json").read_text())["val_loss"]
    base = statistics.median(seconds["plain PyTorch, 2 threads"])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.1f}-{max(values):.1f}"
        rows.append([name, f"{median:.1f}", spread, f"{base / median:.2f}", f"{losses[name]:.4f}"])
    head = ["way", "wall s (median)", "min-max", "speed ratio", "val loss (whole split)"]
    note = f"{STEPS} steps of 12 x 64 characters, imports, evaluation and (hvdtrain) checkpoints included."
    title = "shakespeare-char against plain PyTorch in nanoGPT's manner"
    print(table.write("shakespeare", title, "make bench BENCH=shakespeare", head, rows, note))


if __name__ == "__main__":
    main()
