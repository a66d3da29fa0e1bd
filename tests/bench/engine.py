"""The engine against what a user would otherwise pick: same model, weights, rows, batch and threads, ways in turn.

    make bench BENCH=engine            PARTS="one ranks link hf scaling loss memory" chooses; ROUNDS=3 STEPS=40

Parts that are not chosen stay in the table as they are, if they were measured on this machine.

one       a GPT of 6 x 384, vocabulary 8,192, context 256, 8 sequences on two threads: nanoGPT's way against ours.
          Eager or compiled, fused AdamW or not: each is tried once, the fastest of a precision takes turns with ours
ranks     the same on two ranks of one thread: torch's DDP over gloo against ours
link      the same two ranks on two hosts of this machine with 1 Gbit/s between them (root): MPI and gloo over TCP
hf        two ranks under Hugging Face's Trainer; HF_PYTHON: a Python with transformers, accelerate, hvdtrain
scaling   one rank of one thread with 8 sequences, two with 16
loss      validation loss after 300 steps, nanoGPT's way and ours: once, no speed
memory    vocabulary 50,304, context 1,024: peak memory of a whole process, once

A way's speed in a round is the median over intervals of 10 steps without the first. Its ratio to another way is that of
the same round; the table has the median over the rounds, and the least and the most.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import table
import yaml

from hvdtrain.machine.hosts import Network
from hvdtrain.machine.link import Link, slow_link

HOSTS = ("n1", "n2")
WAYS = Path(__file__).parent / "ways"
STEPS, ROUNDS = int(os.environ.get("STEPS", "40")), int(os.environ.get("ROUNDS", "3"))
LONG = 300
TITLES = {
    "one": "1 rank x 2 threads",
    "ranks": "2 ranks x 1 thread",
    "link": "2 ranks x 1 thread, 1 Gbit/s",
    "hf": "2 ranks x 1 thread, Trainer",
    "scaling": "weak scaling, 1 thread a rank",
    "loss": f"{LONG} steps",
    "memory": "vocabulary 50,304, context 1,024",
}
PARTS = os.environ.get("PARTS", " ".join(TITLES)).split()
COMMAND = "make bench BENCH=engine"
SIZES = {"layers": 6, "heads": 6, "width": 384, "context": 256, "bias": False}
LARGE = {"layers": 4, "heads": 6, "width": 384, "context": 1024, "bias": False}
LR = 1e-3
MPIRUN = ["mpirun", "-np", "2", "--bind-to", "none"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
HF_PYTHON = os.environ.get("HF_PYTHON", sys.executable)

Found = Mapping[str, Any]  # rates: tokens/s of each interval; val_loss, peak_mib, mfu, outside: where they are known
Way = Callable[[], Found]  # one run


@dataclass
class Ways:
    """What takes turns in a part. base: of a way the one that it is compared with; without one it is a base itself."""

    part: str
    ways: dict[str, Way] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)


def in_turn(part: Ways) -> Iterator[list[str]]:
    """Rows of the table."""
    found: dict[str, list[Found]] = {name: [] for name in part.ways}
    for _ in range(ROUNDS):
        for name, way in part.ways.items():
            found[name].append(way())
            print(f"{part.part}: {name}: {speed(found[name][-1]):,.0f}", flush=True)
    for name, runs in found.items():
        base = part.base.get(name)
        ratios = [speed(run) / speed(other) for run, other in zip(runs, found[base], strict=True)] if base else []
        yield [
            part.part,
            name,
            f"{statistics.median(map(speed, runs)):,.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if base else "1",
            base or "",
            *facts(runs),
        ]


def speed(found: Found) -> float:
    return statistics.median(found["rates"])


def facts(runs: list[Found]) -> list[str]:
    """Of several runs of a way: share of the ceiling and outside (medians), validation loss, most memory."""

    def median(name: str, form: str) -> str:
        values = [run[name] for run in runs if run.get(name) is not None]
        return format(statistics.median(values), form) if values else ""

    peaks = [run["peak_mib"] for run in runs if run.get("peak_mib")]
    return [
        median("mfu", ".0%"),
        median("outside", ".1%"),
        median("val_loss", ".4f"),
        f"{max(peaks):,}" if peaks else "",
    ]


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


def plain(folder: Path, threads: int, rows: int, steps: int, launcher: list[str] | None = None, **words) -> Found:
    """One run of `ways/plain_train.py`."""
    settings = {"folder": str(folder), "threads": threads, "rows": rows, "steps": steps, "lr": LR}
    settings |= {"warmup": warmup(steps), **words}
    command = [*(launcher or [sys.executable]), str(WAYS / "plain_train.py"), json.dumps(settings)]
    return json.loads(run(command, threads).strip().splitlines()[-1])


def ddp_over_link(network: Network, folder: Path, rows: int, steps: int, **words) -> Found:
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


def hugging_face(folder: Path, **words) -> Found:
    """One run of `ways/hf_train.py` on two ranks."""
    torchrun = [HF_PYTHON, *TORCHRUN[1:], str(WAYS / "hf_train.py")]
    settings = {"folder": str(folder), "rows": 8, "steps": STEPS, "threads": 1, **words}
    printed = run([*torchrun, json.dumps(settings)], 1).splitlines()
    return json.loads(next(line for line in reversed(printed) if line.startswith('{"')))


RUNS = count(1)


def ours(
    folder: Path, threads: int, rows: int, launcher: list[str] | None = None, steps: int = STEPS, **settings
) -> Found:
    """One run of `hvdtrain train`."""
    recipe = {
        "seed": 1,
        "data": {"dir": str(folder / "data")},
        "model": SIZES,
        "train": {"steps": steps, "global_batch": rows},
        "eval": {"every": 0, "rows": 8},
        "checkpoint": {"every": 0},
        "metrics": {"every": min(10, steps // 2), "tensorboard": False, "mfu": "measure"},
        "optim": {"lr": LR},
        "schedule": {"warmup_steps": warmup(steps), "min_lr": LR / 10},
        **settings,
    }
    run_dir = folder / f"run-{next(RUNS)}"
    path = run_dir.with_suffix(".yaml")
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
    return {
        "rates": [line["tokens_per_s"] for line in lines],
        "val_loss": summary["val_loss"],
        "mfu": summary.get("mfu"),
        "peak_mib": summary["memory_peak_mib"],
        "outside": outside / (outside + inside),
    }


def fastest(data: Path, bf16: bool) -> tuple[str, dict]:
    """Of nanoGPT's ways in a precision: its name and words. One short run of each."""
    choices = {}
    for is_compiled in (False, True):
        for is_fused in (False, True):
            name = [
                "nanoGPT's way",
                "bf16 autocast" if bf16 else "fp32",
                *["compiled"] * is_compiled,
                *["fused AdamW"] * is_fused,
            ]
            words = {"way": "nanogpt", "bf16": bf16, "compile": is_compiled, "fused": is_fused}
            choices[", ".join(name)] = words, speed(plain(data, 2, 8, 20, **words))
            print(f"trial: {', '.join(name)}: {choices[', '.join(name)][1]:,.0f}", flush=True)
    best = max(choices, key=lambda name: choices[name][1])
    return best, choices[best][0]


