"""Whole runs of every task in this process."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kinds import TASK_OF, WRITE, Train

from hvdtrain.comm.world import World
from hvdtrain.train import train


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, Path]:
    """A folder of each kind, and another: ``text``, ``text2``, ``pairs``, ..."""
    return {
        kind + number: write(tmp_path / (kind + number), seed)
        for seed, number in enumerate(("", "2"))
        for kind, write in WRITE.items()
    }


@pytest.fixture
def go(tmp_path: Path, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Train:
    """``go("run", "train.steps=4", kind="pairs")``: 6 steps of 4 x 8 tokens of that kind, in that folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = tmp_path / "tiny.yaml"
    settings = {
        "model": {"layers": 1, "heads": 2, "width": 16, "context": 8},
        "train": {"steps": 6, "global_batch": 4},
        "eval": {"every": 3},
        "checkpoint": {"every": 3},
        "metrics": {"every": 3, "tensorboard": False},
        "schedule": {"name": "constant", "warmup_steps": 2},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def run(name: str, *overrides: str, kind: str = "text", resume: str = "auto") -> dict[str, Any]:
        words = [f"task.name={TASK_OF[kind]}", f"data.dir={shards[kind]}", *overrides]
        return train(str(recipe), words, tmp_path / name, resume, World())

    return run
