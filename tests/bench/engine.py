"""The engine against what a user would otherwise pick: same model, weights, rows, batch and threads, in one run.

    make bench BENCH=engine            PARTS="one ranks scaling memory" chooses; STEPS=300

one       a GPT of 6 x 384, vocabulary 8,192, context 256, 8 sequences on two threads: nanoGPT's way against ours
ranks     the same on two ranks of one thread: torch's DDP over gloo against ours
scaling   one rank of one thread with 8 sequences, two with 16
memory    vocabulary 50,304, context 1,024: peak memory of a whole process, nanoGPT's way against ours
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import table
import yaml

WAYS = Path(__file__).parent / "ways"
STEPS = int(os.environ.get("STEPS", "300"))
PARTS = os.environ.get("PARTS", "one ranks scaling memory").split()
SIZES = {"layers": 6, "heads": 6, "width": 384, "context": 256, "bias": False}
LARGE = {"layers": 4, "heads": 6, "width": 384, "context": 1024, "bias": False}
LR, WARMUP = 1e-3, min(50, STEPS // 2)
MPIRUN = ["mpirun", "-np", "2", "--bind-to", "none"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]


def run(command: list[str], threads: int) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=3600)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def prepare(folder: Path) -> None:
    """Tokenise Python's standard library into ``folder``/data, and store the rows of all steps for the others."""
    module = [sys.executable, "-m", "data_prep"]
    corpus = ["--input", sysconfig.get_path("stdlib"), "--glob", "*.py", "--exclude", "site-packages", "test"]
    run([*module, "tokenizer", *corpus, "--vocab-size", "8192", "--out", f"{folder}/tokenizer.json"], 2)
    made = ["--tokenizer", f"{folder}/tokenizer.json", "--out", f"{folder}/data"]
    run([*module, "text", *corpus, "--val-fraction", "0.02", *made], 2)


def store_rows(folder: Path, name: str, sizes: dict, vocabulary: int, rows: int, steps: int) -> Path:
    """What hvdtrain would read in ``steps`` steps of ``rows`` windows: uint16 [steps, rows, context + 1]."""
    from hvdtrain.data.corpora import DataOptions, open_corpora
    from hvdtrain.data.loader import Feed
    from hvdtrain.data.sampler import WindowSampler
    from hvdtrain.data.stream import TokenStream
    from hvdtrain.data.windows import eval_windows

    out = folder / name
    out.mkdir(exist_ok=True)
    context = sizes["context"]
    stream = TokenStream(open_corpora(DataOptions(dir=str(folder / "data"))).entries, "train")
    starts = WindowSampler(len(stream), context, Feed(context, 1, rows, 0, 0, 1, 0, False).seed).starts_of(
        np.arange(rows * steps)
    )
    windows = np.stack([stream.slice(int(start), context + 1) for start in starts])
    np.save(out / f"windows-{rows}.npy", windows.reshape(steps, rows, -1).astype(np.uint16))
    val = TokenStream(open_corpora(DataOptions(dir=str(folder / "data"))).entries, "val")
    kept = [
        np.concatenate([batch.tokens.numpy(), batch.targets.numpy()[:, -1:]], axis=1)
        for batch in eval_windows(val, context, 1, 0, 1)
        if batch.tokens.shape[1] == context
    ]
    np.save(out / "val.npy", np.concatenate(kept))
    (out / "setup.json").write_text(json.dumps({"sizes": sizes, "vocabulary": vocabulary}))
    return out


def plain(folder: Path, threads: int, rows: int, steps: int, launcher: list[str] | None = None, **words) -> dict:
    """One run of `ways/plain_train.py`."""
    settings = {"folder": str(folder), "threads": threads, "rows": rows, "steps": steps, "lr": LR, "warmup": WARMUP}
    command = [*(launcher or [sys.executable]), str(WAYS / "plain_train.py"), json.dumps({**settings, **words})]
    return json.loads(run(command, threads).strip().splitlines()[-1])