def one(folder: Path) -> Ways:
    data = store_rows(folder, "one", SIZES, 8192, 8, STEPS)
    part = Ways(TITLES["one"])
    for bf16, precisions in ((False, ("fp32",)), (True, ("bf16", "bf16-weights"))):
        name, words = fastest(data, bf16)
        part.ways[name] = lambda words=words: plain(data, 2, 8, STEPS, **words)
        for precision in precisions:
            part.ways[f"hvdtrain, {precision}"] = lambda precision=precision: ours(folder, 2, 8, precision=precision)
            part.base[f"hvdtrain, {precision}"] = name
    return part


def ranks(folder: Path) -> Ways:
    data = store_rows(folder, "ranks", SIZES, 8192, 8, STEPS)
    fp32, bf16 = "torch DDP, gloo, same model and matrix library", "torch DDP, gloo, same model, bf16 autocast"
    return Ways(
        TITLES["ranks"],
        {
            fp32: lambda: plain(data, 1, 8, STEPS, TORCHRUN, way="ddp", fused=True, own_matmul=True),
            "hvdtrain, fp32": lambda: ours(folder, 1, 8, MPIRUN),
            bf16: lambda: plain(data, 1, 8, STEPS, TORCHRUN, way="ddp", fused=True, bf16=True),
            "hvdtrain, bf16": lambda: ours(folder, 1, 8, MPIRUN, precision="bf16"),
        },
        {"hvdtrain, fp32": fp32, "hvdtrain, bf16": bf16},
    )


def over_link(folder: Path, network: Network, mpirun: list[str]) -> Ways:
    data = store_rows(folder, "link", SIZES, 8192, 8, STEPS)
    over = [*mpirun, "-np", "2", "--bind-to", "none", "-x", "OMP_NUM_THREADS"]
    fp32 = "torch DDP, gloo, same model and matrix library"
    bf16 = "torch DDP, gloo, same model, bf16 autocast, fp16 gradients"

    def of_ours(precision: str, wire: str) -> Found:
        return ours(folder, 1, 8, over, precision=precision, sync={"allreduce": {"wire": wire}})

    return Ways(
        TITLES["link"],
        {
            fp32: lambda: ddp_over_link(network, data, 8, STEPS, fused=True, own_matmul=True),
            "hvdtrain, fp32, wire fp32": lambda: of_ours("fp32", "fp32"),
            "hvdtrain, fp32, wire bf16": lambda: of_ours("fp32", "bf16"),
            bf16: lambda: ddp_over_link(network, data, 8, STEPS, fused=True, bf16=True, fp16_gradients=True),
            "hvdtrain, bf16, wire bf16": lambda: of_ours("bf16", "bf16"),
        },
        {
            "hvdtrain, fp32, wire fp32": fp32,
            "hvdtrain, fp32, wire bf16": fp32,
            "hvdtrain, bf16, wire bf16": bf16,
        },
    )


