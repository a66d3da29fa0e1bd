"""Folders of runs as training leaves them, whose steps took what a test says."""

import json
from pathlib import Path

from hvdtrain.config import RunConfig

PARTS = {"data": 0.0, "compute": 0.7, "sync": 0.2, "optimizer": 0.1, "other": 0.0}  # shares of a step


def write_measured_run(
    folder: Path, config: RunConfig, nodes: int, per_node: int, step_s: float, lines: int = 5, **job: object
) -> Path:
    """The first line is slow, as that of a start-up is. job: what its record says too."""
    ranks = nodes * per_node
    (folder / "jobs" / "1-0").mkdir(parents=True)
    known = {
        "started": "2026-01-01T00:00:00+00:00",
        "step_began": 0,
        "world_size": ranks,
        "nodes": {f"n{node}": list(range(node * per_node, (node + 1) * per_node)) for node in range(nodes)},
        "backend": "mpi" if ranks > 1 else "none",
        "config": config.model_dump(mode="json"),
    }
    (folder / "jobs" / "1-0" / "job.json").write_text(json.dumps({**known, **job}))
    tokens = config.train.global_tokens or config.train.global_batch * config.model.context
    with (folder / "metrics.jsonl").open("w") as file:
        for number in range(1, lines + 1):
            slow = 1 if number > 1 else 50
            times = {f"time_{part}_s": share * step_s * slow for part, share in PARTS.items()}
            step = 10 * number
            line = {"kind": "train", "step": step, "loss": 3.0, "tokens": tokens * step, **times}
            file.write(json.dumps(line) + "\n")
    return folder