def ours(folder: Path, number: list[int], threads: int, rows: int, steps: int, sizes: dict, two: bool, **more) -> dict:
    """One run of `hvdtrain train`; its summary."""
    number[0] += 1
    recipe = {
        "seed": 1,
        "data": {"dir": str(folder / "data")},
        "model": {**sizes, **more.pop("model", {})},
        "train": {"steps": steps, "global_batch": rows},
        "eval": {"every": 0, "rows": 8},
        "checkpoint": {"every": 0},
        "metrics": {"every": 10, "tensorboard": False},
        "optim": {"lr": LR},
        "schedule": {"warmup_steps": WARMUP, "min_lr": LR / 10},
        **more,
    }
    path, run_dir = folder / f"{number[0]}.yaml", folder / f"run-{number[0]}"
    path.write_text(yaml.safe_dump(recipe))
    python = [sys.executable, "-m", "hvdtrain", "train", str(path), "--run-dir", str(run_dir)]
    run([*(MPIRUN if two else []), *python], threads)
    return json.loads((run_dir / "summary.json").read_text())


def main() -> None:
    rows: list[list[str]] = []
    number = [0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)

        def add(part: str, results: dict[str, dict], measure: str = "tokens_per_s") -> None:
            base = next(iter(results.values()))
            for way, result in results.items():
                ratio = result[measure] / base[measure]
                loss, peak = result.get("val_loss"), result.get("memory_peak_mib", result.get("peak_mib"))
                mfu = result.get("mfu")
                rows.append([
                    part, way, f"{result['tokens_per_s']:,.0f}", f"{ratio:.2f}", f"{loss:.4f}" if loss else "",
                    f"{mfu:.0%}" if mfu else "", f"{peak:,.0f}" if peak else "",
                ])  # fmt: skip
                print(rows[-1], flush=True)

        if "one" in PARTS:
            data = store_rows(folder, "one", SIZES, 8192, 8, STEPS)
            common = {"way": "nanogpt", "evaluate": True}
            results = {"nanoGPT's way, fp32": plain(data, 2, 8, STEPS, **common)}
            results["nanoGPT's way, fp32, compiled"] = plain(data, 2, 8, STEPS, compile=True, **common)
            results["nanoGPT's way, bf16 autocast, compiled"] = plain(
                data, 2, 8, STEPS, compile=True, bf16=True, **common
            )
            for precision in ("fp32", "bf16", "bf16-weights"):
                results[f"hvdtrain, {precision}"] = ours(folder, number, 2, 8, STEPS, SIZES, False, precision=precision)
            settings = {"precision": "bf16-weights", "compile": "blocks"}
            results["hvdtrain, bf16-weights, compile=blocks"] = ours(
                folder, number, 2, 8, STEPS, SIZES, False, **settings
            )
            add("1 rank x 2 threads", results)
        short = min(STEPS, 60)
        if "ranks" in PARTS:
            data = store_rows(folder, "ranks", SIZES, 8192, 8, short)
            results = {"torch DDP, gloo, same model code": plain(data, 1, 8, short, TORCHRUN, way="ddp")}
            results["torch DDP, gloo, same model and matrix library"] = plain(
                data, 1, 8, short, TORCHRUN, way="ddp", own_matmul=True
            )
            results["hvdtrain, fp32"] = ours(folder, number, 1, 8, short, SIZES, True)
            results["hvdtrain, bf16-weights"] = ours(folder, number, 1, 8, short, SIZES, True, precision="bf16-weights")
            add("2 ranks x 1 thread", results)
        if "scaling" in PARTS:
            results = {
                f"hvdtrain, fp32, {count}": ours(folder, number, 1, batch, short, SIZES, count != "1 rank")
                for count, batch in (("1 rank", 8), ("2 ranks", 16))
            }
            add("weak scaling, 1 thread a rank", results)
        if "memory" in PARTS:
            data = store_rows(folder, "memory", LARGE, 50304, 4, 3)
            results = {"nanoGPT's way, fp32": plain(data, 2, 4, 3, way="nanogpt")}
            large = {**LARGE, "vocab_multiple": 50304}
            results["hvdtrain, fp32"] = ours(folder, number, 2, 4, 3, large, False)
            results["hvdtrain, bf16-weights"] = ours(folder, number, 2, 4, 3, large, False, precision="bf16-weights")
            add("vocabulary 50,304, context 1,024", results, "peak_mib")
    head = ["part", "way", "tokens/s", "ratio", "val loss", "share of ceiling", "peak MiB"]
    note = (
        f"6 x 384, vocabulary 8,192, context 256, {STEPS} steps of 8 sequences where nothing else is said. Rows, first "
        "weights and schedule are the same on both sides. tokens/s: median over intervals of 10 steps."
    )
    print(table.write("engine", "The engine, side by side", "make bench BENCH=engine", head, rows, note))


if __name__ == "__main__":
    main()
