"""Start the program as its users do, alone or under a launcher. Nothing waits for ever, nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import yaml

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "none": [],
    "mpirun": ["mpirun", "--oversubscribe", "--bind-to", "none", "-np"],
    "horovodrun": ["horovodrun", "-np"],
    "gloo": ["horovodrun", "--gloo", "-np"],
}
HVDTRAIN = (sys.executable, "-m", "hvdtrain")
DATA_PREP = (sys.executable, "-m", "data_prep")
TRACE = "Traceback (most recent call last)"
_TAG = re.compile(r"(\[(?:\d+,)?\d+\]<std(?:out|err)>:)")  # horovodrun's, before all that it reads at once of a rank
_MARK = "HVDTRAIN_TEST_LAUNCH"


@dataclass(frozen=True)
class Done:
    """A command that has ended. ``exit_code`` is what the launcher's caller sees."""

    how: str
    exit_code: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[str]:
        """What hvdtrain said on standard error, a line each: one where something is wrong."""
        return [line for line in self._of_ranks(self.stderr) if line.startswith("hvdtrain: ")]

    @property
    def text(self) -> str:
        """All that the ranks printed, without the launcher's own words."""
        return "\n".join([*self._of_ranks(self.stdout), *self._of_ranks(self.stderr)])

    @property
    def rank_exit_code(self) -> int:
        """``horovodrun`` ends with 1 and a traceback of its own, whatever the ranks ended with; but it names that."""
        named = re.search(r"Exit code:\s*(\d+)", self.stderr) if self.how in ("gloo", "horovodrun") else None
        return int(named[1]) if named else self.exit_code

    def _of_ranks(self, output: str) -> list[str]:
        if self.how not in ("gloo", "horovodrun"):
            return output.splitlines()
        # A rank's line may come in pieces, with those of other ranks between them.
        lines, begun = [], {}
        for printed in output.splitlines():
            _, *pieces = _TAG.split(printed)
            for tag, words in zip(pieces[::2], pieces[1::2], strict=True):
                begun[tag] = begun.get(tag, "") + words
            if pieces:
                lines.append(begun.pop(pieces[-2]))
        return [*lines, *begun.values()]

    def __str__(self) -> str:
        return f"{self.how}, exit code {self.exit_code}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def launch(
    *words: Any,
    how: str = "none",
    ranks: int = 1,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120,
    program: tuple[Any, ...] = HVDTRAIN,
) -> Done:
    """Run ``program words...`` under a launcher of LAUNCHERS, in an environment that no outer launcher has marked.

    AssertionError with all output where it has not ended within ``timeout_s``, or leaves a process behind.
    """
    launcher = LAUNCHERS[how] and [*LAUNCHERS[how], ranks]
    args = [str(word) for word in (*launcher, *program, *words)]
    mark = f"{_MARK}={uuid.uuid4()}"
    try:
        found = command.run(
            args, timeout_s, cwd=cwd, env={**environment(), **(env or {}), _MARK: mark.partition("=")[2]}
        )
        done = Done(how, found.returncode, found.stdout, found.stderr)
        until = time.monotonic() + 5
        while (rest := _marked(mark)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not rest, f"{' '.join(args)} left processes behind: {list(rest.values())}\n{done}"
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{error}\n--- stdout\n{error.stdout}\n--- stderr\n{error.stderr}") from None
    finally:
        for pid in _marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return done


def environment() -> dict[str, str]:
    """This process's, with this Python's folder first on the PATH and without the marks of an outer launcher.

    How mpirun starts its daemons is the site's: a machine without ssh says so by a setting of plm.
    """
    outer = ("OMPI_", "OMP_NUM_THREADS", "PMI", "SLURM", "HOROVOD", "RANK", "WORLD_SIZE", "HVDTRAIN_RANKS")
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(outer) or name.startswith("OMPI_MCA_plm")
    }
    clean["PATH"] = f"{BIN}{os.pathsep}{clean.get('PATH', os.defpath)}"  # horovodrun looks there for mpirun
    if os.geteuid() == 0:
        clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return clean


def _marked(mark: str) -> dict[int, str]:
    """Every process that was started with ``mark`` in its environment, and its command."""
    found = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it may have ended meanwhile
            if mark.encode() in environ.read_bytes().split(b"\0"):
                found[int(environ.parent.name)] = (environ.parent / "cmdline").read_text().replace("\0", " ")
    return found


def succeed(*words: Any, **how: Any) -> Done:
    """``launch`` what must end with exit code 0."""
    done = launch(*words, **how)
    assert done.exit_code == 0, done
    return done


# main() several times in one process: loading torch takes longer than all of them.
_ROWS = """
import contextlib, importlib, io, json, sys
main = importlib.import_module(sys.argv[2] + ".__main__").main
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def launch_rows(rows: Iterable[Iterable[Any]], module: str = "hvdtrain", **how: Any) -> list[Done]:
    """Each row of words in turn, without a launcher, as if every one had a process of its own."""
    words = json.dumps([[str(word) for word in row] for row in rows])
    done = succeed(words, module, program=(sys.executable, "-c", _ROWS), **how)
    return [Done("none", *json.loads(line)) for line in done.stdout.splitlines()]


@dataclass(frozen=True)
class Prepared:
    """A small corpus, its tokenizer and shards, and a recipe that takes a second."""

    folder: Path
    corpus: Path
    tokenizer: Path
    shards: Path
    recipe: Path


def prepare(folder: Path) -> Prepared:
    """Ten files, one of them in many scripts; 300 tokens, 56,000 of them in the text, the last tenth for validation."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for name in ("abc", "bisect", "heapq", "keyword", "queue", "sched", "shelve", "textwrap", "this"):
        text = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8")
        (corpus / f"{name}.txt").write_text(text, encoding="utf-8")
    (corpus / "scripts.txt").write_text("Ünïcödé — żółw, 日本語, Ελλάδα, 🙂\n" * 20, encoding="utf-8")
    made = Prepared(folder, corpus, folder / "tokenizer.json", folder / "shards", folder / "small.yaml")
    succeed("tokenizer", "--input", corpus, "--vocab-size", 300, "--out", made.tokenizer, program=DATA_PREP)
    split = ("--val-split", "tail", "--val-fraction", 0.1)
    succeed("text", "--input", corpus, "--tokenizer", made.tokenizer, *split, "--out", made.shards, program=DATA_PREP)
    settings = {
        "seed": 3,
        "data": {"dir": str(made.shards)},
        "model": {"layers": 2, "heads": 2, "width": 32, "context": 16},
        "train": {"steps": 12, "global_batch": 12},
        "eval": {"every": 6},
        "checkpoint": {"every": 6},
        "metrics": {"every": 3},
        # Constant, so that a run of 6 steps is the first half of one of 12.
        "schedule": {"name": "constant", "warmup_steps": 2},
    }
    made.recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return made


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
