"""Checks a folder of shards to the last bit, shared by ranks and threads, and prints a table."""

import sys
import time
from pathlib import Path

from data_prep.pieces import share
from hvdtrain.comm.ranks import Ranks
from hvdtrain.data.check import check_shards
from hvdtrain.data.shards import SPLITS, Manifest, file_problems, read_manifest


def verify(folder: Path, ranks: Ranks, threads: int) -> list[str]:
    """What is wrong, on every rank; rank 0 prints the table (collective).

    Errors: DataError where manifest or tokenizer are missing, damaged or of another corpus.
    """
    started = time.perf_counter()
    manifest = ranks.together(lambda: read_manifest(folder))
    problems = ranks.together(lambda: list(file_problems(folder, manifest)))
    named = " ".join(problems)
    there = [info for info in manifest.shards if str(folder / info.file) not in named]
    mine = share([info.file_bytes for info in there], ranks.size)[ranks.rank]
    found = ranks.together(lambda: check_shards(folder, manifest, [there[number] for number in mine], threads))
    problems += sorted(problem for part in ranks.all_gather_object(found) for problem in part)
    if ranks.rank == 0:
        print(_table(folder, manifest, problems))
        seconds, megabytes = time.perf_counter() - started, sum(info.file_bytes for info in there) / 1e6
        print(f"{folder}: {megabytes:,.1f} MB in {seconds:.1f} s ({megabytes / seconds:,.0f} MB/s)", flush=True)
        for problem in problems:
            print(f"data_prep: {problem}", file=sys.stderr)
    return problems


def _table(folder: Path, manifest: Manifest, problems: list[str]) -> str:
    rows = [("split", "shards", "documents", "tokens", "bytes", "problems")]
    for split in SPLITS:
        infos = manifest.split(split)
        if infos:
            wrong = sum(any(str(folder / info.file) in problem for info in infos) for problem in problems)
            numbers = (
                len(infos),
                sum(info.documents for info in infos),
                sum(info.tokens + info.target_tokens for info in infos),
                sum(info.file_bytes for info in infos),
                wrong,
            )
            rows.append((split, *(f"{number:,}" for number in numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    verdict = f"{len(problems)} problems" if problems else "whole"
    return "\n".join([*lines, f"{folder}: {verdict}; data digest {manifest.data_digest}"])
