"""Do memory, open files and threads stay as they are in a long run? Two trainings of two ranks, watched from outside.

make bench BENCH=soak            STEPS=2000; five minutes on two cores

One task whose batches are all alike, and one whose batches differ in shape with the length of their texts. Both
evaluate and save every 50 steps. Every second each rank's resident memory, open files and threads are read from /proc.
The first quarter of the steps is the warm-up; from there on the memory must stay within 2 %, the others the same.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from launch import DATA_PREP, HVDTRAIN, LAUNCHERS, Prepared, environment, prepare, succeed  # noqa: E402

STEPS = int(os.environ.get("STEPS", "2000"))
WORDS = (
    "eval.every=50",
    "checkpoint.every=50",
    "metrics.every=50",
    "metrics.tensorboard=false",
    f"train.steps={STEPS}",
)
LIMIT = 0.02


@dataclass(frozen=True)
class Look:
    """At one rank: seconds since the start, the step that was logged last, MiB, descriptors, threads."""

    second: float
    rank: int
    step: int
    mib: float
    files: int
    threads: int


def watched(words: tuple, run_dir: Path) -> list[Look]:
    """Train on two ranks and look at them every second."""
    command = [*LAUNCHERS["mpirun"], "2", *HVDTRAIN, "train", *words, "--run-dir", run_dir]
    looks: list[Look] = []
    with open(run_dir.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen([str(word) for word in command], env=environment(), stdout=log, stderr=log)
        try:
            began_s, pids = time.monotonic(), {}
            while process.poll() is None:
                time.sleep(1)
                pids = pids or ranks_of(process.pid)
                step = last_step(run_dir)
                for rank, pid in pids.items():
                    with suppress(OSError, KeyError):  # it has just ended
                        looks.append(Look(time.monotonic() - began_s, rank, step, *look(pid)))
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise SystemExit(run_dir.with_suffix(".log").read_text())
    return looks


def ranks_of(launcher: int) -> dict[int, int]:
    """Process of each rank, once both are there."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with suppress(OSError):
            for value in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if value.startswith(b"OMPI_COMM_WORLD_RANK="):
                    found[int(value.partition(b"=")[2])] = int(pid)
    return found if len(found) == 2 else {}


def look(pid: int) -> tuple[float, int, int]:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"])


def last_step(run_dir: Path) -> int:
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def labelled(folder: Path) -> tuple:
    """2,000 texts of 5 to 120 words with a label each, and how to train on them."""
    chance = random.Random(1)
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "lu") for b in ("ra", "sen", "to", "mi")]
    texts, tokenizer, out = folder / "texts.jsonl", folder / "tokenizer.json", folder / "shards"
    with open(texts, "w", encoding="utf-8") as file:
        for _ in range(2000):
            text = chance.choices(words, k=int(5 * 24 ** chance.random()))
            file.write(json.dumps({"text": " ".join(text), "label": "even" if len(text) % 2 else "odd"}) + "\n")
    special = ("--special", "cls", "sep", "pad")
    succeed("tokenizer", "--input", texts, "--vocab-size", 300, *special, "--out", tokenizer, program=DATA_PREP)
    made = ("labels", "--input", texts, "--tokenizer", tokenizer, "--val-fraction", 0.1, "--out", out)
    succeed(*made, program=DATA_PREP, timeout_s=600)
    sizes = ("model.layers=2", "model.heads=2", "model.width=64", "model.context=128")
    sizes += ("train.global_tokens=2048", "scaling.base_tokens=2048")
    return ("sst2", f"data.dir={out}", *sizes, *WORDS)


def plain(prepared: Prepared) -> tuple:
    return (prepared.recipe, "train.global_batch=16", "model.context=32", *WORDS)


def judge(looks: list[Look]) -> Iterator[list[str]]:
    """A row for each rank; the first quarter of the steps, with start and warm-up, is left out."""
    for rank in (0, 1):
        mine = [one for one in looks if one.rank == rank and one.step >= STEPS // 4 and one.step < STEPS]
        tenth = max(1, len(mine) // 10)
        first, last = (statistics.median(one.mib for one in part) for part in (mine[:tenth], mine[-tenth:]))
        files, threads = {one.files for one in mine}, {one.threads for one in mine}
        growth = last / first - 1
        steady = max(files) - min(files) <= 4 and max(threads) - min(threads) <= 1
        yield [
            str(rank),
            f"{first:.1f}",
            f"{last:.1f}",
            f"{100 * growth:+.2f} %",
            f"{min(files)} - {max(files)}",
            f"{min(threads)} - {max(threads)}",
            "flat" if abs(growth) <= LIMIT and steady else "**NOT FLAT**",
        ]


def draw(found: dict[str, list[Look]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rooms = pyplot.subplots(2, len(found), figsize=(11, 6), sharex="col", squeeze=False)
    for (upper, lower), (name, looks) in zip(rooms.T, found.items(), strict=True):
        for rank in (0, 1):
            mine = [one for one in looks if one.rank == rank]
            seconds = [one.second for one in mine]
            upper.plot(seconds, [one.mib for one in mine], label=f"rank {rank}")
            lower.plot(seconds, [one.files for one in mine], label=f"open files, rank {rank}")
            lower.plot(seconds, [one.threads for one in mine], "--", label=f"threads, rank {rank}")
        warm = next((one.second for one in looks if one.step >= STEPS // 4), 0)
        for room in (upper, lower):
            room.axvline(warm, color="grey", linewidth=0.8, linestyle=":")
            room.set_ylim(bottom=0)
            room.legend(fontsize=8)
        upper.set_title(f"{name}, {STEPS} steps; dotted: a quarter", fontsize=10)
        upper.set_ylabel("resident memory (MiB)")
        lower.set_ylabel("number")
        lower.set_xlabel("seconds since the start")
    figure.tight_layout()
    figure.savefig(table.RESULTS / "soak.png", dpi=110)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "labels").mkdir()
        runs = {
            "batches alike (lm)": lambda: plain(prepare(folder / "text")),
            "batches of changing shape (classify)": lambda: labelled(folder / "labels"),
        }
        found = {kind: watched(words(), folder / f"run-{number}") for number, (kind, words) in enumerate(runs.items())}
    rows = [[kind, *row] for kind, looks in found.items() for row in judge(looks)]
    draw(found)
    head = ["task", "rank", "MiB after a quarter", "MiB at the end", "growth", "open files", "threads", "verdict"]
    note = (
        f"{STEPS} steps with evaluation and a checkpoint every 50, looked at every second; the growth is that of the "
        "median of the last tenth over the first tenth of the time from step "
        f"{STEPS // 4} on; flat: within {100 * LIMIT:.0f} %, files and threads the same but for those of a save. "
        "![soak](soak.png)"
    )
    print(table.write("soak", "Memory, files and threads of a long run", "make bench BENCH=soak", head, rows, note))
    if any("NOT" in row[-1] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
