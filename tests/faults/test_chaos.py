"""Twelve trials, one of every kind; `make bench BENCH=chaos` makes hundreds."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import KINDS, STEPS, Fault, Record, Trial, run_trial, unbroken
from launch import Prepared

from hvdtrain.checkpoint.retention import folder_of, partial_of


@pytest.fixture(scope="module")
def reference(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unbroken(prepared, tmp_path_factory.mktemp("unbroken") / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_of_every_kind(prepared: Prepared, reference: Path, tmp_path: Path, kind: str):
    record = run_trial(kind, list(KINDS).index(kind), 1, prepared, reference, tmp_path)
    assert record.good, "\n".join([str(record.fault), *record.wrong])
    assert len(record.exits) > 1, record  # the fault came in time


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


LAST = f"checkpoints/step-{STEPS:08d}"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "other parameters": (lambda run: flip(run / LAST / "part-00001-of-00002.safetensors"), f"step {STEPS} differs"),
    "other rows": (lambda run: swap(run / "summary.json", 'digest": "', 'digest": "0'), "digest is"),
    "a step twice": (lambda run: swap(run / "metrics.jsonl", '"step": 8,', '"step": 7,'), "metrics.jsonl differs"),
    "a part of a save": (lambda run: partial_of(run, 35).mkdir(), "left behind: ['.step-00000035.partial']"),
    "heartbeats": (lambda run: (run / "heartbeats").mkdir(), "left behind: ['heartbeats']"),
    "no last one": (lambda run: shutil.rmtree(folder_of(run, STEPS)), f"[{STEPS - 10}, {STEPS - 5}]"),
}  # fmt: skip


@pytest.mark.parametrize("what", [None, *WRONG])
def test_a_wrong_end_is_noticed(prepared: Prepared, reference: Path, tmp_path: Path, what: str | None):
    shutil.copytree(reference, tmp_path / "run")
    for step in range(5, STEPS - 10, 5):
        shutil.rmtree(folder_of(tmp_path / "run", step))
    record = Record(0, "kill rank 0", False, {})
    trial = Trial(prepared, reference, tmp_path, tmp_path, Fault(1, 0), record)
    if what is None:
        trial.check_end()
        return
    break_it, message = WRONG[what]
    break_it(tmp_path / "run")
    with pytest.raises(AssertionError) as caught:
        trial.check_end()
    assert message in str(caught.value)
