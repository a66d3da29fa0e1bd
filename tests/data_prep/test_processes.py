"""Preparation as its users run it: alone, under mpirun, killed, refused, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from command import until
from launch import _MARK, DATA_PREP, LAUNCHERS, TRACE, Done, _marked, environment, launch, succeed
from preparing import ODD_TEXTS, snapshot, write

from data_prep.__main__ import main

# Several commands in one job: starting the ranks takes longer than the work.
_ROWS = """
import json, sys
from data_prep.__main__ import main
for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(code)
"""


def rows(commands: Iterable[Sequence[Any]], **how: Any) -> Done:
    words = json.dumps([[str(word) for word in command] for command in commands])
    return succeed(words, program=(sys.executable, "-c", _ROWS), **how)


# --- the same bytes ----------------------------------------------------------------------------------------------


def commands(tokenizer: Path, out: Path) -> dict[str, list[str]]:
    """One preparation of each kind, most of many units, for the folder of ``inputs``."""
    common = f"--tokenizer {tokenizer} --val-fraction 0.2"
    found = {
        "text": f"text --input text --documents line --deduplicate --val-input val.txt --shard-tokens 1500 {common}",
        "pairs": "pairs --source a.src b.src.gz --target a.tgt b.tgt --max-tokens 100 --shard-tokens 500 " + common,
        "labels": f"labels --input labels --test-input test.tsv --shard-tokens 300 {common}",
        "questions": f"labels --input squad {common}",
    }
    return {kind: f"{words} --out {out}/{kind}".split() for kind, words in found.items()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    odd = "\n".join(ODD_TEXTS)
    lines = "".join(f"line {n} of text, {'漢字' * (n % 3)} \U0001f600\n" for n in range(200))
    table = "label\ttext\n" + "".join(f"{n % 3}\ttext {n} é\n" for n in range(90))
    answers = [{"text": "answer", "answer_start": 2}]
    paragraphs = [
        {"context": f"\U0001f600 answer {n}", "qas": [{"id": str(n), "question": f"q{n}?", "answers": answers}]}
        for n in range(5)
    ]
    squad = json.dumps({"data": [{"paragraphs": paragraphs}]})
    write(
        folder / "in/text",
        **{
            "a.txt": lines,
            "b.txt.gz": odd * 3 + lines[:999],
            "c.txt.zst": odd,
            "d.txt.xz": lines[:99],
            "f.txt.bz2": lines.replace("line", "row"),
        },
    )
    write(folder / "in/text", **{"e.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in ODD_TEXTS)})
    write(folder / "in", **{"val.txt": "held out\n", "test.tsv": table[:99]})
    write(
        folder / "in", **{"a.src": lines, "a.tgt": lines.upper(), "b.src.gz": lines[:999], "b.tgt": lines[:999].upper()}
    )
    write(folder / "in/labels", **{"a.tsv": table, "b.tsv.gz": table})
    write(folder / "in/squad", **{f"{n}.json": squad for n in range(4)})
    return folder


@pytest.fixture(scope="module")
def alone(inputs: Path, bpe: Path) -> dict[str, dict[str, bytes]]:
    """What one process without a launcher makes."""
    kinds = commands(bpe, inputs / "alone")
    done = rows(kinds.values(), cwd=inputs / "in")
    assert all(f"alone/{kind}: train " in done.stdout for kind in kinds)
    made = {kind: snapshot(inputs / "alone" / kind) for kind in kinds}
    assert all(sum(name.endswith(".h5") for name in files) > 5 for kind, files in made.items() if kind != "questions")
    assert any("_001.h5" in name for name in made["text"])  # one compressed file, several shards
    return made


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_bytes_under_mpirun(inputs: Path, bpe: Path, alone: dict[str, dict[str, bytes]], ranks: int):
    out = inputs / f"ranks{ranks}"
    kinds = commands(bpe, out)
    done = rows(
        [*kinds.values(), kinds["text"], ["verify", out / "labels"]], how="mpirun", ranks=ranks, cwd=inputs / "in"
    )
    assert {kind: snapshot(out / kind) for kind in kinds} == alone
    assert f"{out}/labels: whole; data digest" in done.stdout
    assert f"{out}/text: already prepared from this input, kept" in done.stdout
    assert done.stdout.count("labels: 3 labels: 0, 1, 2") == 1  # rank 0 alone speaks


def test_what_the_terminal_is_told(inputs: Path, bpe: Path, tmp_path: Path):
    write(tmp_path, **{"a.txt": b"same\nsame\nsame\nx\nand a much longer line\ncaf\xe9\n"})
    words = [
        "text",
        "--input",
        tmp_path / "a.txt",
        "--documents",
        "line",
        "--tokenizer",
        bpe,
        "--out",
        tmp_path / "out",
    ]
    limits = ["--deduplicate", "--min-tokens", 3, "--max-tokens", 12, "--invalid-utf8", "replace", "--val-fraction", 0]
    told = succeed(*words, *limits, program=DATA_PREP).stdout
    assert (
        f"{tmp_path}/out: 2 duplicates left out, 1 below --min-tokens left out, 1 above --max-tokens left out, "
        "1 characters replaced by U+FFFD\n" in told
    )
    assert f"{tmp_path}/out: no document fell to val; training needs some: raise --val-fraction" in told
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    counted = {
        name: source[name] for name in ("duplicates", "too_short", "too_long", "replaced_characters", "documents")
    }
    assert counted == {"duplicates": 2, "too_short": 1, "too_long": 1, "replaced_characters": 1, "documents": 2}


# --- killed ------------------------------------------------------------------------------------------------------

UNITS = 100


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, byte: Path) -> dict[str, Any]:
    """A preparation of many units, and what comes of it when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("many")
    write(folder / "in", **{"a.txt": "".join(f"line {n:05}\n" for n in range(3000))})
    words = ["text", "--input", folder / "in", "--documents", "line", "--tokenizer", byte, "--val-fraction", "0.1"]
    words += ["--shard-tokens", str(3000 * 11 // UNITS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setenv("RAYON_NUM_THREADS", "1")  # main() sets it where it is not
        assert main([str(word) for word in [*words, "--out", folder / "whole"]]) == 0
    whole = snapshot(folder / "whole")
    assert UNITS <= len(json.loads(whole["manifest.json"])["source"]["units"]) <= UNITS * 1.1
    return {"words": words, "whole": whole}


@contextmanager
def started(*words: Any, how: str = "none", ranks: int = 1) -> Iterator[tuple[subprocess.Popen, str]]:
    """A command that goes on meanwhile, and the mark of its processes; none is left behind."""
    launcher = LAUNCHERS[how] and [*LAUNCHERS[how], ranks]
    args = [str(word) for word in (*launcher, *DATA_PREP, *words)]
    mark = str(uuid.uuid4())
    process = subprocess.Popen(
        args,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**environment(), _MARK: mark},
        start_new_session=True,
    )
    try:
        yield process, f"{_MARK}={mark}"
    finally:
        for pid in [process.pid, *_marked(f"{_MARK}={mark}")]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def records(out: Path) -> set[str]:
    return {path.stem for path in out.glob(".parts/[0-9]*.json")}


def shards(out: Path) -> dict[str, tuple[int, int]]:
    """Name -> what tells whether it was written again, of the units that have a record."""
    done = records(out)
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("*.h5") if p.stem[-5:] in done}


