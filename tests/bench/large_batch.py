"""How far may a batch grow before the loss suffers? At equal tokens, every optimizer tuned at every batch.

    make bench BENCH=large_batch      (hours on two cores; goes on where it stopped)
    MODELS=shakespeare-char BATCHES=1,16 OPTIMIZERS=adamw,muon RULES=sqrt WARMUPS=none SEEDS=1        some of it
    ONLY=report                       the table and the picture of what is there

1. tuned     the best of a grid of factors of 2, looked for from the best of the batch before: downhill until no
             neighbour is better; one seed. Without that, a comparison of batches is one of rates (Shallue et al. 2019,
             1811.03600).
2. seeds     three at the best rate; other warm-ups: over as many tokens or steps as at the base batch, constant, none
3. rules     rates of the base batch alone, everything else by scaling.rule, with these warm-ups too

Two models, so that no rule is made for one: `shakespeare-char` by characters, and `demo` on the same text in 1,024
pieces. Each run is a line of results/large_batch.jsonl, which is not made again; the table is made of them.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import large_batch_report
import table
from running import run
from shakespeare import SOURCE

RESULTS = table.RESULTS / "large_batch.jsonl"
FOLDER = Path(os.environ.get("RUNS", "runs/large_batch"))  # prepared texts, and the run that is under way


def chosen(name: str, among: str) -> list[str]:
    return os.environ.get(name, among).split(",")


MODELS = {"shakespeare-char": 12, "demo": 16}  # recipe -> its batch, which the others are multiples of
TIMES = [int(word) for word in chosen("BATCHES", "1,4,8,16,32")]
SEEDS = range(1, int(os.environ.get("SEEDS", "3")) + 1)
RULES = chosen("RULES", "none,linear,sqrt")
WARMUPS = chosen("WARMUPS", "tokens,steps,constant,none")  # beside auto, which is one of the first two:
AUTO = {"adamw": "steps", "lamb": "steps", "lars": "tokens", "muon": "tokens"}
# Where the search begins at the base batch: the peak rate, and of muon what its other parameters have of it.
FIRST = {"adamw": (2e-3, 0.0), "lamb": (1e-2, 0.0), "lars": (4.0, 0.0), "muon": (1e-2, 0.1)}
OPTIMIZERS = chosen("OPTIMIZERS", ",".join(FIRST))
COMMON = ("eval.every=0", "eval.rows=192", "checkpoint.every=0", "metrics.every=100", "schedule.name=cosine")


@dataclass(frozen=True)
class Trial:
    """One run. times: its batch / the recipe's. base: the batch that its rates are for, times the recipe's. share:
    adamw_lr / lr, of muon. warmup: see WARMUPS; auto at the base batch.
    """

    model: str
    optimizer: str
    times: int
    lr: float
    share: float = 0.0
    base: int = 0
    rule: str = "none"
    warmup: str = "auto"
    seed: int = 1

    def words(self) -> list[str]:
        batch = MODELS[self.model]
        words = [
            f"data.dir={FOLDER}/{self.model}",
            f"seed={self.seed}",
            f"train.global_batch={batch * self.times}",
            f"train.microbatch={min(48, batch * self.times // 2)}",  # two parts at least: the noise can be measured
            f"optim.name={self.optimizer}",
            f"optim.lr={self.lr}",
            f"schedule.min_lr={self.lr / 10}",
            f"scaling.rule={self.rule}",
            f"scaling.base_batch={batch}",
        ]
        if self.optimizer == "muon":
            words.append(f"optim.adamw_lr={self.lr * self.share}")
        if self.warmup in ("tokens", "steps"):  # as many as at the base batch
            words.append(f"scaling.warmup={self.warmup}")
        elif self.warmup == "none":
            words.append("schedule.warmup_steps=0")
        elif self.warmup == "constant":  # at the rate that the rule would give the base batch
            words += ["schedule.warmup=constant", f"schedule.warmup_start={self.times**-0.5}"]
        return [*words, *COMMON]


class Runs:
    """What was run before, and what is run now."""

    def __init__(self) -> None:
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        self.known: dict[Trial, dict[str, float | None]] = {}
        for line in map(json.loads, lines):
            self.known[Trial(**line["trial"])] = line["found"]

    def loss(self, trial: Trial) -> float:
        """Validation loss at the end; infinite where the run diverged."""
        if trial not in self.known:
            found = train(trial)
            self.known[trial] = found
            with RESULTS.open("a") as file:
                file.write(json.dumps({"trial": asdict(trial), "found": found}) + "\n")
            print(f"{trial}: {found['val_loss']}", flush=True)
        loss = self.known[trial]["val_loss"]
        return math.inf if loss is None else loss


def train(trial: Trial) -> dict[str, float | None]:
    run_dir = FOLDER / "run"
    subprocess.run(["rm", "-rf", str(run_dir)], check=True)
    command = [sys.executable, "-m", "hvdtrain", "train", trial.model, *trial.words(), "--run-dir", str(run_dir)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=7200)
    if done.returncode == 76:
        return {"val_loss": None, "noise_scale_tokens": None, "step_s": None}
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    summary = json.loads((run_dir / "summary.json").read_text())
    return {name: summary.get(name) for name in ("val_loss", "noise_scale_tokens", "tokens", "train_s")}


def tuned(runs: Runs, start: Trial) -> Trial:
    """The best of the grid around ``start``: its neighbours are tried until none is better."""
    best = start
    while True:
        shares = (best.share / 2, best.share * 2) if best.share else ()
        near = [replace(best, lr=lr) for lr in (best.lr / 2, best.lr * 2)]
        near += [replace(best, share=share) for share in shares]
        found = min([best, *near], key=runs.loss)
        if found == best:
            return best
        best = found


def mean(runs: Runs, trial: Trial) -> float:
    return statistics.mean([runs.loss(replace(trial, seed=seed)) for seed in SEEDS])


def prepare(model: str) -> None:
    """The text by characters or pieces, its last tenth for validation."""
    out = FOLDER / model
    if (out / "manifest.json").exists():
        return
    module, source = [sys.executable, "-m", "data_prep"], ["--input", str(SOURCE)]
    kind = ["--kind", "char"] if model == "shakespeare-char" else ["--vocab-size", "1024"]
    run([*module, "tokenizer", *source, *kind, "--out", f"{out}.json"])
    split = ["--val-split", "tail", "--val-fraction", "0.1", "--tokenizer", f"{out}.json"]
    run([*module, "text", *source, *split, "--out", str(out)])


def experiment(runs: Runs, model: str) -> Iterator[Trial]:
    """All that is to be run, in the order in which it says most soonest."""
    best: dict[tuple[str, int], Trial] = {}
    for name in OPTIMIZERS:
        trial = Trial(model, name, TIMES[0], *FIRST[name])
        for times in TIMES:
            trial = tuned(runs, replace(trial, times=times))
            best[name, times] = trial
    for trial in best.values():
        mean(runs, trial)
        yield trial
    for (name, times), trial in best.items():
        base = best.get((name, TIMES[0]), trial)
        for rule in RULES if times > 1 else ():
            for warmup in ("auto", *others(name, "tokens", "steps")):
                by_rule = Trial(model, name, times, base.lr, base.share, TIMES[0], rule, warmup)
                mean(runs, by_rule)
                yield by_rule
    for trial in best.values():
        for warmup in others(trial.optimizer):
            if trial.times > 1:
                other = replace(trial, warmup=warmup)
                mean(runs, other)
                yield other


def others(optimizer: str, *among: str) -> list[str]:
    """The warm-ups that are tried beside auto."""
    return [word for word in WARMUPS if word != AUTO[optimizer] and word in (among or WARMUPS)]


def main() -> None:
    if not SOURCE.exists():
        sys.exit(f"needs tinyshakespeare.txt; set SHAKESPEARE=path (not at {SOURCE})")
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = Runs()
    for model in chosen("MODELS", ",".join(MODELS)):
        if os.environ.get("ONLY") != "report":
            prepare(model)
            for _ in experiment(runs, model):
                pass
    lines = [{"trial": asdict(trial), "found": found} for trial, found in runs.known.items()]
    print(large_batch_report.write(lines, MODELS))


if __name__ == "__main__":
    main()
