"""Break a training at a random moment, start it again, compare what it has made with an unbroken one; over and over.

make bench BENCH=chaos            TRIALS=200, SEED=1; needs root, for small disks; half a minute a trial on two cores

Trials that are done lie in runs/chaos-SEED.jsonl: the same command goes on, and more TRIALS add to them. What one does
is in tests/faults/chaos.py; a wrong trial's folder is kept beside that file.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from chaos import KINDS, STEPS, Record, run_trial, unbroken  # noqa: E402
from launch import prepare  # noqa: E402

TRIALS, SEED = int(os.environ.get("TRIALS", "200")), int(os.environ.get("SEED", "1"))
DONE = ROOT / "runs" / f"chaos-{SEED}.jsonl"
NAMES = list(KINDS)


def read() -> list[Record]:
    lines = DONE.read_text(encoding="utf-8").splitlines() if DONE.exists() else []
    return [Record(**json.loads(line)) for line in lines]


def run(records: list[Record]) -> None:
    """Make the trials that are not done yet; ``records`` grows."""
    DONE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder, reference = Path(name), None
        for number in sorted(set(range(TRIALS)) - {record.trial for record in records}):
            if reference is None:
                prepared = prepare(folder / "data")
                reference = unbroken(prepared, folder / "unbroken")
            place = folder / f"trial-{number}"
            place.mkdir()
            record = run_trial(NAMES[number % len(NAMES)], number, SEED, prepared, reference, place)
            records.append(record)
            with open(DONE, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
            if record.good:
                for path in sorted(place.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
            else:
                place.rename(DONE.with_name(f"chaos-{SEED}-trial-{number}"))
            verdict = "ok" if record.good else "WRONG"
            print(number, record.kind, record.exits, f"lost {record.lost}", f"{record.seconds} s", verdict, flush=True)


def main() -> None:
    records = read()
    run(records)
    rows = []
    for kind in [*NAMES, None]:
        mine = [record for record in records if kind in (record.kind, None)]
        exits = Counter(record.exits[0] for record in mine if record.exits)
        rows.append(
            [
                kind or "**all**",
                str(len(mine)),
                str(sum(record.asynchronous for record in mine)),
                ", ".join(f"{code} ({count})" for code, count in sorted(exits.items())) if kind else "",
                str(sum(len(record.exits) - 1 for record in mine)),
                str(sum(record.late for record in mine)),
                str(sum(record.lost for record in mine)),
                str(sum(bool(record.wrong) for record in mine)),
                str(sum(record.hangs for record in mine)),
            ]
        )
    head = ["fault", "trials", "saving beside", "exit (times)", "restarts", "came late", "steps made again"]
    print(
        table.write(
            "chaos",
            f"{len(records)} trainings that break at a random moment and are started again",
            f"make bench BENCH=chaos TRIALS={TRIALS} SEED={SEED}",
            [*head, "wrong", "hangs"],
            rows,
            f"Two ranks, {STEPS} steps, a checkpoint every 5, the last 3 kept; `saving beside`: with "
            "checkpoint.asynchronous. Right means: the same command has finished the run; sample digest, losses of "
            "all steps, validation loss, parameters and optimizer state are those of an unbroken run, to the bit; it "
            "went on from the newest checkpoint that nobody had damaged, and none that was there before the fault is "
            "gone; the exit code is the one that was promised; no process, no temporary file is left. `Hangs`: starts "
            "that did not end within 180 s. `Came late`: the run had ended before the fault; it counts as a trial.",
        )
    )
    for record in records:
        for wrong in record.wrong:
            print(f"trial {record.trial} ({record.kind}): {wrong}", file=sys.stderr)
    if not all(record.good for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
