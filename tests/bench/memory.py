"""Planned memory beside the measured peak: every way to agree, every cut, precision and optimizer, on 2 and 4 ranks.

make bench BENCH=memory         RANKS=2,4 ONLY=ZeRO choose; KEEP=folder goes on where it stopped; 20 minutes

planned    what `hvdtrain plan` says of the rank that holds most
measured   the most resident memory that a rank had in a run of two steps, an evaluation and a save: the optimizer has
           its state from the first step on, and replicas that went apart meet in the second

Python and its libraries take some 370 MiB of every rank, whatever is trained. So that they do not hide an error, the
models are larger than that, each in what the ways differ in: ``WIDE`` in weights (a copy of them is 186 MiB), ``DEEP``
in activations. The last column leaves the libraries out on both sides.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from launch import DATA_PREP, prepare, succeed, summary  # noqa: E402

RANKS = [int(number) for number in os.environ.get("RANKS", "2,4").split(",")]
ONLY = os.environ.get("ONLY", "")
LIMIT = 0.1
_MIB = 1 << 20

RUN = ("train.steps=2", "schedule.warmup_steps=1", "scaling.rule=none", "scaling.base_batch=0", "eval.every=0")
RUN += ("checkpoint.every=0", 'metrics.mfu="off"', "device=cpu")
WIDE = ("model.layers=6", "model.width=768", "model.heads=12", "model.context=64", "model.vocab_multiple=8192")
WIDE += ("train.microbatch=1", "eval.rows=1")  # and two rows a rank: see words_of
DEEP = ("model.layers=16", "model.width=128", "model.heads=4", "model.context=256", "model.vocab_multiple=8192")
DEEP += ("train.global_batch=16", "train.microbatch=4", "eval.rows=2")

LOCAL, GOSSIP, SERVER = "sync.name=local_sgd", "sync.name=gossip", "sync.name=parameter_server"
ZERO = "sync.name=zero"
AGREEING: dict[str, tuple[str, ...]] = {
    "all-reduce": (),
    "all-reduce, bf16 wire": ("sync.allreduce.wire=bf16",),
    "Adasum": ("sync.allreduce.combine=adasum",),
    "ZeRO 1": (ZERO,),
    "ZeRO 1, bf16 wire": (ZERO, "sync.zero.wire=bf16"),
    "ZeRO 2": (ZERO, "sync.zero.stage=2"),
    "PowerSGD": ("sync.name=powersgd",),
    "signs": ("sync.name=sign", "optim.name=sgd", "optim.momentum=0", "optim.clip_norm=0", "optim.lr=3e-4"),
    "top-k": ("sync.name=topk",),
    "local SGD": (LOCAL, "sync.local_sgd.every=2"),
    "DiLoCo": (LOCAL, "sync.local_sgd.every=2", "sync.local_sgd.outer=nesterov"),
    "gossip": (GOSSIP,),
    "gossip, ring": (GOSSIP, "sync.gossip.topology=ring"),
    "gossip, push": (GOSSIP, "sync.gossip.push=true"),
    "soup": ("sync.name=average", "sync.average.fuse=soup"),
    "server on all ranks": (SERVER,),
    "server apart": (SERVER, "sync.parameter_server.servers=1"),
    "asynchronous server": (SERVER, "sync.parameter_server.servers=1", "sync.parameter_server.mode=asynchronous"),
}
COMPUTING: dict[str, tuple[str, ...]] = {
    "LAMB": ("optim.name=lamb",),
    "LARS": ("optim.name=lars",),
    "SGD": ("optim.name=sgd",),
    "Muon": ("optim.name=muon",),
    "Muon, ZeRO 1": ("optim.name=muon", ZERO),
    "bf16": ("precision=bf16",),
    "fp16": ("precision=fp16",),
    "bf16-weights": ("precision=bf16-weights",),
    "bf16-weights, ZeRO 1": ("precision=bf16-weights", ZERO),
    "bf16-weights, ZeRO 2": ("precision=bf16-weights", ZERO, "sync.zero.stage=2"),
    "averaged weights": ("ema.decay=0.99",),
    "saves beside training": ("checkpoint.asynchronous=true", "checkpoint.every=1"),
}
SCHEDULES: dict[str, tuple[str, ...]] = {
    name: (f"cut.schedule={name}", *(("cut.stages_per_rank=2",) if name == "interleaved" else ()))
    for name in ("gpipe", "1f1b", "interleaved", "zero_bubble")
}
RECOMPUTED = "recompute.name=full"


class Way(NamedTuple):
    model: str
    name: str
    words: tuple[str, ...]


def ways(ranks: int) -> Iterator[Way]:
    for name, words in {**AGREEING, **COMPUTING}.items():
        yield Way("wide", name, words)
    for name, more in {"": (), ", Muon": ("optim.name=muon",), ", ZeRO 1": (ZERO,)}.items():
        for axis in ("tensor", "pipeline"):
            yield Way("wide", f"{axis} 2{name}", (f"mesh.{axis}=2", *more))
    yield Way("deep", "whole", ())
    yield Way("deep", "whole, recomputed", (RECOMPUTED,))
    yield Way("deep", "whole, recomputed where cheap", ("recompute.name=selective",))
    for size in (2, ranks) if ranks > 2 else (2,):
        yield Way("deep", f"tensor {size}", (f"mesh.tensor={size}",))
        yield Way("deep", f"tensor {size}, whole stream", (f"mesh.tensor={size}", "cut.sequence=false"))
        for name, words in SCHEDULES.items():
            yield Way("deep", f"pipeline {size}, {name}", (f"mesh.pipeline={size}", *words))
    yield Way("deep", "pipeline 2, recomputed", ("mesh.pipeline=2", RECOMPUTED))
    yield Way("deep", "pipeline 2, bf16-weights", ("mesh.pipeline=2", "precision=bf16-weights"))
    if ranks == 4:
        for name, words in SCHEDULES.items():
            yield Way("deep", f"tensor 2, pipeline 2, {name}", ("mesh.tensor=2", "mesh.pipeline=2", *words))


def words_of(way: Way, ranks: int, data: Path) -> list[str]:
    workers = ranks - ("sync.parameter_server.servers=1" in way.words)
    model = DEEP if way.model == "deep" else (*WIDE, f"train.global_batch={2 * workers}")
    return [*model, *RUN, *way.words, f"data.dir={data}"]


def planned(words: list[str], ranks: int) -> dict:
    from hvdtrain.config import load_config
    from hvdtrain.planner.estimate import estimate

    return estimate(load_config("shakespeare-char", words), ranks).memory.parts


def measured(words: list[str], ranks: int, run_dir: Path) -> float:
    """MiB."""
    try:
        succeed("train", "shakespeare-char", *words, "--run-dir", run_dir, how="mpirun", ranks=ranks, timeout_s=900)
        return float(summary(run_dir)["memory_peak_mib"])
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def look(folder: Path) -> Iterator[dict]:
    data, kept = folder / "shards", folder / "found.json"
    if not (data / "manifest.json").exists():
        made, few = prepare(folder / "prepared"), ("--val-split", "tail", "--val-fraction", 0.01)
        text = ("text", "--input", made.corpus, "--tokenizer", made.tokenizer, *few, "--out", data)
        succeed(*text, program=DATA_PREP)
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for ranks in RANKS:
        for way in ways(ranks):
            key = f"{ranks} {way.model} {way.name}"
            if ONLY not in key:
                continue
            words = words_of(way, ranks, data)
            if key not in found:
                found[key] = measured(words, ranks, folder / "run")
                kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
            parts = {name: size / _MIB for name, size in planned(words, ranks).items()}
            yield {"ranks": ranks, "way": way, "measured": found[key], "parts": parts}


def row_of(one: dict) -> list[str]:
    way, most, told = one["way"], one["measured"], sum(one["parts"].values())
    of_libraries = one["parts"]["process"]
    ratio, own = told / most, (told - of_libraries) / (most - of_libraries)
    said = f"{ratio:.3f}" if abs(ratio - 1) <= LIMIT else f"**{ratio:.3f}**"
    return [str(one["ranks"]), way.model, way.name, f"{told:,.0f}", f"{most:,.0f}", said, f"{own:.3f}"]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("KEEP", name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for one in look(folder):
            rows.append(row_of(one))
            print("  ".join(rows[-1]), {name: round(mib) for name, mib in one["parts"].items() if mib >= 1}, flush=True)
    off = sum("**" in row[5] for row in rows)
    note = (
        f"{len(rows)} runs of two steps, an evaluation and a save; {off} are off by more than {LIMIT:.0%}. wide: 6 "
        "layers of 768, two rows of 64 tokens a rank, one at a time; deep: 16 layers of 128, a batch of 16 rows of "
        "256 tokens, four at a time; AdamW and fp32 but where it says otherwise."
    )
    head = ["ranks", "model", "way", "planned MiB", "measured MiB", "planned / measured", "without the libraries"]
    print(table.write("memory", "Planned memory and the measured peak", "make bench BENCH=memory", head, rows, note))
    if off:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
