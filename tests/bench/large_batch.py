"""How far may a batch grow before the loss suffers? `shakespeare-char` at equal tokens, like Goyal's Table 1.

    make bench BENCH=large_batch      (an hour on two cores; RUNS=folder keeps the runs and goes on with them; SEEDS=3)

The recipe's batch of 12 sequences against 48, 96 and 192: the base rate as it is, linear and square root scaling, LAMB;
with gradual, constant and no warm-up (96: gradual alone). All see 1.5 million characters in the same order.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import table
from running import run
from shakespeare import SOURCE

BASE = 12
BATCHES = (48, 96, 192)
CONTEXT = 64  # characters of a sequence
SEEDS = range(1, int(os.environ.get("SEEDS", "3")) + 1)
RULES = {
    "unscaled": ["scaling.rule=none"],
    "linear": ["scaling.rule=linear"],
    "sqrt": ["scaling.rule=sqrt"],
    "LAMB, sqrt": ["scaling.rule=sqrt", "optim.name=lamb", "optim.lr=1e-2", "schedule.min_lr=1e-3"],
}
WARMUPS = {"gradual": [], "constant": ["schedule.warmup=constant"], "none": ["schedule.warmup_steps=0"]}
COMMON = [f"scaling.base_batch={BASE}", "eval.every=0", "eval.rows=192", "checkpoint.every=0", "metrics.every=25"]


def prepare(folder: Path) -> Path:
    """The text by characters, its last tenth for validation."""
    if not (folder / "data" / "manifest.json").exists():
        module = [sys.executable, "-m", "data_prep"]
        source = ["--input", str(SOURCE)]
        run([*module, "tokenizer", *source, "--kind", "char", "--out", f"{folder}/tokenizer.json"])
        split = ["--val-split", "tail", "--val-fraction", "0.1", "--tokenizer", f"{folder}/tokenizer.json"]
        run([*module, "text", *source, *split, "--out", f"{folder}/data"])
    return folder / "data"


def train(folder: Path, name: str, batch: int, settings: list[str]) -> dict[int, dict[str, Any]]:
    """Summaries by seed; a run that diverged has none. Runs that are there already are not made again."""
    found = {}
    for seed in SEEDS:
        run_dir = folder / name / str(seed)
        words = [f"data.dir={folder}/data", f"seed={seed}", f"train.global_batch={batch}", *COMMON, *settings]
        words += [f"train.microbatch={min(48, batch // 2)}"]  # two parts at least: the noise can be measured
        if not (run_dir / "summary.json").exists():
            command = [sys.executable, "-m", "hvdtrain", "train", "shakespeare-char", *words, "--run-dir", str(run_dir)]
            done = subprocess.run(command, text=True, capture_output=True, timeout=3600)
            if done.returncode not in (0, 76):
                sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        if (run_dir / "summary.json").exists():
            found[seed] = json.loads((run_dir / "summary.json").read_text())
    return found


def main() -> None:
    if not SOURCE.exists():
        sys.exit(f"needs tinyshakespeare.txt; set SHAKESPEARE=path (not at {SOURCE})")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("RUNS", temporary))
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        base = train(folder, "base", BASE, [])
        measured = {("recipe", "gradual", BASE): base}
        for warmup, how in WARMUPS.items():
            for batch in BATCHES:
                for rule, settings in RULES.items():
                    if rule == "unscaled" and warmup == "constant":
                        continue  # at the base rate: that is its rate, and the same as none
                    if warmup != "gradual" and batch == 96:
                        continue  # it only shows where the loss begins to suffer
                    name = f"{rule}-{warmup}-{batch}".replace(", ", "-")
                    measured[rule, warmup, batch] = train(folder, name, batch, [*settings, *how])
                    print(name, sorted(f"{one['val_loss']:.4f}" for one in measured[rule, warmup, batch].values()))
        report(measured)


def report(measured: dict[tuple[str, str, int], dict[int, dict[str, Any]]]) -> None:
    base = measured["recipe", "gradual", BASE]
    reference = statistics.mean(one["val_loss"] for one in base.values())
    rows = []
    for (rule, warmup, batch), runs in measured.items():
        losses = [one["val_loss"] for one in runs.values()]
        mean = statistics.mean(losses) if losses else math.nan
        spread = f"{min(losses):.4f} to {max(losses):.4f}" if losses else ""
        ratio = f"{100 * (mean / reference - 1):+.1f} %" if losses else "diverged"
        rows.append([str(batch), rule, warmup, str(len(losses)), f"{mean:.4f}", spread, ratio])
    noises = [one["noise_scale_tokens"] for one in base.values() if one["noise_scale_tokens"]]
    noise = statistics.median(noises)
    note = (
        f"The same {next(iter(base.values()))['tokens']:,} characters in every run; loss of the whole validation "
        "split, mean and range over seeds. Gradient noise scale at the end of the base runs: "
        f"{noise:,.0f} characters ({noise / CONTEXT:.0f} sequences)."
    )
    head = ["sequences", "rule", "warm-up", "seeds", "val loss", "range", "against base"]
    command = "make bench BENCH=large_batch"
    print(table.write("large_batch", "shakespeare-char at larger batches", command, head, rows, note))
    draw(measured, reference, noise / CONTEXT)


def draw(measured: dict[tuple[str, str, int], dict[int, dict[str, Any]]], reference: float, noise: float) -> None:
    """``results/large_batch.png``: validation loss by batch, a panel for each warm-up. noise: scale, in sequences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    base = [one["val_loss"] for one in measured["recipe", "gradual", BASE].values()]
    for axes, warmup in zip(figure.subplots(1, 3, sharey=True), WARMUPS, strict=True):
        for rule in RULES:
            points = {BASE: base} if "LAMB" not in rule else {}
            points |= {n: [one["val_loss"] for one in measured.get((rule, warmup, n), {}).values()] for n in BATCHES}
            points = {batch: losses for batch, losses in points.items() if losses}
            means = [statistics.mean(losses) for losses in points.values()]
            below = [mean - min(losses) for mean, losses in zip(means, points.values(), strict=True)]
            above = [max(losses) - mean for mean, losses in zip(means, points.values(), strict=True)]
            axes.errorbar(list(points), means, yerr=[below, above], marker="o", ms=4, capsize=3, label=rule)
        axes.axhspan(reference, 1.02 * reference, color="0.9", zorder=0, label="base to +2 %")
        axes.axvline(noise, color="0.6", ls=":", lw=1, zorder=0, label="noise scale of the gradients")
        axes.set_xscale("log", base=2)
        axes.set_xticks([BASE, *BATCHES], [str(n) for n in (BASE, *BATCHES)])
        axes.set_title(f"warm-up: {warmup}")
        axes.set_xlabel("batch (sequences of 64 characters)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation loss (nats per character)")
    figure.axes[0].legend(frameon=False)
    figure.savefig(table.RESULTS / "large_batch.png")


if __name__ == "__main__":
    main()
