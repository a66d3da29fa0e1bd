"""One GPU in a few minutes: does everything work on it, and how fast is it?

    make gpu            PARTS="tests ceilings gpt2 large checkpoint optimizers kernels precision" chooses; LIMIT_S=480

tests        tests/gpu: numbers against the CPU's, whole runs, NCCL
ceilings     what the card reaches at most: a bf16 product of 8,192 cubed, a copy
gpt2         gpt2-124m at its best settings against the same model trained the nanoGPT way, in turn
large        a GPT of 1.3 billion parameters
checkpoint   what an asynchronous save holds up, against one at once
optimizers   a step of each against fused AdamW
kernels      attention and the loss by each way; the kernels of a step of gpt2-124m
precision    gpt2-124m in bf16 with fp32 weights; and, eager, in fp32, TF32 and bf16

Each part stands alone and says what it found as soon as it knows; what ran before the time was up is in
results/gpu.json and results/gpu.md. A part that fails is named, and the exit code is then 1.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import table
import yaml

from hvdtrain.watch.log_file import STEP_PARTS

HERE = Path(__file__).resolve().parent
PARTS = os.environ.get("PARTS", "tests ceilings gpt2 large checkpoint optimizers kernels precision").split()
BEGAN = float(os.environ.get("BEGAN", time.time()))  # with what was built before
LIMIT_S = float(os.environ.get("LIMIT_S", "480"))
# To try this program itself where there is no GPU: tiny models, figures that mean nothing.
ON_CPU = os.environ.get("HVDTRAIN_GPU_TESTS") == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda"

VOCABULARY = 50257
GPT2 = {"layers": 12, "heads": 12, "width": 768, "context": 1024, "bias": False, "vocab_multiple": 64}
LARGE = {"layers": 24, "heads": 16, "width": 2048, "context": 2048, "bias": False, "vocab_multiple": 64}
ROWS, LARGE_ROWS, STEPS = 64, 8, 40
TESTS_AT_ONCE = min(6, os.cpu_count() or 1)
if ON_CPU:
    VOCABULARY, ROWS, LARGE_ROWS, STEPS = 500, 4, 2, 10
    GPT2 = LARGE = {"layers": 2, "heads": 2, "width": 32, "context": 32, "bias": False}

Row = tuple[str, str, str]  # what, value, about it


def left_s() -> float:
    return BEGAN + LIMIT_S - time.time()


def run(command: list[Any]) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, capture_output=True, timeout=max(1, left_s()))
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{' '.join(words[1:4])} ended with {done.returncode}: {last}")
    return done.stdout


# --- parts ------------------------------------------------------------------------------------------------------------


def tests(folder: Path) -> Iterator[Row]:
    """Prints its own lines; every test's figures go into the results."""
    log = folder / "tests.jsonl"
    # Not every site's versions are so new that their warnings would be ours.
    words = [
        "-q",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        "--durations-min=5",
        str(HERE.parent / "gpu"),
    ]
    env = {**os.environ, "HVDTRAIN_GPU_TESTS": DEVICE, "HVDTRAIN_GPU_RESULTS": str(log), "OMP_NUM_THREADS": "2"}
    code = 0
    for chosen in (["-m", "not alone", "-n", str(TESTS_AT_ONCE)], ["-m", "alone"]):
        command = [sys.executable, "-m", "pytest", *words, *chosen]
        try:
            code = max(code, subprocess.run(command, env=env, timeout=max(1, left_s())).returncode)
        except subprocess.TimeoutExpired:
            code = -1
            break
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for line in lines:
        about = {key: value for key, value in line.items() if key not in ("test", "outcome")}
        yield line["test"], line["outcome"], ", ".join(f"{key} {value}" for key, value in about.items())
    if code:
        failed = sum(line["outcome"] == "failed" for line in lines)
        raise RuntimeError(f"{failed} tests failed" if code > 0 else "the time was up")


def ceilings(folder: Path) -> Iterator[Row]:
    import torch
    from gpu_kernels import timed

    size = 256 if ON_CPU else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: a @ b, DEVICE)
    yield "bf16 product", f"{2 * size**3 / seconds / 1e12:.1f} TFLOP/s", f"{size} cubed, random numbers"
    source = torch.empty(1 << (20 if ON_CPU else 30), dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), DEVICE)
    yield "copy", f"{2 * source.nbytes / seconds / 1e12:.2f} TB/s", "read and written"