def against_hf(folder: Path) -> Ways:
    data = store_rows(folder, "hf", SIZES, 8192, 8, STEPS)
    part = Ways(TITLES["hf"])
    for precision in ("fp32", "bf16"):
        name, is_bf16 = f"Hugging Face Trainer, gloo, {precision}", precision == "bf16"
        part.ways[name] = lambda is_bf16=is_bf16: hugging_face(data, bf16=is_bf16)
        part.ways[f"hvdtrain, {precision}"] = lambda precision=precision: ours(
            folder, 1, 8, MPIRUN, precision=precision
        )
        part.base[f"hvdtrain, {precision}"] = name
    return part


def weak_scaling(folder: Path) -> Ways:
    return Ways(
        TITLES["scaling"],
        {
            "hvdtrain, fp32, 1 rank": lambda: ours(folder, 1, 8),
            "hvdtrain, fp32, 2 ranks": lambda: ours(folder, 1, 16, MPIRUN),
        },
        {"hvdtrain, fp32, 2 ranks": "hvdtrain, fp32, 1 rank"},
    )


def once(part: str, ways: Mapping[str, Way]) -> Iterator[list[str]]:
    """Rows of ways that no speed is asked of."""
    for name, way in ways.items():
        found = way()
        print(f"{part}: {name}: {found}", flush=True)
        yield [part, name, "", "", "", *facts([found])]


def losses(folder: Path) -> Iterator[list[str]]:
    data = store_rows(folder, "loss", SIZES, 8192, 8, LONG)
    ways: dict[str, Way] = {
        "nanoGPT's way, fp32": lambda: plain(data, 2, 8, LONG, way="nanogpt", evaluate=True),
        "nanoGPT's way, bf16 autocast": lambda: plain(data, 2, 8, LONG, way="nanogpt", bf16=True, evaluate=True),
    }
    for precision in ("fp32", "bf16", "bf16-weights"):
        ways[f"hvdtrain, {precision}"] = lambda precision=precision: ours(folder, 2, 8, steps=LONG, precision=precision)
    return once(TITLES["loss"], ways)


def memory(folder: Path) -> Iterator[list[str]]:
    data = store_rows(folder, "memory", LARGE, 50304, 4, 10)
    large = {**LARGE, "vocab_multiple": 50304}
    ways: dict[str, Way] = {"nanoGPT's way, fp32": lambda: plain(data, 2, 4, 10, way="nanogpt")}
    for precision in ("fp32", "bf16-weights"):
        ways[f"hvdtrain, {precision}"] = lambda precision=precision: ours(
            folder, 2, 4, steps=10, precision=precision, model=large
        )
    return once(TITLES["memory"], ways)


def link(folder: Path) -> Iterator[list[str]]:
    with slow_link(HOSTS, Link(1e9), folder) as (network, mpirun):
        yield from in_turn(over_link(folder, network, mpirun))


def hf(folder: Path) -> Iterator[list[str]]:
    if not subprocess.call([HF_PYTHON, "-c", "import accelerate"], stderr=subprocess.DEVNULL):
        yield from in_turn(against_hf(folder))


MEASURED: Mapping[str, Callable[[Path], Iterator[list[str]]]] = {
    "one": lambda folder: in_turn(one(folder)),
    "ranks": lambda folder: in_turn(ranks(folder)),
    "link": link,
    "hf": hf,
    "scaling": lambda folder: in_turn(weak_scaling(folder)),
    "loss": losses,
    "memory": memory,
}


def main() -> None:
    head = ["part", "way", "tokens/s", "ratio", "to", "share of ceiling", "outside", "val loss", "peak MiB"]
    kept = table.kept("engine", COMMAND, head)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        rows = []
        for part, title in TITLES.items():
            rows += MEASURED[part](folder) if part in PARTS else [row for row in kept if row[0] == title]
    note = (
        f"6 x 384, vocabulary 8,192, context 256, {STEPS} steps of 8 sequences where nothing else is said. Rows, first "
        f"weights and schedule are the same on both sides. {ROUNDS} rounds, the ways in turn: tokens/s, medians over "
        "intervals of 10 steps and then over rounds; ratio, of the same round: median (least to most). Share of the "
        "measured ceiling of matrix products in the run's precision; outside: share of the time in neither forward, "
        "backward, sync nor optimizer."
    )
    print(table.write("engine", "The engine, side by side", COMMAND, head, rows, note))


if __name__ == "__main__":
    main()
