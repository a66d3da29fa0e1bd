"""A thousand damaged or hostile configurations, as many shards, as many checkpoints: what becomes of each?

make bench BENCH=fuzz            MUTANTS=1000, SEED=1; ten minutes on two cores

What a mutant is, and when it is right, is in tests/faults/fuzzing.py.
"""

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import fuzzing  # noqa: E402
from fuzzing import REFUSED, RIGHT, judged  # noqa: E402

MUTANTS, SEED = int(os.environ.get("MUTANTS", "1000")), int(os.environ.get("SEED", "1"))


def config(chance: random.Random, sound: Path, folder: Path) -> str:
    return judged(fuzzing.judge_config, folder, fuzzing.mutate_config(chance, folder))


def shards(chance: random.Random, sound: Path, folder: Path) -> str:
    kind, is_sealed = fuzzing.mutate_shards(chance, sound, folder)
    return judged(fuzzing.judge_shards, sound / kind, folder, is_sealed)


def run(chance: random.Random, sound: Path, folder: Path) -> str:
    return judged(fuzzing.judge_checkpoint, sound, folder, fuzzing.mutate_checkpoint(chance, sound, folder))


KINDS: dict[str, tuple[Callable[[random.Random, Path, Path], str], Callable[[Path], None]]] = {
    "recipes and overrides": (config, lambda folder: None),
    "shards, their manifests and tokenizers": (shards, fuzzing.write_sound_corpora),
    "checkpoints: parts and manifests": (run, fuzzing.write_sound_run),
}


def main() -> None:
    rows, wrong = [], []
    for kind, (judge, prepare) in KINDS.items():
        counts: Counter[str] = Counter()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            sound, folder = Path(name, "sound"), Path(name, "mutant")
            sound.mkdir()
            prepare(sound)
            for number in range(MUTANTS):
                folder.mkdir()
                verdict = judge(random.Random(f"{SEED} {kind} {number}"), sound, folder)
                shutil.rmtree(folder)
                counts[verdict if verdict in (RIGHT, REFUSED) else "wrong"] += 1
                if verdict not in (RIGHT, REFUSED):
                    wrong.append(f"{kind}, {number}: {verdict}")
                    print(wrong[-1], file=sys.stderr, flush=True)
        rows.append([kind, str(MUTANTS), str(counts[RIGHT]), str(counts[REFUSED]), str(counts["wrong"])])
        print(rows[-1], flush=True)
    note = (
        "Right: what was loaded is what the file says, found in another way; where the digests were not made to fit, "
        "it is what was written. Refused: by an error of our own of one line. Wrong: other content, another error, a "
        f"crash, or no answer within {fuzzing.LIMIT_S} s. Each is judged in a process of its own; of shards also "
        "without a look at the digests, where other numbers are right but a crash is not. Seed "
        f"{SEED}."
    )
    head = ["files", "mutants", "loaded right", "refused", "wrong"]
    command = f"make bench BENCH=fuzz MUTANTS={MUTANTS} SEED={SEED}"
    print(table.write("fuzz", "Damaged and hostile files", command, head, rows, note))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
