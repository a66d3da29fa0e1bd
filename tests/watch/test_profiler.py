"""The profiler: the chosen steps, their named parts, files that are whole."""

import gzip
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from hvdtrain.watch import profiler as profiler_module
from hvdtrain.watch.profiler import Profiler, parse_steps

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
PARTS = ["data", "forward_backward", "sync", "optimizer"]


def walk(profiler: Profiler, first: int, last: int) -> list[int]:
    """The loop's shape; returns the steps at whose beginning something was written."""
    written = []
    weight = torch.ones(8, 8, requires_grad=True)
    for step in range(first, last + 1):
        if profiler.step(step):
            written.append(step)
        for part in PARTS:
            with profiler.range(part):
                (weight @ weight).sum().backward()
    return written


def trace_of(run_dir: Path, rank: int = 0) -> list[dict]:
    with gzip.open(run_dir / "profile" / f"rank-{rank:05d}.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def annotations(run_dir: Path) -> list[str]:
    events = [event for event in trace_of(run_dir) if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(events, key=lambda event: (event["ts"], -event["dur"]))]


@pytest.mark.parametrize(
    ("spec", "steps"), [("", []), ("1", [1]), ("10-12", [10, 11, 12]), ("3-3", [3]), ("007-8", [7, 8])]
)
def test_steps(spec: str, steps: list[int]):
    assert list(parse_steps(spec)) == steps


@pytest.mark.parametrize("spec", ["x", "0", "0-2", "5-3", "1-", "-2", "1-2-3", " 1", "1\n", "1.5", "1:2"])
def test_steps_that_are_none(spec: str):
    with pytest.raises(ValueError, match="FIRST-LAST"):
        parse_steps(spec)


def test_the_chosen_steps_and_their_parts(tmp_path: Path):
    profiler = Profiler(parse_steps("3-4"), tmp_path, 0, CPU)
    assert walk(profiler, 1, 6) == [5]
    assert not profiler.close()
    assert annotations(tmp_path) == ["step 3", *PARTS, "step 4", *PARTS]
    products = [event for event in trace_of(tmp_path) if event.get("name") == "aten::mm"]
    assert len(products) == 2 * len(PARTS) * 3  # forward, and backward for both factors
    table = (tmp_path / "profile" / "rank-00000.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-00000.json.gz", "rank-00000.txt"]


def test_steps_at_the_end_of_a_run_are_written_when_it_closes(tmp_path: Path):
    with closing(Profiler(parse_steps("3-9"), tmp_path, 0, CPU)) as profiler:
        assert walk(profiler, 1, 4) == []
        assert not (tmp_path / "profile").exists()
    assert annotations(tmp_path) == ["step 3", *PARTS, "step 4", *PARTS]


def test_a_run_that_resumes_within_the_steps_profiles_the_rest(tmp_path: Path):
    with closing(Profiler(parse_steps("3-5"), tmp_path, 0, CPU)) as profiler:
        assert walk(profiler, 5, 7) == [6]
    assert annotations(tmp_path) == ["step 5", *PARTS]
    with closing(Profiler(parse_steps("3-5"), tmp_path / "later", 0, CPU)) as profiler:
        assert walk(profiler, 6, 8) == []
    assert not (tmp_path / "later").exists()


def test_no_step_no_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing is to be profiled, nothing of torch's profiler is touched."""

    def refuse(*_, **__):
        raise AssertionError("the profiler was touched")

    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    monkeypatch.setattr(torch.profiler, "profile", refuse)
    with closing(Profiler(parse_steps(""), tmp_path, 0, CPU)) as profiler:
        assert walk(profiler, 1, 3) == []
        assert profiler.range("data") is profiler.range("sync")
    with closing(Profiler(parse_steps("100"), tmp_path, 0, CPU)) as profiler:
        assert walk(profiler, 1, 3) == []
    assert list(tmp_path.iterdir()) == []


def test_the_first_ranks_write(tmp_path: Path):
    for rank in (1, profiler_module.RANKS - 1, profiler_module.RANKS):
        with closing(Profiler(parse_steps("1"), tmp_path, rank, CPU)) as profiler:
            walk(profiler, 1, 2)
    names = sorted(path.name for path in (tmp_path / "profile").glob("*.gz"))
    assert names == ["rank-00001.json.gz", "rank-00007.json.gz"]


def test_a_trace_that_cannot_be_written_is_not_worth_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "profile").write_text("in the way")
    with closing(Profiler(parse_steps("1"), tmp_path, 0, CPU)) as profiler:
        walk(profiler, 1, 3)
    assert capsys.readouterr().err.count(f"hvdtrain: note: cannot write {tmp_path}/profile/rank-00000.json.gz: ") == 1
    with closing(Profiler(parse_steps("1"), tmp_path, 0, CPU)) as profiler:
        walk(profiler, 1, 1)


def test_the_first_error_stays(tmp_path: Path):
    (tmp_path / "profile").write_text("in the way")
    with pytest.raises(KeyError), closing(Profiler(parse_steps("1"), tmp_path, 0, CPU)) as profiler:
        walk(profiler, 1, 1)
        raise KeyError("what went wrong first")


def test_an_error_in_a_profiled_step_leaves_the_exit_code_alone(tmp_path: Path):
    """A profiler that nobody stops crashes the process at its end, after the last message: that hid what went wrong."""
    code = (
        "import pathlib, sys, torch\n"
        "from contextlib import closing\n"
        "from hvdtrain.watch.profiler import Profiler\n"
        f"with closing(Profiler(range(1, 9), pathlib.Path({str(tmp_path)!r}), 0, torch.device('cpu'))) as profiler:\n"
        "    profiler.step(1)\n"
        "    with profiler.range('data'):\n"
        "        torch.ones(2, 2).mm(torch.ones(2, 2))\n"
        "        sys.exit(76)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 76, done.stderr
    assert annotations(tmp_path) == ["step 1", "data"]