def gpt2(folder: Path) -> Iterator[Row]:
    from engine import plain, store_rows

    from hvdtrain.models.options import TransformerOptions

    padded = TransformerOptions(**GPT2).padded(VOCABULARY)
    data = store_rows(folder, "gpt2", GPT2, padded, ROWS, STEPS)
    found = ours(folder, GPT2, ROWS, precision="bf16-weights", compile="blocks")
    yield "gpt2-124m, hvdtrain", *told(found)
    theirs = plain(data, 1, ROWS, STEPS, way="nanogpt", compile=True, bf16=True, device=DEVICE)
    yield "gpt2-124m, nanoGPT's way", f"{theirs['tokens_per_s']:,.0f} tokens/s", f"peak {theirs['peak_mib']:,.0f} MiB"
    yield "hvdtrain / nanoGPT's way", f"{found['tokens_per_s'] / theirs['tokens_per_s']:.2f}", "wanted: 1.1"
    yield "peak memory, hvdtrain / nanoGPT's way", f"{found['peak_mib'] / theirs['peak_mib']:.2f}", "wanted: 0.7"


def kernels(folder: Path) -> Iterator[Row]:
    if ON_CPU:
        return
    from gpu_kernels import attention, loss, step

    yield from attention(ROWS, GPT2["heads"], GPT2["context"], GPT2["width"] // GPT2["heads"])
    yield from loss(ROWS * GPT2["context"], GPT2["width"], 50304)
    yield from step(GPT2, VOCABULARY, ROWS)


def large(folder: Path) -> Iterator[Row]:
    settings = {"precision": "bf16-weights", "compile": "blocks"}
    yield "gpt-1.3b, hvdtrain", *told(ours(folder, LARGE, LARGE_ROWS, STEPS // 2, **settings))


def precision(folder: Path) -> Iterator[Row]:
    yield "gpt2-124m, bf16, compiled", *told(ours(folder, GPT2, ROWS, precision="bf16", compile="blocks"))
    rows = max(2, ROWS // 4)
    for name, settings in (("fp32", {}), ("TF32", {"tf32": True}), ("bf16", {"precision": "bf16"})):
        yield f"gpt2-124m, {name}, eager, {rows} rows", *told(ours(folder, GPT2, rows, **settings))


def optimizers(folder: Path) -> Iterator[Row]:
    from optimizers import NAMES, compare

    times, millions = compare(DEVICE, rounds=10)
    for name in NAMES:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["adamw"], strict=True))
        yield (
            f"step of {name}",
            f"{1e3 * statistics.median(times[name]):.2f} ms",
            f"{millions:.1f} M; {ratio:.2f}x AdamW",
        )


def checkpoint(folder: Path) -> Iterator[Row]:
    from checkpoint import run as measure

    found = measure([], 1, DEVICE, GPT2, VOCABULARY)["found"]
    held = {kind: statistics.median(blocked for _, blocked, _ in found[kind]) for kind in ("at once", "asynchronous")}
    for kind, seconds in held.items():
        yield f"checkpoint, {kind}", f"{1e3 * seconds:.1f} ms", "the loop was held up"
    yield "asynchronous / at once", f"{held['asynchronous'] / held['at once']:.1%}", "wanted: 5 %"


# --- a run of ours ----------------------------------------------------------------------------------------------------


def ours(folder: Path, sizes: dict, rows: int, steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    """One run of ``hvdtrain train``: medians over its intervals, without the first, which compiles."""
    recipe = {
        "seed": 1,
        "device": DEVICE,
        "data": {"dir": str(folder / "data"), "verify": "sizes"},
        "model": sizes,
        "train": {"steps": steps, "global_batch": rows},
        "eval": {"every": 0, "rows": rows},
        "checkpoint": {"every": 0},
        "metrics": {"every": steps // 8 or 1, "tensorboard": False},
        "schedule": {"warmup_steps": 5},
        **settings,
    }
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path, run_dir = Path(place) / "recipe.yaml", Path(place) / "run"
        path.write_text(yaml.safe_dump(recipe))
        run([sys.executable, "-m", "hvdtrain", "train", path, "--run-dir", run_dir])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"][2:]
    found = {key: statistics.median(line[key] for line in lines) for key in ("tokens_per_s", "memory_peak_mib")}
    parts = {name: sum(line[f"time_{name}_s"] for line in lines) for name in STEP_PARTS}
    whole = sum(parts.values())
    return {
        "tokens_per_s": found["tokens_per_s"],
        "spread": [min(line["tokens_per_s"] for line in lines), max(line["tokens_per_s"] for line in lines)],
        "peak_mib": found["memory_peak_mib"],
        "mfu": statistics.median(line["mfu"] for line in lines) if "mfu" in lines[0] else None,
        "tflops": statistics.median(line["model_tflops_per_s"] for line in lines),
        "shares": {name: seconds / whole for name, seconds in parts.items()},
    }


def told(found: dict[str, Any]) -> tuple[str, str]:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found["shares"].items())
    low, high = found["spread"]
    mfu = f"MFU {found['mfu']:.1%} of the data sheet, " if found["mfu"] else ""
    about = f"{found['tflops']:.1f} TFLOP/s, {mfu}{low:,.0f} - {high:,.0f}, peak {found['peak_mib']:,.0f} MiB; {shares}"
    return f"{found['tokens_per_s']:,.0f} tokens/s", about


def write_data(folder: Path) -> None:
    """Random tokens of GPT-2's vocabulary: speed does not depend on what is learned."""
    from hvdtrain.data.shards import Manifest, token_dtype, write_manifest, write_shard
    from hvdtrain.files import file_sha256

    folder.mkdir()
    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    numbers, dtype = np.random.default_rng(0), token_dtype(VOCABULARY)
    shards = []
    for split, count in (("train", 1 << 22), ("val", 1 << 16)):
        tokens = numbers.integers(0, VOCABULARY, count).astype(dtype)
        datasets = {"tokens": tokens, "doc_offsets": np.array([0, count])}
        shards.append(write_shard(folder, split, 0, datasets))
    digest = file_sha256(folder / "tokenizer.json")
    write_manifest(folder, Manifest(VOCABULARY, digest, dtype.name, tuple(shards), source={}))


# --- all of it --------------------------------------------------------------------------------------------------------


def card() -> str:
    if ON_CPU:
        return "no GPU: a trial of this program, whose figures mean nothing"
    query = "--query-gpu=name,driver_version,memory.total"
    return run(["nvidia-smi", query, "--format=csv,noheader"]).splitlines()[0]


def write_results(rows: list[list[str]], where: Path) -> None:
    fields = [dict(zip(("part", "what", "value", "about"), row, strict=True)) for row in rows]
    where.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"card": card(), "versions": table.versions(), "results": fields}, indent=1, ensure_ascii=False)
    (where / "gpu.json").write_text(text + "\n", encoding="utf-8")
    note = f"{card()}. Medians over intervals of an eighth of the run's steps, without the first two, and their range."
    shown = [row for row in rows if row[0] != "tests" or row[2] != "passed"]
    passed = sum(row[0] == "tests" and row[2] == "passed" for row in rows)
    if any(row[0] == "tests" for row in rows):
        shown.insert(0, ["tests", "tests/gpu", f"{passed} passed", "each with its figures in gpu.json"])
    table.write("gpu", "One GPU", "make gpu", ["part", "what", "value", "about it"], shown, note, where)


def main() -> int:
    where = Path(os.environ.get("OUT") or table.RESULTS)
    rows: list[list[str]] = []
    failed = []
    chosen = {name: globals()[name] for name in PARTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        for part, find in chosen.items():
            print(f"== {part}: {left_s():.0f} s left", flush=True)
            try:
                if left_s() < 5:
                    raise RuntimeError("not begun: the time was up")
                for row in find(folder):
                    rows.append([part, *row])
                    if part != "tests":  # pytest has told them
                        print(f"{row[0]:<44} {row[1]:>18}   {row[2]}", flush=True)
                    write_results(rows, where)
            except (Exception, SystemExit) as error:
                problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}"
                failed.append(part)
                rows.append([part, "FAILED", "", problem])
                print(f"{part} FAILED: {problem}", flush=True)
            write_results(rows, where)
    print(f"== {where}/gpu.md, {time.time() - BEGAN:.0f} s" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
