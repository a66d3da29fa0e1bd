"""The engine against what a user would otherwise pick: same model, weights, rows, batch and threads, in one run.

    make bench BENCH=engine            PARTS="one ranks link hf scaling memory" chooses; STEPS=300

one       a GPT of 6 x 384, vocabulary 8,192, context 256, 8 sequences on two threads: nanoGPT's way against ours
ranks     the same on two ranks of one thread: torch's DDP over gloo against ours
link      the same two ranks on two hosts of this machine with 1 Gbit/s between them (root): MPI and gloo over TCP
hf        two ranks under Hugging Face's Trainer; HF_PYTHON: a Python with transformers, accelerate, hvdtrain
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

from hvdtrain.machine.hosts import Network
from hvdtrain.machine.link import Link, slow_link

HOSTS = ("n1", "n2")
WAYS = Path(__file__).parent / "ways"
STEPS = int(os.environ.get("STEPS", "300"))
PARTS = os.environ.get("PARTS", "one ranks link hf scaling memory").split()
SIZES = {"layers": 6, "heads": 6, "width": 384, "context": 256, "bias": False}
LARGE = {"layers": 4, "heads": 6, "width": 384, "context": 1024, "bias": False}
LR = 1e-3
MPIRUN = ["mpirun", "-np", "2", "--bind-to", "none"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
HF_PYTHON = os.environ.get("HF_PYTHON", sys.executable)


def warmup(steps: int) -> int:
    return min(50, steps // 2)


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
    settings = {
        "folder": str(folder),
        "threads": threads,
        "rows": rows,
        "steps": steps,
        "lr": LR,
        "warmup": warmup(steps),
    }
    command = [*(launcher or [sys.executable]), str(WAYS / "plain_train.py"), json.dumps({**settings, **words})]
    return json.loads(run(command, threads).strip().splitlines()[-1])


def ddp_over_link(network: Network, folder: Path, rows: int, steps: int, **words) -> dict:
    """`plain_train.py` as two ranks, each on its host."""
    settings = {"folder": str(folder), "threads": 1, "rows": rows, "steps": steps, "lr": LR, "warmup": warmup(steps)}
    words = {**settings, "way": "ddp", **words}
    ranks = []
    for rank, name in enumerate(HOSTS):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": HOSTS[0], "MASTER_PORT": "29517"}
        env = {**os.environ, **world, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        enter = network.hosts[name].enter(Path.cwd())
        command = [*enter, sys.executable, str(WAYS / "plain_train.py"), json.dumps(words)]
        ranks.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE))
    try:
        printed = [rank.communicate(timeout=3600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads(printed[0].strip().splitlines()[-1])


def ours(
    folder: Path,
    number: list[int],
    threads: int,
    rows: int,
    steps: int,
    sizes: dict,
    launcher: list[str] | None,
    **more,
) -> dict:
    """One run of `hvdtrain train`; its summary, and the share of the time that is in none of the step's parts."""
    number[0] += 1
    recipe = {
        "seed": 1,
        "data": {"dir": str(folder / "data")},
        "model": {**sizes, **more.pop("model", {})},
        "train": {"steps": steps, "global_batch": rows},
        "eval": {"every": 0, "rows": 8},
        "checkpoint": {"every": 0},
        "metrics": {"every": min(10, steps // 2), "tensorboard": False, "mfu": "measure"},
        "optim": {"lr": LR},
        "schedule": {"warmup_steps": warmup(steps), "min_lr": LR / 10},
        **more,
    }
    path, run_dir = folder / f"{number[0]}.yaml", folder / f"run-{number[0]}"
    path.write_text(yaml.safe_dump(recipe))
    python = [sys.executable, "-m", "hvdtrain", "train", str(path), "--run-dir", str(run_dir)]
    run([*(launcher or []), *python], threads)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"][1:]
    outside, inside = (
        sum(line[f"time_{part}_s"] for line in lines for part in parts)
        for parts in (("data", "other"), ("compute", "sync", "optimizer"))
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    share = outside / (outside + inside) if lines else None
    return {**summary, "peak_mib": summary["memory_peak_mib"], "outside": share}


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
                loss, peak = result.get("val_loss"), result.get("peak_mib")
                mfu, outside = result.get("mfu"), result.get("outside")
                rows.append([
                    part, way, f"{result['tokens_per_s']:,.0f}", f"{ratio:.2f}", f"{loss:.4f}" if loss else "",
                    f"{mfu:.0%}" if mfu else "", f"{outside:.1%}" if outside else "", f"{peak:,.0f}" if peak else "",
                ])  # fmt: skip
                print(rows[-1], flush=True)

        short = min(STEPS, 60)
        if "one" in PARTS:
            data = store_rows(folder, "one", SIZES, 8192, 8, STEPS)
            results = {"nanoGPT's way, fp32": plain(data, 2, 8, STEPS, way="nanogpt", evaluate=True)}
            for words in ({}, {"bf16": True}):
                name = "bf16 autocast" if words else "fp32"
                results[f"nanoGPT's way, {name}, compiled, {short} steps"] = plain(
                    data, 2, 8, short, way="nanogpt", compile=True, **words
                )
            for precision in ("fp32", "bf16", "bf16-weights"):
                results[f"hvdtrain, {precision}"] = ours(folder, number, 2, 8, STEPS, SIZES, None, precision=precision)
            settings = {"precision": "bf16", "compile": "model"}
            results["hvdtrain, bf16, compile=model"] = ours(folder, number, 2, 8, STEPS, SIZES, None, **settings)
            add("1 rank x 2 threads", results)
        if "ranks" in PARTS:
            data = store_rows(folder, "ranks", SIZES, 8192, 8, short)
            results = {"torch DDP, gloo, same model code": plain(data, 1, 8, short, TORCHRUN, way="ddp")}
            results["torch DDP, gloo, same model and matrix library"] = plain(
                data, 1, 8, short, TORCHRUN, way="ddp", own_matmul=True
            )
            results["hvdtrain, fp32"] = ours(folder, number, 1, 8, short, SIZES, MPIRUN)
            results["hvdtrain, bf16"] = ours(folder, number, 1, 8, short, SIZES, MPIRUN, precision="bf16")
            add("2 ranks x 1 thread", results)
        if "link" in PARTS:
            data = store_rows(folder, "link", SIZES, 8192, 8, STEPS)
            with slow_link(HOSTS, Link(1e9), folder) as (network, mpirun):
                over = [*mpirun, "-np", "2", "--bind-to", "none", "-x", "OMP_NUM_THREADS"]
                results = {"torch DDP, gloo, same model code": ddp_over_link(network, data, 8, STEPS, evaluate=True)}
                results["torch DDP, gloo, bf16 autocast, fp16 gradients"] = ddp_over_link(
                    network, data, 8, short, bf16=True, fp16_gradients=True
                )
                for precision, wire, steps in (
                    ("fp32", "fp32", short),
                    ("fp32", "bf16", short),
                    ("bf16", "bf16", STEPS),
                ):
                    settings = {"precision": precision, "sync": {"allreduce": {"wire": wire}}}
                    results[f"hvdtrain, {precision}, wire {wire}, {steps} steps"] = ours(
                        folder, number, 1, 8, steps, SIZES, over, **settings
                    )
            add("2 ranks x 1 thread, 1 Gbit/s", results)
        if "hf" in PARTS and not subprocess.call([HF_PYTHON, "-c", "import transformers"], stderr=subprocess.DEVNULL):
            data = store_rows(folder, "hf", SIZES, 8192, 8, short)
            torchrun = [HF_PYTHON, *TORCHRUN[1:], str(WAYS / "hf_train.py")]
            results = {}
            for name, more in (("fp32", {}), ("bf16", {"bf16": True})):
                words = {"folder": str(data), "rows": 8, "steps": short, "threads": 1, **more}
                printed = run([*torchrun, json.dumps(words)], 1).splitlines()
                last = next(line for line in reversed(printed) if line.startswith('{"tokens_per_s"'))
                results[f"Hugging Face Trainer, gloo, {name}"] = json.loads(last)
            for precision in ("fp32", "bf16"):
                results[f"hvdtrain, {precision}"] = ours(
                    folder, number, 1, 8, short, SIZES, MPIRUN, precision=precision
                )
            add("2 ranks x 1 thread", results)
        if "scaling" in PARTS:
            results = {
                f"hvdtrain, fp32, {count}": ours(
                    folder, number, 1, batch, short, SIZES, MPIRUN if count != "1 rank" else None
                )
                for count, batch in (("1 rank", 8), ("2 ranks", 16))
            }
            add("weak scaling, 1 thread a rank", results)
        if "memory" in PARTS:
            data = store_rows(folder, "memory", LARGE, 50304, 4, 10)
            results = {"nanoGPT's way, fp32": plain(data, 2, 4, 10, way="nanogpt")}
            large = {**LARGE, "vocab_multiple": 50304}
            results["hvdtrain, fp32"] = ours(folder, number, 2, 4, 10, large, None)
            results["hvdtrain, bf16-weights"] = ours(folder, number, 2, 4, 10, large, None, precision="bf16-weights")
            add("vocabulary 50,304, context 1,024", results, "peak_mib")
    head = ["part", "way", "tokens/s", "ratio", "val loss", "share of ceiling", "outside", "peak MiB"]
    note = (
        f"6 x 384, vocabulary 8,192, context 256, {STEPS} steps of 8 sequences where nothing else is said. Rows, first "
        "weights and schedule are the same on both sides. tokens/s: of the others the median over intervals "
        "of 10 steps, of hvdtrain the mean over all but the first. Share of the measured ceiling of matrix products in "
        "the run's precision; outside: share of the time in neither forward, backward, sync nor optimizer."
    )
    print(table.write("engine", "The engine, side by side", "make bench BENCH=engine", head, rows, note))


if __name__ == "__main__":
    main()
