"""Preparation end to end (text files in the page cache -> verified shards) against the raw speed of the encoders.

    python tests/bench/prepare.py [FOLDER...]      default: this Python's own library and packages, *.py

Whole processes are timed: start, reading, checking that it is UTF-8, digests, encoding, writing, flushing to disk, and
`data_prep verify` after it. `tokenizers` is timed inside one process, on text that is in memory already, and only for a
part of the corpus: it would take minutes.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from table import write
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENCODE_BYTES = 12_000_000
VOCAB_SIZE = 32768
ROUNDS = 3
REPEATS = 8


def run(command: list[str], threads: int) -> float:
    """Wall seconds of a command, with so many threads a process."""
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - started


def prepare(ranks: int, threads: int, source: list[str], tokenizer: Path, out: Path) -> float:
    launcher = ["mpirun", "-np", str(ranks), "--bind-to", "none"] if ranks > 1 else []
    python = [*launcher, sys.executable, "-m", "data_prep"]
    text = [*python, "text", *source, "--tokenizer", str(tokenizer), "--out", str(out), "--shard-tokens", str(1 << 24)]
    return run(text, threads) + run([*python, "verify", str(out)], threads)


def corpus_of(folders: list[str]) -> tuple[list[str], list[Path]]:
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py") if file.is_file())
    return ["--input", *folders, "--glob", "*.py", "--invalid-utf8", "replace"], files


def encode_speed(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bytes a second of ``encode_batch_fast``."""
    size = sum(len(text.encode()) for text in texts)
    started = time.perf_counter()
    for start in range(0, len(texts), 64):
        tokenizer.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
    return size / (time.perf_counter() - started)


def encode_rate(tokenizer: Path, texts: list[str], threads: int) -> float:
    """``encode_speed`` in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import json, prepare; "
        "from tokenizers import Tokenizer; path, texts = json.load(sys.stdin); "
        "print(prepare.encode_speed(Tokenizer.from_file(path), texts))"
    )
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    words = json.dumps([str(tokenizer), texts])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, input=words, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def fresh_page_rates(folder: Path, size: int = 1 << 28) -> list[float]:
    """Bytes a second into a new file, and into the same file again: what fresh pages of memory cost on this machine."""
    rates, block = [], bytes(1 << 23)
    with open(folder / "pages", "wb") as file:
        for _ in range(2):
            file.seek(0)
            started = time.perf_counter()
            for _ in range(size // len(block)):
                file.write(block)
            rates.append(size / (time.perf_counter() - started))
    return rates


def main() -> None:
    folders = sys.argv[1:] or [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    many, files = corpus_of(folders)
    texts, size = [], 0
    for file in files[:: max(1, len(files) // 900)]:
        if size < ENCODE_BYTES:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
            size += len(texts[-1])
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "one.txt", "wb") as one:  # and so all is in the page cache
            for _ in range(REPEATS):
                for file in files:
                    one.write(file.read_bytes())
        total = (folder / "one.txt").stat().st_size
        tokenizer = folder / "tokenizer.json"
        train = ["tokenizer", *many, "--vocab-size", str(VOCAB_SIZE), "--sample-mb", "16", "--out", str(tokenizer)]
        run([sys.executable, "-m", "data_prep", *train], 2)
        corpora = {
            f"{len(files):,} files": (many, total // REPEATS),
            "one file": (["--input", str(folder / "one.txt"), "--invalid-utf8", "replace"], total),
        }
        fresh, again = (rate / 1e6 for rate in fresh_page_rates(folder))
        for _ in range(ROUNDS):
            for threads in (1, 2):
                rates.setdefault(f"tokenizers, {threads} threads", []).append(encode_rate(tokenizer, texts, threads))
            for corpus, (source, corpus_bytes) in corpora.items():
                for ranks, threads in ((1, 1), (2, 1), (1, 2)):
                    seconds = prepare(ranks, threads, source, tokenizer, folder / "out")
                    shutil.rmtree(folder / "out")
                    way = f"data_prep, {corpus}, {ranks} ranks x {threads} threads"
                    rates.setdefault(way, []).append(corpus_bytes / seconds)
    speed = {way: statistics.median(values) / 1e6 for way, values in rates.items()}
    rows = []
    for way, rate in speed.items():
        cores = 1 if way.endswith(("1 ranks x 1 threads", "tokenizers, 1 threads")) else 2
        one_core = speed[way.rpartition(",")[0] + (", 1 ranks x 1 threads" if "data_prep" in way else ", 1 threads")]
        cells = [rate, rate / speed[f"tokenizers, {cores} threads"], rate / one_core]
        rows.append([way, f"{cells[0]:.1f}", f"{cells[1]:.1f}", f"{cells[2]:.2f}"])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    note = (
        f"{total / REPEATS / 1e6:.0f} MB in {len(files):,} files; the one file is all of them {REPEATS} times over, "
        f"{total / 1e6:.0f} MB. Byte-level BPE of {VOCAB_SIZE:,}. data_prep is `text` and then `verify`, two whole "
        f"processes for each rank; tokenizers is `encode_batch_fast` alone, on text in memory. Median of {ROUNDS} "
        f"rounds, the ways in turn. Highest memory of a process: {peak:,.0f} MiB. This machine "
        f"writes {fresh:,.0f} MB/s into a new file's page cache and {again:,.0f} MB/s into pages it has touched before."
    )
    head = ["way", "MB/s", "/ tokenizers on as many cores", "/ itself on one core"]
    print(write("prepare", "Preparing shards", "make bench BENCH=prepare", head, rows, note))


if __name__ == "__main__":
    main()