def assert_goes_on(out: Path, many: dict[str, Any], kept: dict[str, tuple[int, int]], **how: Any) -> None:
    assert list(out.glob("*manifest*")) == []
    done = succeed(*many["words"], "--out", out, program=DATA_PREP, **how)
    assert "hvdtrain: going on with an interrupted preparation: " in done.stderr
    assert snapshot(out) == many["whole"]
    now = {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in kept}
    assert now == kept  # what was finished was not made again


def test_a_killed_preparation_keeps_others_out_and_is_gone_on_with(tmp_path: Path, many: dict[str, Any]):
    out = tmp_path / "out"
    words = [*many["words"], "--out", out]
    with started(*words) as (process, _):
        until(lambda: len(records(out)) >= 5, "a few units", 60)
        process.send_signal(signal.SIGSTOP)
        assert len(records(out)) < UNITS, "too fast for this test"
        assert list(out.glob("*manifest*")) == []
        for how, ranks in (("none", 1), ("mpirun", 2)):
            done = launch(*words, program=DATA_PREP, how=how, ranks=ranks)
            assert (done.exit_code, len(done.messages), TRACE in done.text) == (2, 1, False), done
            assert (
                f"another process is preparing {out}; to share the work, start one job: mpirun -np" in done.messages[0]
            )
        process.kill()
        process.wait(10)
    (out / ".train-00090.h5.99.tmp").write_bytes(b"half")
    assert_goes_on(out, many, shards(out), how="mpirun", ranks=2)


def test_a_killed_rank_ends_the_job_which_is_gone_on_with(tmp_path: Path, many: dict[str, Any]):
    out = tmp_path / "out"
    with started(*many["words"], "--out", out, how="mpirun", ranks=2) as (process, mark):
        until(lambda: len(records(out)) >= 5, "a few units", 60)
        ranks = [pid for pid, command in _marked(mark).items() if pid != process.pid and "data_prep" in command]
        os.kill(max(ranks), signal.SIGKILL)
        assert process.wait(30) != 0
        until(lambda: not _marked(mark), "the end of the other rank", 10)
    assert_goes_on(out, many, shards(out))


# --- one rank fails ----------------------------------------------------------------------------------------------


def test_bad_text_on_one_rank_ends_the_job(tmp_path: Path, byte: Path):
    good = b"a line of text\n" * 80_000
    at = len(good) // 2 + len(good) // 32  # between two places of the sample
    bad = good[:at] + b"caf\xe9 line\n" + good[at:-100]  # the lighter one is rank 1's
    write(tmp_path / "in", **{"a.txt": good, "b.txt": bad})
    words = ["text", "--input", tmp_path / "in", "--documents", "line", "--tokenizer", byte, "--out", tmp_path / "out"]
    done = launch(*words, "--shard-tokens", 1_500_000, program=DATA_PREP, how="mpirun", ranks=2, timeout_s=50)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (65, 1, False), done
    assert "[rank 1 on " in done.messages[0]
    assert f"{tmp_path}/in/b.txt is not UTF-8 text: byte {at + 3} is 0xe9; convert it" in done.messages[0]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_input_that_one_rank_does_not_see(tmp_path: Path, byte: Path):
    write(tmp_path / "in", **{"a.txt": "text"})
    words = f"text --input in --tokenizer {byte} --out {tmp_path}/out"
    shell = f'[ "$OMPI_COMM_WORLD_RANK" = 1 ] && cd /; exec {sys.executable} -m data_prep {words}'
    done = launch(program=("sh", "-c", shell), how="mpirun", ranks=2, cwd=tmp_path, timeout_s=50)
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (65, 1, False), done
    assert "input in does not exist (on rank 1)" in done.messages[0]
    assert not (tmp_path / "out").exists()
