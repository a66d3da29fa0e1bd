"""Break a training at a random moment, start it again, compare what it has made with an unbroken one; over and over.

make bench BENCH=chaos            TRIALS=200, SEED=1; needs root, for small disks; half a minute a trial on two cores
make bench BENCH=chaos MODES=all  the same of every way to agree, TRIALS of each; or of some: MODES="gossip topk"

Trials that are done lie in runs/chaos-SEED.jsonl: the same command goes on, and more TRIALS add to them. What one does
is in tests/faults/chaos.py, the modes are in tests/modes.py; a wrong trial's folder is kept beside that file.
"""

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from chaos import KINDS, STEPS, Record, run_trial, unbroken  # noqa: E402
from launch import prepare  # noqa: E402
from modes import ALL  # noqa: E402

TRIALS, SEED = int(os.environ.get("TRIALS", "200")), int(os.environ.get("SEED", "1"))
ASKED = os.environ.get("MODES", "allreduce").split()
OF_MODES = list(ALL) if ASKED == ["all"] else ASKED
DONE = ROOT / "runs" / f"chaos-{SEED}.jsonl"
NAMES = list(KINDS)


def read() -> list[Record]:
    lines = DONE.read_text(encoding="utf-8").splitlines() if DONE.exists() else []
    return [Record(**json.loads(line)) for line in lines]


def run(records: list[Record]) -> None:
    """Make the trials that are not done yet; ``records`` grows."""
    DONE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder, references = Path(name), dict[str, Path]()
        done = {(record.trial, record.mode) for record in records}
        for number, mode in (pair for pair in product(range(TRIALS), OF_MODES) if pair not in done):
            if not references:
                prepared = prepare(folder / "data")
            if mode not in references:
                references[mode] = unbroken(prepared, folder / f"unbroken-{mode}", mode)
            place = folder / f"trial-{mode}-{number}"
            place.mkdir()
            kind = NAMES[(number + list(ALL).index(mode)) % len(NAMES)]  # few trials of many modes are of all kinds
            record = run_trial(kind, number, SEED, prepared, references[mode], place, mode)
            records.append(record)
            with open(DONE, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
            if record.good:
                for path in sorted(place.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
            else:
                shutil.move(place, DONE.with_name(f"chaos-{SEED}-{place.name}"))
            verdict = "ok" if record.good else "WRONG"
            told = f"lost {record.lost}", f"{record.seconds} s", verdict
            print(number, mode, record.kind, record.exits, *told, flush=True)


def row_of(name: str, records: list[Record], exits: bool = True) -> list[str]:
    codes = Counter(record.exits[0] for record in records if record.exits)
    return [
        name,
        str(len(records)),
        str(sum(record.asynchronous for record in records)),
        ", ".join(f"{code} ({count})" for code, count in sorted(codes.items())) if exits else "",
        str(sum(len(record.exits) - 1 for record in records)),
        str(sum(record.late for record in records)),
        str(sum(record.lost for record in records)),
        str(sum(bool(record.wrong) for record in records)),
        str(sum(record.hangs for record in records)),
    ]


def main() -> None:
    known = read()
    run(known)
    records = [record for record in known if record.mode in OF_MODES]
    by_mode = len(OF_MODES) > 1
    groups = OF_MODES if by_mode else NAMES
    rows = [row_of(name, [r for r in records if name == (r.mode if by_mode else r.kind)]) for name in groups]
    rows.append(row_of("**all**", records, exits=by_mode))
    head = ["way to agree" if by_mode else "fault", "trials", "saving beside", "exit (times)", "restarts"]
    chosen = "" if ASKED == ["allreduce"] else f" MODES='{' '.join(ASKED)}'"
    print(
        table.write(
            "chaos-modes" if by_mode else "chaos" if not chosen else f"chaos-{OF_MODES[0]}",
            f"{len(records)} trainings that break at a random moment and are started again",
            f"make bench BENCH=chaos TRIALS={TRIALS} SEED={SEED}{chosen}",
            [*head, "came late", "steps made again", "wrong", "hangs"],
            rows,
            f"Two ranks (server-racing: three), {STEPS} steps, a checkpoint every 5, the last 3 kept; `saving beside`: "
            "with checkpoint.asynchronous. Right means: the same command has finished the run; sample digest, losses "
            "of all steps, validation loss, parameters, optimizer state and what the ranks keep to agree are those of "
            "an unbroken run, to the bit (of server-racing the digest, the steps, and the losses within 5 %); it went "
            "on from the newest checkpoint that nobody had damaged, and none that was there before the fault is gone; "
            "the exit code is the one that was promised; no process, no temporary file is left. `Hangs`: starts that "
            "did not end within 180 s. `Came late`: the run had ended before the fault; it counts as a trial.",
        )
    )
    for record in records:
        for wrong in record.wrong:
            print(f"trial {record.trial} ({record.mode}, {record.kind}): {wrong}", file=sys.stderr)
    if not all(record.good for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
