"""What one or several runs came to: a table on the terminal and ``loss.png``."""

import json
from pathlib import Path
from typing import Any

from hvdtrain import checkpoint
from hvdtrain.errors import CheckpointError, OutputError
from hvdtrain.metrics import read_log


def report(run_dirs: list[Path], out: Path | None) -> str:
    """Draw the loss curves of the runs into ``out`` (default: ``loss.png`` in the first run) and return the table."""
    runs = [_read(run_dir) for run_dir in run_dirs]
    picture = out or run_dirs[0] / "loss.png"
    _draw(runs, picture)
    lines = [_table(runs), "", f"loss curve   {picture}"]
    for run in runs:
        saved = checkpoint.steps_saved(run["dir"])
        board = run["dir"] / "tensorboard"
        lines += [f"tensorboard  {board}"] if board.exists() else []
        lines += [f"checkpoint   {checkpoint.folder_of(run['dir'], saved[0])}"] if saved else []
    return "\n".join(lines)


def _read(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "metrics.jsonl"
    try:
        log = read_log(path)
    except OSError as error:
        raise CheckpointError(f"{run_dir} is not a run folder: cannot read {path.name}: {error.strerror}") from None
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None
    return {
        "dir": run_dir,
        "train": [line for line in log if line.get("kind") == "train" and "loss" in line],
        "eval": [line for line in log if line.get("kind") == "eval" and "val_loss" in line],
        "summary": summary if isinstance(summary, dict) else {"status": "unfinished"},
    }


def _table(runs: list[dict[str, Any]]) -> str:
    head = ["run", "status", "step", "tokens", "val loss", "best", "tokens/s", "MFU", "ranks", "sample digest"]
    rows = [head]
    for run in runs:
        summary = run["summary"]
        last = (run["train"] or [{}])[-1]
        val = (run["eval"] or [{}])[-1].get("val_loss")
        mfu = summary.get("mfu", last.get("mfu"))
        best = min((line["val_loss"] for line in run["eval"]), default=None)
        rows.append(
            [
                str(run["dir"]),
                str(summary.get("status")),
                f"{summary.get('step', last.get('step', 0)):,}",
                f"{summary.get('tokens', last.get('tokens', 0)):,}",
                "-" if val is None else f"{val:.4f}",
                "-" if best is None else f"{best:.4f}",
                f"{summary.get('tokens_per_s', last.get('tokens_per_s', 0)):,.0f}",
                "-" if mfu is None else f"{mfu:.1%}",
                str(summary.get("world_size", "-")),
                str(summary.get("sample_digest", "-")),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _draw(runs: list[dict[str, Any]], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        color, name = f"C{number}", run["dir"].name
        train, val = run["train"], run["eval"]
        axes.plot(
            [p["step"] for p in train],
            [p["loss"] for p in train],
            color=color,
            alpha=0.45,
            lw=1,
            label=f"{name}: training",
        )
        if val:
            axes.plot(
                [p["step"] for p in val], [p["val_loss"] for p in val], color=color, marker="o", ms=4,
                label=f"{name}: validation ({val[-1]['val_loss']:.3f})",
            )  # fmt: skip
    axes.set_xlabel("step (optimizer updates)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture)
    except OSError as error:
        raise OutputError(f"cannot write {picture}: {error.strerror or error}") from None
